"""`AttentionViews` and `sampled_views`: draw what the guided views need and make them.

Source: Li et al., MAG-SD, IEEE JBHI 2021 (arXiv 2012.02278) and its released code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from magsd_kernels._checks import number, tensor
from magsd_kernels._layout import empty_like_format
from magsd_kernels.attention_augment import (
    _check_box,
    _check_images,
    attention_views,
    differentiate_views,
    keep_views,
)
from magsd_kernels.attention_sampling import EPS, sample_attention
from magsd_kernels.backends import select
from magsd_kernels.registry import define

_OPERATION = "attention_augment"


def sampled_views(
    images: torch.Tensor,
    attention: torch.Tensor,
    uniforms: torch.Tensor,
    theta: torch.Tensor,
    offsets: torch.Tensor | None = None,
    *,
    padding: float = 0.1,
    weight: float = 0.4,
    floor: float = 0.001,
    align_corners: bool = False,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The views of maps that `sample_attention` draws; drawing takes no launch of its own.

    Args:
        images, attention, padding, weight, floor, align_corners, backend: see `attention_views`.
        uniforms, theta: (B, V) float32; column 0 is for mix-up, 1 dim, 2 patch.
        offsets: (B, 2) float32 for V = 3; None for V = 2, mix-up and dim alone.

    Returns:
        The views (V, B, C, H, W), and the maps drawn for them (B, V) int64.
    """
    op = "sampled_views"
    batch = _check_images(op, images, attention)
    columns = (batch, _count(offsets))
    tensor(op, "uniforms", uniforms, columns, (torch.float32,), images)
    tensor(op, "theta", theta, columns, (torch.float32,), images)
    if offsets is not None:
        tensor(op, "offsets", offsets, (batch, 2), (torch.float32,), images)
    _check_box(op, padding, align_corners)
    number(op, "weight", weight, 0, 1)
    number(op, "floor", floor, 0)
    backend = select(_OPERATION, backend, images)
    views, index, _ = _sampled_views(
        images, attention.detach(), uniforms.detach(), theta.detach(),
        None if offsets is None else offsets.detach(), EPS, float(padding), float(weight),
        float(floor), align_corners, backend,
    )  # fmt: skip
    return views, index


def _count(offsets: torch.Tensor | None) -> int:
    return 2 if offsets is None else 3


def _sampled_views_fake(
    images: torch.Tensor,
    attention: torch.Tensor,
    uniforms: torch.Tensor,
    theta: torch.Tensor,
    offsets: torch.Tensor | None,
    *_: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, count = attention.shape[0], _count(offsets)
    index = attention.new_empty((batch, count), dtype=torch.int64)
    boxes = attention.new_empty((count - 1, batch, 4), dtype=torch.int32)
    return empty_like_format(images, count), index, boxes


def _keep_sampled_views(ctx: Any, inputs: Any, output: tuple[torch.Tensor, ...]) -> None:
    _, index, boxes = output
    keep_views(ctx, inputs, index, boxes)
    ctx.mark_non_differentiable(index, boxes)


_sampled_views = define(
    _OPERATION,
    "sampled_views(Tensor images, Tensor attention, Tensor uniforms, Tensor theta,"
    " Tensor? offsets, float eps, float padding, float weight, float floor, bool align_corners,"
    " str backend) -> (Tensor, Tensor, Tensor)",
    _sampled_views_fake,
    setup_context=_keep_sampled_views,
    backward=differentiate_views,
)


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
        uniforms = _uniforms(attention, generator, uniforms)
        index = sample_attention(attention, uniforms[:, :3], backend=self.backend)
        return ViewDraws(index, scaled(uniforms[:, 3:6], self.ranges), uniforms[:, 6:])

    def forward(
        self,
        images: torch.Tensor,
        attention: torch.Tensor,
        *,
        generator: torch.Generator | None = None,
        uniforms: torch.Tensor | None = None,
        draws: ViewDraws | None = None,
        return_draws: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, ViewDraws]:
        """The views, and with `return_draws` also the draws; `draws` replays earlier ones.

        generator, uniforms: as for `draw`.
        """
        settings: dict[str, Any] = {
            "padding": self.padding,
            "weight": self.weight,
            "floor": self.floor,
            "align_corners": self.align_corners,
            "backend": self.backend,
        }
        if draws is not None:
            views = attention_views(images, attention, *draws, **settings)
        else:
            uniforms = _uniforms(attention, generator, uniforms)
            theta, offsets = scaled(uniforms[:, 3:6], self.ranges), uniforms[:, 6:]
            views, index = sampled_views(
                images, attention, uniforms[:, :3], theta, offsets, **settings
            )
            draws = ViewDraws(index, theta, offsets)
        return (views, draws) if return_draws else views

    def extra_repr(self) -> str:
        """The settings."""
        mixup, dim, patch = self.ranges
        return (
            f"mixup_theta={mixup}, dim_theta={dim}, patch_theta={patch}, "
            f"padding={self.padding}, weight={self.weight}, floor={self.floor}"
        )


def _uniforms(
    attention: torch.Tensor, generator: torch.Generator | None, given: torch.Tensor | None
) -> torch.Tensor:
    """(B, 8) float32: for the maps, the thresholds and the offsets of the patches."""
    shape = (attention.shape[0], 8)
    if given is None:
        return torch.rand(shape, generator=generator, device=attention.device)
    tensor("AttentionViews", "uniforms", given, shape, (torch.float32,), attention)
    return given


def scaled(uniforms: torch.Tensor, ranges: Sequence[tuple[float, float]]) -> torch.Tensor:
    """Columns of uniforms (B, V), each within its range (low, high)."""
    # One column at a time: a tensor of the ranges would be a copy from the host each step.
    columns = zip(uniforms.unbind(1), ranges, strict=True)
    return torch.stack([column * (high - low) + low for column, (low, high) in columns], 1)
