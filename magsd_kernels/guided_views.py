"""`AttentionViews`: draws what the guided views need and makes them.

Source: Li et al., MAG-SD, IEEE JBHI 2021 (arXiv 2012.02278) and its released code.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from magsd_kernels._checks import number, tensor
from magsd_kernels.attention_augment import attention_views
from magsd_kernels.attention_sampling import sample_attention


class ViewDraws(NamedTuple):
    """What `AttentionViews` drew: index (B, 3) int64, theta (B, 3) and offsets (B, 2) float32."""

    index: torch.Tensor  # type: ignore[assignment]  # the name that attention_views gives it
    theta: torch.Tensor
    offsets: torch.Tensor


class AttentionViews(nn.Module):
    """Draws maps, thresholds and offsets, and makes the three guided views.

    Args:
        mixup_theta, dim_theta, patch_theta: ranges (low, high) of the uniform thresholds.
        padding, weight, floor, align_corners, backend: as for `attention_views`.

    Shapes: forward takes images (B, C, H, W) and attention (B, M, h, w), returns (3, B, C, H, W).
    """

    def __init__(
        self,
        *,
        mixup_theta: tuple[float, float] = (0.4, 0.6),
        dim_theta: tuple[float, float] = (0.2, 0.5),
        patch_theta: tuple[float, float] = (0.4, 0.6),
        padding: float = 0.1,
        weight: float = 0.4,
        floor: float = 0.001,
        align_corners: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        ranges = {
            "mixup_theta": mixup_theta,
            "dim_theta": dim_theta,
            "patch_theta": patch_theta,
        }
        for name, (low, high) in ranges.items():
            number("AttentionViews", name, low)
            number("AttentionViews", name, high, low)
        self.ranges = tuple((float(low), float(high)) for low, high in ranges.values())
        self.padding = padding
        self.weight = weight
        self.floor = floor
        self.align_corners = align_corners
        self.backend = backend

    def draw(
        self,
        attention: torch.Tensor,
        generator: torch.Generator | None = None,
        *,
        uniforms: torch.Tensor | None = None,
    ) -> ViewDraws:
        """Draw what three views of a batch need, with a generator on the attention's device.

        uniforms: (B, 8) float32 in [0, 1), in place of the generator's.
        """
        shape = (attention.shape[0], 8)
        if uniforms is None:
            uniforms = torch.rand(shape, generator=generator, device=attention.device)
        else:
            tensor("AttentionViews", "uniforms", uniforms, shape, (torch.float32,), attention)
        # One column at a time: a tensor of the ranges would be a copy from the host each step.
        theta = torch.stack(
            [
                uniforms[:, 3 + view] * (high - low) + low
                for view, (low, high) in enumerate(self.ranges)
            ],
            1,
        )
        index = sample_attention(attention, uniforms[:, :3], backend=self.backend)
        return ViewDraws(index, theta, uniforms[:, 6:])

    def forward(
        self,
        images: torch.Tensor,
        attention: torch.Tensor,
        *,
        generator: torch.Generator | None = None,
        draws: ViewDraws | None = None,
        return_draws: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, ViewDraws]:
        """The views, and with `return_draws` also the draws; `draws` replays earlier ones."""
        if draws is None:
            draws = self.draw(attention, generator)
        views = attention_views(
            images,
            attention,
            *draws,
            padding=self.padding,
            weight=self.weight,
            floor=self.floor,
            align_corners=self.align_corners,
            backend=self.backend,
        )
        return (views, draws) if return_draws else views

    def extra_repr(self) -> str:
        """The settings."""
        mixup, dim, patch = self.ranges
        return (
            f"mixup_theta={mixup}, dim_theta={dim}, patch_theta={patch}, "
            f"padding={self.padding}, weight={self.weight}, floor={self.floor}"
        )
