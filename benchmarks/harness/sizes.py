"""Sizes of the published networks, and random inputs of these sizes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from magsd_kernels import cases
from magsd_kernels.cases import Arguments

CLASSES = 4
_NEAREST_PIXELS = 64
_GRAIN = (28, 28)


@dataclass(frozen=True)
class Network:
    """What a network feeds to the operations: images, and feature maps from fine to coarse.

    features: (channels, side) of each. draws: maps that are drawn for an image.
    """

    name: str
    channels: int
    side: int
    features: tuple[tuple[int, int], ...]
    batches: tuple[int, ...]
    align_corners: bool = False
    maps: int = 32
    draws: int = 3

    @property
    def image(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return self.channels, self.side, self.side

    def scaled(self, factor: int) -> Network:
        """The same network on images whose side is `factor` times as long."""
        features = tuple((channels, side * factor) for channels, side in self.features)
        return replace(self, side=self.side * factor, features=features)

    def size(self, batch: int) -> cases.Size:
        """Of a call; the attention is as large as the coarsest features."""
        channels, side = self.features[-1]
        return cases.Size(
            *(batch, self.maps, CLASSES, self.draws), image=self.image[1:], planes=self.channels,
            low=(side, side), features=(side, side), channels=channels,
            scales=tuple((side, side) for _, side in self.features), output=(side, side),
        )  # fmt: skip


MAGSD = Network("magsd", 1, 224, ((512, 28), (1024, 14), (2048, 7)), (16, 64, 256))
WSDAN = Network("wsdan", 3, 448, ((2048, 14),), (16, 64), align_corners=True, draws=2)


def _norms(name: str, *inputs: tuple[int, int, int]) -> dict[Network, int]:
    """By input (channels, side) of batch norms: how many of them the network has."""
    return {
        Network(f"{name}-{channels}x{side}", 3, 224, ((channels, side),), (16,)): count
        for channels, side, count in inputs
    }


#: Inputs of all batch norms of ResNet-50, by what follows: the shortcut and a rectifier, or nothing
#: in the shortcut itself. Small ones first: they are those that grow.
RESNET50 = {
    "relu": _norms("resnet50", (512, 7, 5), (512, 14, 1), (256, 14, 11), (256, 28, 1),
                   (128, 28, 7), (128, 56, 1), (64, 56, 6), (64, 112, 1)),
    "residual": _norms("resnet50", (2048, 7, 3), (1024, 14, 6), (512, 28, 4), (256, 56, 3)),
    "none": _norms("resnet50", (2048, 7, 1), (1024, 14, 1), (512, 28, 1), (256, 56, 1)),
}  # fmt: skip
#: The same of some of EfficientNet's. lite0 rectifies up to 6, which no backend does with the norm.
EFFICIENTNET = {
    "silu": _norms("efficientnet_b0", (1152, 7, 8), (480, 14, 6), (240, 28, 3), (144, 56, 3),
                   (32, 112, 2)),
    "none": _norms("tf_efficientnet_lite0", (1152, 7, 8), (112, 14, 3), (144, 56, 3)),
}  # fmt: skip
#: dtypes of activations, in half precision channels_last; parameters and draws are float32.
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def photograph(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Random (..., H, W), float32, as smooth as photographs are, with a little noise.

    On white noise the float32 coordinates of a resized image alone would miss the tolerance.
    """
    device = generator.device
    coarse = torch.randn(1, math.prod(shape[:-2]), *_GRAIN, generator=generator, device=device)
    size = (shape[-2], shape[-1])
    smooth = F.interpolate(coarse, size, mode="bilinear", align_corners=True).view(*shape)
    return smooth + 0.01 * torch.randn(*shape, generator=generator, device=device)


class Draw(cases.Draw):
    """What `cases` fills arguments with, as in a network, on the device; the seed decides it."""

    def __init__(self, network: Network, precision: str, device: str, seed: int = 0) -> None:
        super().__init__(PRECISIONS[precision], seed, device)
        self.network = network
        self._generator = torch.Generator(device).manual_seed(seed)

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """float32 in low..high."""
        values = torch.rand(shape, generator=self._generator, device=self.device)
        return values * (high - low) + low

    def integers(self, count: int, step: int, below: int) -> Tensor:
        """(count,) int64, whatever the step."""
        return torch.randint(below, (count,), generator=self._generator, device=self.device)

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Activations; images are photographs, and (channels,) are parameters around 1."""
        if len(shape) == 1:
            return self.uniform(*shape, low=0.5, high=1.5)
        if shape[1:] == self.network.image:
            return self._activation(photograph(shape, self._generator))
        return self._activation(torch.randn(shape, generator=self._generator, device=self.device))

    def attention(self, *shape: int) -> Tensor:
        """(B, M, h, w): one bump a map on a low noise, as trained maps look."""
        batch, maps, side, _ = shape
        grid = (torch.arange(side, device=self.device) + 0.5) / side
        distance = torch.zeros((), device=self.device)
        for axis in ((side, 1), (1, side)):
            distance = distance + (grid.view(axis) - self.uniform(batch, maps, 1, 1)) ** 2
        width = self.uniform(batch, maps, 1, 1, low=0.15, high=0.35)
        noise = self.uniform(*shape, high=0.05)
        return self._activation((-distance / (2 * width**2)).exp() + noise)

    def guided(self, arguments: Arguments, *ranges: tuple[float, float]) -> Arguments:
        """Thresholds of each view in its range, and away from every pixel."""
        attention, index = arguments["attention"], arguments["index"].view(-1, len(ranges))
        thetas = [
            self._settled(self.uniform(len(index), low=low, high=high), attention, maps)
            for (low, high), maps in zip(ranges, index.unbind(1), strict=True)
        ]
        return arguments | {"theta": torch.stack(thetas, 1).view_as(arguments["index"])}

    def _settled(self, theta: Tensor, attention: Tensor, index: Tensor) -> Tensor:
        """Theta moved into the widest gap between the pixels next to its threshold.

        A pixel on the threshold would be decided by rounding, and competitors round differently.
        """
        maps = attention[torch.arange(len(index), device=self.device), index].float()
        size, corners = self.network.image[1:], self.network.align_corners
        resized = F.interpolate(maps[:, None], size, mode="bilinear", align_corners=corners)
        upsampled = resized.flatten(1)
        if upsampled.shape[1] == 1:  # far above its threshold
            return theta
        peak = maps.amax((1, 2))
        distance = (upsampled - (theta * peak)[:, None]).abs()
        nearest = distance.topk(min(_NEAREST_PIXELS, distance.shape[1]), largest=False).indices
        values = upsampled.gather(1, nearest).sort(1).values
        gap, at = values.diff(dim=1).max(1)
        return (values.gather(1, at[:, None])[:, 0] + gap / 2) / peak

    def _activation(self, values: Tensor) -> Tensor:
        values = values.to(self.dtype)
        if self.dtype != torch.float32 and values.dim() == 4:
            values = values.contiguous(memory_format=torch.channels_last)
        return values
