"""Soft distance loss: cross entropy of the raw image, and the distance of the views from it.

Source: Li et al., MAG-SD, IEEE JBHI 2021 (arXiv 2012.02278), and its released code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from magsd_kernels import _checks as check
from magsd_kernels._layout import accumulation_dtype
from magsd_kernels.backends import select
from magsd_kernels.registry import define

_OPERATION = "soft_distance"
_FEW_TARGETS = 128


class SoftDistance(NamedTuple):
    """Scalars of the soft distance loss; loss = cross_entropy + distance."""

    loss: torch.Tensor
    cross_entropy: torch.Tensor
    distance: torch.Tensor


def soft_distance_loss(
    logits: torch.Tensor,
    view_logits: torch.Tensor | Sequence[torch.Tensor],
    targets: torch.Tensor,
    *,
    confidence: float = 0.7,
    smoothing: float = 0.01,
    class_weights: torch.Tensor | None = None,
    backend: str | None = None,
) -> SoftDistance:
    """cross_entropy(logits) + sum over views of mean |p - softmax(view)|.

    p = softmax(logits) without gradient; a row whose argmax differs from its target or whose
    maximum is under `confidence` is replaced by `smoothing` everywhere and 1 - K smoothing on
    the target (choose smoothing below 1 / K).

    Args:
        logits: (B, K), floating.
        view_logits: (V, B, K), or a sequence of V tensors (B, K), of the same dtype.
        targets: (B,) int64 in 0..K-1. Another value is an IndexError on the CPU and gives a NaN
            loss on a GPU.
        confidence, smoothing: in 0..1.
        class_weights: (K,) of the logits' dtype or float32; weight the cross entropy as in torch.
        backend: name of a backend, see `use_backend`.

    Returns:
        Scalars, float32 (float64 for float64). Over an empty batch they are NaN, as torch's mean.
    """
    op = "soft_distance_loss"
    check.tensor(op, "logits", logits, (None, check.FILLED))
    batch, classes = logits.shape
    if isinstance(view_logits, torch.Tensor):
        stacked = (None, batch, classes)
        check.tensor(op, "view_logits", view_logits, stacked, (logits.dtype,), logits)
        views, count = [view_logits], view_logits.shape[0]
    else:
        check.sequence(op, "view_logits", view_logits)
        check.tensors(op, "view_logits", view_logits, (batch, classes), (logits.dtype,), logits)
        views, count = list(view_logits), len(view_logits)
    if count == 0:
        raise ValueError(f"{op}: view_logits must have at least one view, got none")
    check.tensor(op, "targets", targets, (batch,), (torch.int64,), logits)
    check.number(op, "confidence", confidence, 0, 1)
    check.number(op, "smoothing", smoothing, 0, 1)
    if class_weights is not None:
        dtypes = (logits.dtype, torch.float32)
        check.tensor(op, "class_weights", class_weights, (classes,), dtypes, logits)
    backend = select(_OPERATION, backend, logits)
    return SoftDistance(
        *_loss(logits, views, targets, class_weights, confidence, smoothing, backend)
    )


class SoftDistanceLoss(nn.Module):
    """`soft_distance_loss` as a module; the arguments are those of the function.

    Shapes: forward takes logits (B, K), view_logits (V, B, K) and targets (B,), returns scalars.
    """

    class_weights: torch.Tensor | None

    def __init__(
        self,
        *,
        confidence: float = 0.7,
        smoothing: float = 0.01,
        class_weights: torch.Tensor | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.confidence = confidence
        self.smoothing = smoothing
        self.backend = backend
        self.register_buffer("class_weights", class_weights)

    def forward(
        self,
        logits: torch.Tensor,
        view_logits: torch.Tensor | Sequence[torch.Tensor],
        targets: torch.Tensor,
    ) -> SoftDistance:
        """Loss, cross entropy and distance."""
        return soft_distance_loss(
            logits,
            view_logits,
            targets,
            confidence=self.confidence,
            smoothing=self.smoothing,
            class_weights=self.class_weights,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        """The settings."""
        return f"confidence={self.confidence}, smoothing={self.smoothing}"


def _check_targets(inputs: Any) -> None:
    """On the CPU, where reading memory costs nothing; a GPU answers with a NaN loss."""
    targets, classes = inputs.targets, inputs.logits.shape[1]
    count = targets.numel()
    if count == 0 or targets.device.type != "cpu":
        return
    if count <= _FEW_TARGETS:
        values = targets.tolist()  # in less time than a reduction needs to start
        low, high = min(values), max(values)
    else:
        low, high = (int(bound) for bound in targets.aminmax())
    if low < 0 or high >= classes:
        found = low if low < 0 else high
        raise IndexError(f"soft_distance_loss: targets must be in 0..{classes - 1}, got {found}")


def _loss_fake(logits: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dtype = accumulation_dtype(logits.dtype)
    loss, cross_entropy, distance = (logits.new_empty((), dtype=dtype) for _ in range(3))
    return loss, cross_entropy, distance


def _loss_backward_fake(
    grad_loss: torch.Tensor | None,
    grad_cross_entropy: torch.Tensor | None,
    grad_distance: torch.Tensor | None,
    logits: torch.Tensor,
    view_logits: Sequence[torch.Tensor],
    *_: Any,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    return logits.new_empty(logits.shape), [view.new_empty(view.shape) for view in view_logits]


def _keep_loss(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(inputs.logits, inputs.targets, inputs.class_weights, *inputs.view_logits)
    ctx.set_materialize_grads(False)
    names = ("confidence", "smoothing", "backend")
    ctx.settings = {name: getattr(inputs, name) for name in names}


def _differentiate_loss(ctx: Any, *grads: torch.Tensor | None) -> dict[str, Any]:
    logits, targets, class_weights, *views = ctx.saved_tensors
    grad_logits, grad_views = _loss_backward(
        *grads, logits, views, targets, class_weights, **ctx.settings
    )
    return {"logits": grad_logits, "view_logits": grad_views}


_loss = define(
    _OPERATION,
    "soft_distance_loss(Tensor logits, Tensor[] view_logits, Tensor targets,"
    " Tensor? class_weights, float confidence, float smoothing, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    _loss_fake,
    setup_context=_keep_loss,
    backward=_differentiate_loss,
    check=_check_targets,
)
_loss_backward = define(
    _OPERATION,
    "soft_distance_loss_backward(Tensor? grad_loss, Tensor? grad_cross_entropy,"
    " Tensor? grad_distance, Tensor logits, Tensor[] view_logits, Tensor targets,"
    " Tensor? class_weights, float confidence, float smoothing, str backend)"
    " -> (Tensor, Tensor[])",
    _loss_backward_fake,
)
