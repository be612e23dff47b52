"""The published training step: the raw image and three attention-guided views, one loss.

Four forward passes per step, each with its own batch statistics, or two where the views are merged
in one batch. Nothing here reads device memory: so the step can be traced, replayed and captured.
Source: Li et al., IEEE JBHI 2021 (arXiv 2012.02278).
"""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from magsd.config import LossConfig, ViewsConfig
from magsd.data import Part
from magsd_kernels import AttentionViews, SoftDistanceLoss


class StepResult(NamedTuple):
    """Scalars on the device; `loss` carries the gradient, `correct` counts right predictions."""

    loss: Tensor
    cross_entropy: Tensor
    distance: Tensor
    correct: Tensor


class Share(NamedTuple):
    """What one of several processes has of a batch.

    part: its images. cross_entropy, distance: factors of its two losses under which the mean of
    the processes' gradients is the gradient of the whole batch.
    """

    part: Part
    cross_entropy: float
    distance: float


class StepFunction(Protocol):
    """A training step of a model; the share where several processes have parts of the batch."""

    def __call__(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        generator: torch.Generator | None,
        share: Share | None = None,
        /,
    ) -> StepResult:
        """Forward passes and loss."""
        ...


def attention_step(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    generator: torch.Generator | None,
    share: Share | None = None,
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
    draws = None
    if share is not None:
        assert generator is not None, "processes that share a batch must draw alike"
        uniforms = share.part.uniform(len(images), 8, generator=generator)
        draws = views.draw(raw.attention, uniforms=uniforms)
    guided = views(images, raw.attention, generator=generator, draws=draws)
    if merged:
        view_logits = model(guided.flatten(0, 1)).logits.unflatten(0, guided.shape[:2])
    else:
        view_logits = [model(view).logits for view in guided]
    # Without weight there is no cross entropy (0 / 0), and its gradient would be as undefined.
    weightless = share is not None and not share.cross_entropy
    result = loss(raw.logits.detach() if weightless else raw.logits, view_logits, labels)
    correct = (raw.logits.detach().argmax(1) == labels).sum()
    if share is not None:
        entropy = _scaled(result.cross_entropy, share.cross_entropy, raw.logits)
        distance = result.distance * share.distance
        return StepResult(entropy + distance, entropy.detach(), distance.detach(), correct)
    return StepResult(result.loss, result.cross_entropy.detach(), result.distance.detach(), correct)


def plain_step(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    generator: torch.Generator | None = None,
    share: Share | None = None,
    *,
    class_weights: Tensor | None = None,
) -> StepResult:
    """One forward pass and cross entropy: the baseline on the same path. Nothing is drawn."""
    logits = model(images).logits.float()
    loss = nn.functional.cross_entropy(logits, labels, weight=class_weights)
    if share is not None:
        loss = _scaled(loss, share.cross_entropy, logits)
    correct = (logits.detach().argmax(1) == labels).sum()
    return StepResult(loss, loss.detach(), torch.zeros_like(loss.detach()), correct)


def _scaled(entropy: Tensor, factor: float, logits: Tensor) -> Tensor:
    """The cross entropy times its factor.

    Images whose classes all have weight 0 have none (0 / 0); they count for nothing in the whole
    batch, but their process must still take part in its backward.
    """
    return entropy * factor if factor else logits.float().sum() * 0


def make_step(
    model_name: str,
    views: ViewsConfig,
    loss: LossConfig,
    class_weights: Tensor | None,
    *,
    merged: bool = False,
) -> StepFunction:
    """The step that fits the model."""
    if model_name == "plain":
        return partial(plain_step, class_weights=class_weights)
    guided = AttentionViews(**asdict(views))
    distance = SoftDistanceLoss(
        confidence=loss.confidence, smoothing=loss.smoothing, class_weights=class_weights
    )
    return partial(attention_step, views=guided, loss=distance, merged=merged)
