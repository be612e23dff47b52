"""The published training step: four forward passes, one backward, and the host in between.

The network and the step of the released MAG-SD code (Li et al., arXiv 2012.02278) in our own words,
on the loops of `published.py`: plain torch modules, maps drawn with numpy image by image,
thresholds and offsets drawn one number after the other. Of the faults of the released code those
that cost time are here, and none that would change the result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import numpy as np
import timm
import torch
from timm.models import FeatureInfo
from torch import Tensor, nn

from benchmarks import published

_VIEWS = 3
#: Thresholds of mix-up, dim and patch.
_THETA = ((0.4, 0.6), (0.2, 0.5), (0.4, 0.6))


class HostDraws(NamedTuple):
    """What is drawn for a batch: index (B, 3) on the device, theta (B, 3), offsets (B, 2)."""

    index: Tensor  # type: ignore[assignment]  # hides the method of tuples
    theta: list[list[float]]
    offsets: list[list[float]]


class _Scale(nn.Module):
    """1x1 convolution, batch norm and rectifier: (B, C, h, w) -> (B, M, h, w)."""

    def __init__(self, in_channels: int, maps: int) -> None:
        super().__init__()
        self.projection = nn.Conv2d(in_channels, maps, 1, bias=False)
        self.norm = nn.BatchNorm2d(maps, eps=1e-3)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, features: Tensor) -> Tensor:
        attention: Tensor = self.relu(self.norm(self.projection(features)))
        return attention


class PublishedNetwork(nn.Module):
    """MA-Net of plain modules: images (B, 1, H, W) -> logits (B, K) and attention (B, M, h, w)."""

    def __init__(
        self,
        backbone: str = "resnet50",
        classes: int = 4,
        maps: int = 32,
        scales: int = 2,
        in_channels: int = 1,
    ) -> None:
        super().__init__()
        self.backbone = timm.create_model(
            backbone,
            features_only=True,
            pretrained=False,
            in_chans=in_channels,
            out_indices=tuple(range(-scales, 0)),
        )
        channels = cast(FeatureInfo, self.backbone.feature_info).channels()
        self.scales = nn.ModuleList(_Scale(count, maps) for count in channels)
        self.head = nn.Linear(maps * channels[-1], classes, bias=False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Pool every scale to the coarsest, sum, pool the features by the sum, classify."""
        features = self.backbone(images)
        size = features[-1].shape[2:]
        pool = nn.AdaptiveAvgPool2d((size[0], size[1]))
        pooled = [pool(scale(x)) for scale, x in zip(self.scales, features, strict=True)]
        attention = pooled[0]
        for other in pooled[1:]:
            attention = attention + other
        matrix = published.bilinear_attention_pool(features[-1], attention)
        return self.head(matrix), attention

    def load_ours(self, state: Mapping[str, Any]) -> None:
        """Take the weights of `magsd.models.MAGSD`; strict, so that the networks are the same."""
        self.load_state_dict({_renamed(name): value for name, value in state.items()})


def _renamed(name: str) -> str:
    """attention.norms.1.weight -> scales.1.norm.weight; backbone.net.x -> backbone.x."""
    for ours, theirs in (("projections", "projection"), ("norms", "norm")):
        prefix = f"attention.{ours}."
        if name.startswith(prefix):
            number, _, rest = name.removeprefix(prefix).partition(".")
            return f"scales.{number}.{theirs}.{rest}"
    return name.replace("backbone.net.", "backbone.", 1)


def draw(attention: Tensor, generator: np.random.Generator) -> HostDraws:
    """Three maps, thresholds and a place for every image, one image after the other."""
    batch = attention.shape[0]
    index = published.sample_attention(attention, generator.random((batch, _VIEWS)))
    theta = [[generator.uniform(low, high) for low, high in _THETA] for _ in range(batch)]
    offsets = [[generator.random() for _ in range(2)] for _ in range(batch)]
    return HostDraws(index, theta, offsets)


def published_step(
    model: nn.Module, images: Tensor, labels: Tensor, drawing: Callable[[Tensor], HostDraws]
) -> Tensor:
    """Loss of the raw images (B, 1, H, W) and their three views, labels (B,) int64; a scalar.

    drawing: from attention (B, M, h, w).
    """
    logits, attention = model(images)
    draws = drawing(attention)
    chosen = torch.stack([attention[b, maps] for b, maps in enumerate(draws.index)])
    every = [tuple(range(_VIEWS))] * len(images)
    views = published.attention_views(images, chosen, draws.theta, every, draws.offsets)
    return published.soft_distance_loss(logits, [model(view)[0] for view in views], labels)


def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """SGD with the published settings."""
    return torch.optim.SGD(
        model.parameters(), lr=1e-3, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
