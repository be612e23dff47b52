"""The published training step: four forward passes, one backward, and the host in between.

The network and the step of the released MAG-SD code (Li et al., arXiv 2012.02278) in our own words,
on the loops of `published.py`: plain torch modules, maps drawn with numpy image by image,
thresholds and offsets drawn one number after the other. Of the faults of the released code those
that cost time are here, and none that would change the result.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, cast

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


class PublishedNetwork(nn.Module):
    """MA-Net of plain modules: images (B, 1, H, W) -> logits (B, K) and attention (B, M, h, w).

    Its parts are named as those of `magsd.models.MAGSD`, so that it can load the same weights.
    """

    def __init__(self, backbone: str, classes: int, maps: int = 32, scales: int = 2) -> None:
        super().__init__()
        layers = tuple(range(-scales, 0))
        net = timm.create_model(
            backbone, features_only=True, pretrained=False, in_chans=1, out_indices=layers
        )
        channels = cast(FeatureInfo, net.feature_info).channels()
        projections = (nn.Conv2d(count, maps, 1, bias=False) for count in channels)
        norms = (nn.BatchNorm2d(maps, eps=1e-3) for _ in channels)
        self.backbone = nn.ModuleDict({"net": net})
        self.attention = nn.ModuleDict(
            {"projections": nn.ModuleList(projections), "norms": nn.ModuleList(norms)}
        )
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(maps * channels[-1], classes, bias=False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Pool every scale to the coarsest, sum, pool the features by the sum, classify."""
        features = self.backbone["net"](images)
        pool = nn.AdaptiveAvgPool2d(tuple(features[-1].shape[2:]))
        projections, norms = (cast(nn.ModuleList, part) for part in self.attention.values())
        scales = zip(projections, norms, features, strict=True)
        first, *others = [pool(self.relu(norm(project(x)))) for project, norm, x in scales]
        attention = sum(others, start=first)
        matrix = published.bilinear_attention_pool(features[-1], attention)
        return self.head(matrix), attention


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
