"""Soft distance loss of MAG-SD (Li et al., arXiv 2012.02278)."""

from __future__ import annotations

import torch

from magsd_kernels._layout import accumulation_dtype


def soft_distance_loss(
    logits: torch.Tensor,
    view_logits: list[torch.Tensor],
    targets: torch.Tensor,
    class_weights: torch.Tensor | None,
    confidence: float,
    smoothing: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scalars loss, cross entropy and distance. view_logits: one (V, B, K) or V of (B, K)."""
    raw = logits.to(accumulation_dtype(logits.dtype))
    valid, weights, safe = _weights(raw, targets, class_weights)
    nll = -raw.log_softmax(1).gather(1, safe[:, None])[:, 0]
    cross_entropy = torch.where(valid, nll * weights, torch.nan).sum() / weights.sum()
    distance = (_soft_targets(raw, safe, confidence, smoothing) - _views(view_logits)).abs()
    # The mean over the batch and the classes, summed over the views.
    distance = distance.sum() / raw.numel()
    return cross_entropy + distance, cross_entropy, distance


def soft_distance_loss_backward(
    grad_loss: torch.Tensor | None,
    grad_cross_entropy: torch.Tensor | None,
    grad_distance: torch.Tensor | None,
    logits: torch.Tensor,
    view_logits: list[torch.Tensor],
    targets: torch.Tensor,
    class_weights: torch.Tensor | None,
    confidence: float,
    smoothing: float,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Gradients of the logits and of the view logits; a missing gradient counts as 0."""
    raw = logits.to(accumulation_dtype(logits.dtype))
    valid, weights, safe = _weights(raw, targets, class_weights)
    one_hot = torch.zeros_like(raw).scatter(1, safe[:, None], 1)
    factor = _total(grad_loss, grad_cross_entropy, raw) * weights / weights.sum()
    grad_raw = (raw.softmax(1) - one_hot) * torch.where(valid, factor, torch.nan)[:, None]

    views = _views(view_logits)
    sign = (views - _soft_targets(raw, safe, confidence, smoothing)).sign()
    step = sign * (_total(grad_loss, grad_distance, raw) / raw.numel())
    grad_views = views * (step - (views * step).sum(2, keepdim=True))
    grads = grad_views.to(logits.dtype).view(len(view_logits), *view_logits[0].shape)
    # An operator's results share no memory.
    return grad_raw.to(logits.dtype), [grad.clone() for grad in grads]


def _weights(
    raw: torch.Tensor, targets: torch.Tensor, class_weights: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Which targets name a class, their weights (B,), and the targets with the others set to 0."""
    valid = (targets >= 0) & (targets < raw.shape[1])
    safe = torch.where(valid, targets, 0)
    weights = torch.ones_like(raw[:, 0])
    if class_weights is not None:
        weights = class_weights.to(raw.dtype)[safe]
    return valid, weights, safe


def _soft_targets(
    raw: torch.Tensor, targets: torch.Tensor, confidence: float, smoothing: float
) -> torch.Tensor:
    """(B, K): the raw prediction where it is right and confident, else a smoothed target."""
    probabilities = raw.detach().softmax(1)
    top, predicted = probabilities.max(1)
    smooth = torch.full_like(probabilities, smoothing).scatter(
        1, targets[:, None], 1 - raw.shape[1] * smoothing
    )
    keep = (predicted == targets) & (top >= confidence)
    return torch.where(keep[:, None], probabilities, smooth)


def _views(view_logits: list[torch.Tensor]) -> torch.Tensor:
    """Probabilities (V, B, K) in the accumulation dtype."""
    stacked = view_logits[0] if view_logits[0].dim() == 3 else torch.stack(view_logits)
    return stacked.to(accumulation_dtype(stacked.dtype)).softmax(2)


def _total(
    first: torch.Tensor | None, second: torch.Tensor | None, like: torch.Tensor
) -> torch.Tensor:
    """Sum of two gradients of a scalar, either of which may be missing."""
    present = [grad for grad in (first, second) if grad is not None]
    return torch.stack(present).sum() if present else like.new_zeros(())
