"""The published training steps: the raw image and its attention-guided views, one loss.

A forward pass for the image and one for each view, or one for all views together, each with its own
batch statistics. Nothing here reads device memory: so the step can be traced,
replayed and captured. Sources: Li et al., IEEE JBHI 2021 (arXiv 2012.02278); Hu et al., WS-DAN
(arXiv 1901.09891).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from magsd.data import Loader, Part
from magsd.errors import ConfigError
from magsd.models import ClassifierOutput
from magsd_kernels import SoftDistance, SoftDistanceLoss, norm_groups, soft_distance_loss


class StepResult(NamedTuple):
    """Scalars on the device; `loss` carries the gradient, `correct` counts right predictions.

    distance: what is added to the cross entropy, the soft distance or that to the centers.
    """

    loss: Tensor
    cross_entropy: Tensor
    distance: Tensor
    correct: Tensor


def _as_it_is(values: Tensor) -> Tensor:
    return values


class BatchShard(NamedTuple):
    """What one of several processes has of a batch.

    part: its images. cross_entropy, distance: factors of its two losses under which the mean of
    the processes' gradients is the gradient of the whole batch; the first may change from batch to
    batch, and is a scalar on the device where a recorded step reads it. total: adds a tensor up
    over the processes.
    """

    part: Part
    cross_entropy: float | Tensor
    distance: float
    total: Callable[[Tensor], Tensor] = _as_it_is


class StepFunction(Protocol):
    """A training step of a model; the shard where several processes have parts of the batch."""

    def __call__(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        generator: torch.Generator | None,
        shard: BatchShard | None = None,
        /,
    ) -> StepResult:
        """Forward passes and loss."""
        ...


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


class ViewLoss(Protocol):
    """Loss of the predictions of a batch and of its views, each (B, K)."""

    def __call__(
        self, logits: Tensor, view_logits: Sequence[Tensor], targets: Tensor, /
    ) -> SoftDistance:
        """The whole loss, its cross entropy, and what it adds to that."""
        ...


class OutputLoss(Protocol):
    """What a method adds to the loss, of what the network says of the images themselves."""

    def __call__(
        self,
        model: nn.Module,
        output: ClassifierOutput,
        labels: Tensor,
        total: Callable[[Tensor], Tensor],
        /,
    ) -> Tensor:
        """A scalar with gradient. `total` adds a tensor up over the processes of the batch."""
        ...


def countable(class_weights: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Weights (K,) under which the mean over the targets exists, and whether it counts.

    Where all targets weigh nothing the mean would be 0 / 0, NaN in value and gradient: the weights
    are then 1, and the factor, a bool scalar on the device, makes value and gradient 0.
    """
    counts = class_weights.index_select(0, targets).sum() != 0
    return class_weights + ~counts, counts


def class_weights(choice: str | list[float], loader: Loader) -> Tensor | None:
    """Weights (K,) float32 of the cross entropy, on the host, or None.

    "balanced": images / (classes * images of the class).
    """
    if choice == "none":
        return None
    classes = loader.classes
    if isinstance(choice, str):
        counts = torch.tensor(loader.class_counts(), dtype=torch.float64)
        weights = loader.count / (len(classes) * counts.clamp(min=1))
    elif len(choice) != len(classes):
        raise ConfigError(
            f"loss.class_weights has {len(choice)} numbers; the classes are {', '.join(classes)}"
        )
    else:
        weights = torch.tensor(choice, dtype=torch.float64)
    return weights.to(torch.float32)


def cross_entropy(logits: Tensor, targets: Tensor, class_weights: Tensor | None) -> Tensor:
    """Cross entropy of logits (B, K), in float32 or, of float64, in that.

    0 where the classes of all targets have weight 0.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if class_weights is None:
        return nn.functional.cross_entropy(logits, targets)
    weights, counts = countable(class_weights.to(logits.dtype), targets)
    return nn.functional.cross_entropy(logits, targets, weight=weights) * counts


class MeanCrossEntropy(nn.Module):
    """Mean of the cross entropies of the images and of each of their views."""

    class_weights: Tensor | None

    def __init__(self, class_weights: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("class_weights", class_weights)

    def forward(
        self, logits: Tensor, view_logits: Sequence[Tensor], targets: Tensor
    ) -> SoftDistance:
        """See `ViewLoss`."""
        entropies = [
            cross_entropy(each, targets, self.class_weights) for each in (logits, *view_logits)
        ]
        entropy = torch.stack(entropies).mean()
        return SoftDistance(entropy, entropy, torch.zeros_like(entropy))


class CountableSoftDistance(SoftDistanceLoss):
    """The soft distance loss, its cross entropy 0 where all targets' classes have weight 0."""

    def forward(
        self, logits: Tensor, view_logits: Tensor | Sequence[Tensor], targets: Tensor
    ) -> SoftDistance:
        """See `ViewLoss`."""
        if self.class_weights is None:
            return super().forward(logits, view_logits, targets)
        weights, counts = countable(self.class_weights, targets)
        _, entropy, distance = soft_distance_loss(
            logits,
            view_logits,
            targets,
            confidence=self.confidence,
            smoothing=self.smoothing,
            class_weights=weights,
            backend=self.backend,
        )
        entropy = entropy * counts
        return SoftDistance(entropy + distance, entropy, distance)


def attention_step(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    generator: torch.Generator | None,
    shard: BatchShard | None = None,
    *,
    views: GuidedViews,
    loss: ViewLoss,
    added: OutputLoss | None = None,
    passes: Literal["grouped", "separate", "merged"] = "separate",
) -> StepResult:
    """Forward passes and loss of an attention model.

    images (B, C, H, W), labels (B,) int64; the generator, on their device, draws the views.
    passes: the V views go "separate", or as one batch of V B images: "grouped", each with its own
    batch statistics, which gives what separate passes give, where `model.takes_groups` (else they
    pass separately); or "merged", with batch statistics over all views, and running statistics that
    move twice a step instead of V + 1 times.
    `added` counts as a part of the distance.
    """
    raw: ClassifierOutput = model(images)
    assert raw.attention is not None, "a model without attention has no views"
    if shard is None:
        shape = (len(images), views.uniforms_per_image)
        uniforms = torch.rand(shape, generator=generator, device=images.device)
    else:
        assert generator is not None, "processes that share a batch must draw alike"
        uniforms = shard.part.uniform(len(images), views.uniforms_per_image, generator=generator)
    guided = views(images, raw.attention, uniforms)
    if passes == "separate" or (passes == "grouped" and not getattr(model, "takes_groups", False)):
        view_logits = [model(view).logits for view in guided]
    else:
        batch = guided.flatten(0, 1) if isinstance(guided, Tensor) else torch.cat(list(guided))
        with norm_groups(len(guided) if passes == "grouped" else 1):
            view_logits = list(model(batch).logits.chunk(len(guided)))
    result = loss(raw.logits, view_logits, labels)
    correct = (raw.logits.detach().argmax(1) == labels).sum()
    entropy, distance = result.cross_entropy, result.distance
    if added is not None:
        total = _as_it_is if shard is None else shard.total
        distance = distance + added(model, raw, labels, total)
    if shard is not None:
        entropy = entropy * shard.cross_entropy
        distance = distance * shard.distance
    return StepResult(entropy + distance, entropy.detach(), distance.detach(), correct)


def plain_step(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    generator: torch.Generator | None = None,
    shard: BatchShard | None = None,
    *,
    class_weights: Tensor | None = None,
) -> StepResult:
    """One forward pass and cross entropy: the baseline on the same path. Nothing is drawn."""
    logits = model(images).logits
    loss = cross_entropy(logits, labels, class_weights)
    if shard is not None:
        loss = loss * shard.cross_entropy
    correct = (logits.detach().argmax(1) == labels).sum()
    return StepResult(loss, loss.detach(), torch.zeros_like(loss.detach()), correct)
