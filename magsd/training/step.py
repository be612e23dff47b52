"""The published training step: the raw image and three attention-guided views, one loss.

Four forward passes per step, each with its own batch statistics, or two where the views are merged
in one batch. Nothing here reads device memory: so the step can be traced, replayed and captured.
Source: Li et al., IEEE JBHI 2021 (arXiv 2012.02278).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import NamedTuple

import torch
from torch import Tensor, nn

from magsd.config import LossConfig, ViewsConfig
from magsd_kernels import AttentionViews, SoftDistanceLoss


class StepResult(NamedTuple):
    """Scalars on the device; `loss` carries the gradient, `correct` counts right predictions."""

    loss: Tensor
    cross_entropy: Tensor
    distance: Tensor
    correct: Tensor


StepFunction = Callable[[nn.Module, Tensor, Tensor, "torch.Generator | None"], StepResult]


def attention_step(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    generator: torch.Generator | None,
    *,
    views: AttentionViews,
    loss: SoftDistanceLoss,
    merged: bool = False,
) -> StepResult:
    """Forward passes and loss of an attention model.

    images (B, C, H, W), labels (B,) int64; the generator, on their device, draws the views.
    With `merged` the views pass as one batch of 3 B images: one pass instead of three, batch
    statistics over all views, and running statistics that move twice a step instead of four times.
    """
    raw = model(images)
    guided = views(images, raw.attention, generator=generator)
    if merged:
        view_logits = model(guided.flatten(0, 1)).logits.unflatten(0, guided.shape[:2])
    else:
        view_logits = [model(view).logits for view in guided]
    result = loss(raw.logits, view_logits, labels)
    correct = (raw.logits.detach().argmax(1) == labels).sum()
    return StepResult(result.loss, result.cross_entropy.detach(), result.distance.detach(), correct)


def plain_step(
    model: nn.Module, images: Tensor, labels: Tensor, *, class_weights: Tensor | None = None
) -> StepResult:
    """One forward pass and cross entropy: the baseline on the same path."""
    logits = model(images).logits.float()
    loss = nn.functional.cross_entropy(logits, labels, weight=class_weights)
    correct = (logits.detach().argmax(1) == labels).sum()
    return StepResult(loss, loss.detach(), torch.zeros_like(loss.detach()), correct)


def make_step(
    model_name: str,
    views: ViewsConfig,
    loss: LossConfig,
    class_weights: Tensor | None,
    *,
    merged: bool = False,
) -> StepFunction:
    """The step that fits the model: `step(model, images, labels, generator) -> StepResult`."""
    if model_name == "plain":
        return lambda model, images, labels, generator: plain_step(
            model, images, labels, class_weights=class_weights
        )
    guided = AttentionViews(**asdict(views))
    distance = SoftDistanceLoss(
        confidence=loss.confidence, smoothing=loss.smoothing, class_weights=class_weights
    )
    return lambda model, images, labels, generator: attention_step(
        model, images, labels, generator, views=guided, loss=distance, merged=merged
    )
