"""The views of a training step, and how WS-DAN's are drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from magsd.config import ViewsConfig
from magsd_kernels import AttentionViews, attention_crop, attention_drop, sample_attention


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
        draws = self.views.draw(attention, uniforms=uniforms)
        views: Tensor = self.views(images, attention, draws=draws)
        return views


class WSDANViews(nn.Module):
    """Crop and drop, each by a map of its own; every resize with align_corners=True."""

    uniforms_per_image = 4

    def __init__(self, config: ViewsConfig) -> None:
        super().__init__()
        self.crop_theta, self.drop_theta = config.crop_theta, config.drop_theta
        self.padding = config.padding

    def forward(self, images: Tensor, attention: Tensor, uniforms: Tensor) -> list[Tensor]:
        """See `GuidedViews`."""
        index = sample_attention(attention, uniforms[:, :2])
        guide: dict[str, Any] = {"align_corners": True}
        crop = attention_crop(
            images,
            attention,
            _within(self.crop_theta, uniforms[:, 2]),
            padding=self.padding,
            index=index[:, 0],
            **guide,
        )
        drop = attention_drop(
            images, attention, _within(self.drop_theta, uniforms[:, 3]), index=index[:, 1], **guide
        )
        return [crop, drop]


def _within(bounds: tuple[float, float], uniforms: Tensor) -> Tensor:
    low, high = bounds
    return uniforms * (high - low) + low


def draw_uniforms(images: Tensor, views: GuidedViews, generator: torch.Generator | None) -> Tensor:
    """What the views of a whole batch need, (B, uniforms_per_image)."""
    shape = (len(images), views.uniforms_per_image)
    return torch.rand(shape, generator=generator, device=images.device)
