"""The published training step: the raw image and three attention-guided views, one loss.

Four forward passes per step, each with its own batch statistics. Nothing here reads device memory:
every random number comes in as a tensor, so the step can be traced, replayed and captured.
Source: Li et al., IEEE JBHI 2021 (arXiv 2012.02278).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from magsd.config import LossConfig, ViewsConfig
from magsd_kernels import attention_views, sample_attention, soft_distance_loss

VIEWS = 3
DRAWS = 2 * VIEWS + 2


class StepResult(NamedTuple):
    """Scalars on the device; `loss` has the gradient, `correct` counts right raw predictions."""

    loss: Tensor
    cross_entropy: Tensor
    distance: Tensor
    correct: Tensor


StepFunction = Callable[[nn.Module, Tensor, Tensor, Tensor], StepResult]


def draw(batch: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
    """Uniforms in [0, 1), (B, 8) float32: three map choices, three thresholds, the paste offset."""
    return torch.rand((batch, DRAWS), generator=generator, device=device)


def view_thetas(uniforms: Tensor, views: ViewsConfig) -> Tensor:
    """Thresholds (B, 3) for mix-up, dim and patch from uniforms (B, 3)."""
    ranges = (views.mixup_theta, views.dim_theta, views.patch_theta)
    # One column per view: a tensor built from the ranges would be a copy from host memory.
    columns = [uniforms[:, i] * (high - low) + low for i, (low, high) in enumerate(ranges)]
    return torch.stack(columns, dim=1)


def guided_views(images: Tensor, attention: Tensor, draws: Tensor, views: ViewsConfig) -> Tensor:
    """Mix-up, dim and patch views (3, B, C, H, W) of `images`, guided by maps (B, M, h, w)."""
    attention = attention.detach()
    index = sample_attention(attention, draws[:, :VIEWS])
    return attention_views(
        images,
        attention,
        index,
        view_thetas(draws[:, VIEWS : 2 * VIEWS], views),
        draws[:, 2 * VIEWS :],
        padding=views.padding,
        weight=views.weight,
        floor=views.floor,
    )


def attention_step(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    draws: Tensor,
    *,
    views: ViewsConfig,
    loss: LossConfig,
    class_weights: Tensor | None = None,
) -> StepResult:
    """Forward passes and loss of an attention model; images (B, C, H, W), labels (B,) int64."""
    raw = model(images)
    guided = guided_views(images, raw.attention, draws, views)
    view_logits = torch.stack([model(view).logits for view in guided])
    result = soft_distance_loss(
        raw.logits,
        view_logits,
        labels,
        confidence=loss.confidence,
        smoothing=loss.smoothing,
        class_weights=class_weights,
    )
    correct = (raw.logits.detach().argmax(1) == labels).sum()
    return StepResult(result.loss, result.cross_entropy.detach(), result.distance.detach(), correct)


def plain_step(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    draws: Tensor | None = None,
    *,
    class_weights: Tensor | None = None,
) -> StepResult:
    """One forward pass and cross entropy: the baseline on the same path."""
    logits = model(images).logits.float()
    loss = nn.functional.cross_entropy(logits, labels, weight=class_weights)
    correct = (logits.detach().argmax(1) == labels).sum()
    return StepResult(loss, loss.detach(), torch.zeros_like(loss.detach()), correct)


def make_step(
    model_name: str, views: ViewsConfig, loss: LossConfig, class_weights: Tensor | None
) -> StepFunction:
    """The step that fits the model: `step(model, images, labels, draws) -> StepResult`."""
    if model_name == "plain":

        def step(model: nn.Module, images: Tensor, labels: Tensor, draws: Tensor) -> StepResult:
            return plain_step(model, images, labels, class_weights=class_weights)
    else:

        def step(model: nn.Module, images: Tensor, labels: Tensor, draws: Tensor) -> StepResult:
            return attention_step(
                model,
                images,
                labels,
                draws,
                views=views,
                loss=loss,
                class_weights=class_weights,
            )

    return step
