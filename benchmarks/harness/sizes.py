"""Sizes of the published networks, and random inputs of these sizes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

CLASSES = 4
VIEWS = 3
_NEAREST_PIXELS = 64
_GRAIN = (28, 28)


@dataclass(frozen=True)
class Network:
    """What a network feeds to the operations: images, and feature maps from fine to coarse."""

    name: str
    channels: int
    side: int
    features: tuple[tuple[int, int], ...]
    batches: tuple[int, ...]
    align_corners: bool = False
    maps: int = 32

    @property
    def coarse(self) -> int:
        """Side of the coarsest feature map, which is that of the attention."""
        return self.features[-1][1]

    def scaled(self, factor: int) -> Network:
        """The same network on images whose side is `factor` times as long."""
        features = tuple((channels, side * factor) for channels, side in self.features)
        return replace(self, side=self.side * factor, features=features)


MAGSD = Network("magsd", 1, 224, ((512, 28), (1024, 14), (2048, 7)), (16, 64, 256))
WSDAN = Network("wsdan", 3, 448, ((2048, 14),), (16, 64), align_corners=True)


@dataclass(frozen=True)
class Precision:
    """dtype and memory format of activations; parameters and draws are float32."""

    name: str
    dtype: torch.dtype
    channels_last: bool


PRECISIONS = {
    "float32": Precision("float32", torch.float32, channels_last=False),
    "bfloat16": Precision("bfloat16", torch.bfloat16, channels_last=True),
    "float16": Precision("float16", torch.float16, channels_last=True),
}


def photograph(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Random (..., H, W), float32, as smooth as photographs are, with a little noise.

    On white noise the float32 coordinates of a resized image alone would miss the tolerance.
    """
    device = generator.device
    coarse = torch.randn(1, math.prod(shape[:-2]), *_GRAIN, generator=generator, device=device)
    size = (shape[-2], shape[-1])
    smooth = F.interpolate(coarse, size, mode="bilinear", align_corners=True).view(*shape)
    return smooth + 0.01 * torch.randn(*shape, generator=generator, device=device)


class Draw:
    """Random inputs of one size; the seed decides them."""

    def __init__(
        self, network: Network, batch: int, precision: Precision, device: str, seed: int = 0
    ) -> None:
        self.network = network
        self.batch = batch
        self.device = device
        self._precision = precision
        self._generator = torch.Generator(device).manual_seed(seed)

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """float32 in low..high."""
        values = torch.rand(shape, generator=self._generator, device=self.device)
        return values * (high - low) + low

    def integers(self, high: int, *shape: int) -> Tensor:
        """int64 in 0..high - 1."""
        return torch.randint(high, shape, generator=self._generator, device=self.device)

    def normal(self, *shape: int) -> Tensor:
        """Normal numbers in the activations' dtype and memory format."""
        return self._activation(torch.randn(shape, generator=self._generator, device=self.device))

    def parameter(self, channels: int) -> Tensor:
        """(channels,) float32 around 1, as batch norm's weights and variances are."""
        return self.uniform(channels, low=0.5, high=1.5)

    def images(self) -> Tensor:
        """(B, C, H, W)."""
        side = self.network.side
        shape = (self.batch, self.network.channels, side, side)
        return self._activation(photograph(shape, self._generator))

    def features(self) -> Tensor:
        """The coarsest feature map, rectified."""
        channels, side = self.network.features[-1]
        return self.normal(self.batch, channels, side, side).relu_()

    def attention(self) -> Tensor:
        """(B, M, h, w): one bump a map on a low noise, as trained maps look."""
        side = self.network.coarse
        grid = (torch.arange(side, device=self.device) + 0.5) / side
        distance = torch.zeros((), device=self.device)
        for shape in ((side, 1), (1, side)):
            center = self.uniform(self.batch, self.network.maps, 1, 1)
            distance = distance + (grid.view(shape) - center) ** 2
        width = self.uniform(self.batch, self.network.maps, 1, 1, low=0.15, high=0.35)
        noise = self.uniform(self.batch, self.network.maps, side, side, high=0.05)
        return self._activation((-distance / (2 * width**2)).exp() + noise)

    def guide(
        self, low: float = 0.4, high: float = 0.6, attention: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Attention, and for one view the index of each image's map and its theta."""
        attention = self.attention() if attention is None else attention
        index = self.integers(self.network.maps, self.batch)
        theta = self.uniform(self.batch, low=low, high=high)
        return {
            "attention": attention,
            "index": index,
            "theta": self.settled(theta, attention, index),
        }

    def settled(self, theta: Tensor, attention: Tensor, index: Tensor) -> Tensor:
        """Theta moved into the widest gap between the pixels next to its threshold.

        A pixel on the threshold would be decided by rounding, and competitors round differently.
        """
        maps = attention[torch.arange(self.batch, device=self.device), index].float()
        upsampled = F.interpolate(
            maps[:, None],
            (self.network.side, self.network.side),
            mode="bilinear",
            align_corners=self.network.align_corners,
        ).flatten(1)
        if upsampled.shape[1] == 1:  # far above its threshold
            return theta
        peak = maps.amax((1, 2))
        distance = (upsampled - (theta * peak)[:, None]).abs()
        nearest = distance.topk(min(_NEAREST_PIXELS, distance.shape[1]), largest=False).indices
        values = upsampled.gather(1, nearest).sort(1).values
        gap, at = values.diff(dim=1).max(1)
        return (values.gather(1, at[:, None])[:, 0] + gap / 2) / peak

    def _activation(self, values: Tensor) -> Tensor:
        values = values.to(self._precision.dtype)
        if self._precision.channels_last and values.dim() == 4:
            values = values.contiguous(memory_format=torch.channels_last)
        return values
