"""The views of a training step, and how WS-DAN's are drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from magsd.config import ViewsConfig
from magsd_kernels import AttentionViews
from magsd_kernels.guided_views import sampled_views, scaled


class GuidedViews(Protocol):
    """Views of images, guided by their attention.

    uniforms_per_image: how many random numbers an image's views need.
    """

    uniforms_per_image: int

    def __call__(self, images: Tensor, attention: Tensor, uniforms: Tensor) -> Sequence[Tensor]:
        """Views, each of the shape of images (B, C, H, W).

        attention (B, M, h, w), uniforms (B, uniforms_per_image) float32 in [0, 1).
        """
        ...


class MAGSDViews(nn.Module):
    """Mix-up, dim and patch, (3, B, C, H, W) in one tensor."""

    uniforms_per_image = 8

    def __init__(self, config: ViewsConfig) -> None:
        super().__init__()
        self.views = AttentionViews(
            mixup_theta=config.mixup_theta,
            dim_theta=config.dim_theta,
            patch_theta=config.patch_theta,
            padding=config.padding,
            weight=config.weight,
            floor=config.floor,
        )

    def forward(self, images: Tensor, attention: Tensor, uniforms: Tensor) -> Tensor:
        """See `GuidedViews`."""
        views: Tensor = self.views(images, attention, uniforms=uniforms)
        return views


class WSDANViews(nn.Module):
    """Crop and drop, (2, B, C, H, W), each by its own map; every resize with align_corners=True."""

    uniforms_per_image = 4

    def __init__(self, config: ViewsConfig) -> None:
        super().__init__()
        self.ranges = (config.crop_theta, config.drop_theta)
        self.padding = config.padding

    def forward(self, images: Tensor, attention: Tensor, uniforms: Tensor) -> Tensor:
        """See `GuidedViews`."""
        views, _ = sampled_views(
            images,
            attention,
            uniforms[:, :2],
            scaled(uniforms[:, 2:], self.ranges),
            padding=self.padding,
            weight=1.0,
            floor=0.0,
            align_corners=True,
        )
        return views


def draw_uniforms(images: Tensor, views: GuidedViews, generator: torch.Generator | None) -> Tensor:
    """What the views of a whole batch need, (B, uniforms_per_image)."""
    shape = (len(images), views.uniforms_per_image)
    return torch.rand(shape, generator=generator, device=images.device)
