"""Soft distance loss of MAG-SD (Li et al., arXiv 2012.02278), forward and backward.

A few hundred numbers at the sizes of a classifier, so that launches decide: one forward, one
backward. The forward is one program that walks over the rows and adds up in a fixed order. Where
that would take many turns, several programs each leave their sums, and a second launch adds these
up in a fixed order too. The backward cuts the rows among programs and computes every softmax again
instead of storing it. View logits come as V matrices (B, K) or one (V, B, K), of any strides, and
are read in place: a group of views is a pointer, their number and the step from view to view.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from magsd_kernels._layout import accumulation_dtype
from magsd_kernels.triton._common import accumulation, block, tile, tunable, with_warps

_TILE = 512  # logits in flight; of more, one warp spills
_MOST_GROUPS = 16  # every group is a loop of its own in the compiled kernel
_MOST_TURNS = 4  # of one program over tiles of rows
_MOST_PROGRAMS = 256
_CONFIGS = with_warps(4, 1, 8)
_KEY = ["classes", "ROWS"]


@triton.jit
def _softmax(logits, rows, columns, classes, steps, ACC: tl.constexpr):
    """Probabilities of a tile of rows, the centered logits, and the logarithm of their sum."""
    at = logits + rows[:, None].to(tl.int64) * steps[0] + columns[None, :] * steps[1]
    inside = columns[None, :] < classes
    upcast = tl.load(at, mask=inside, other=-float("inf")).to(ACC)
    centered = upcast - tl.max(upcast, 1)[:, None]
    power = tl.where(inside, tl.exp(centered), 0.0)
    total = tl.sum(power, 1)
    return power / total[:, None], centered, tl.log(total)


@triton.jit
def _soften(probabilities, columns, target, CONFIDENCE: tl.constexpr, OFF: tl.constexpr,
            ON: tl.constexpr):  # fmt: skip
    """The prediction where it is right and confident, else the smoothed target."""
    top = tl.max(probabilities, 1)
    # The first class that has the maximum; none has it in a row of NaN, which is not kept.
    highest = probabilities == top[:, None]
    predicted = tl.min(tl.where(highest, columns[None, :], probabilities.shape[1]), 1)
    keep = (predicted == target) & (top >= CONFIDENCE)
    # A bare constant would be float32.
    on = tl.full(probabilities.shape, ON, probabilities.dtype)
    off = tl.full(probabilities.shape, OFF, probabilities.dtype)
    smooth = tl.where(columns[None, :] == target[:, None], on, off)
    return tl.where(keep[:, None], probabilities, smooth)


@triton.jit
def _targets(targets, class_weights, rows, classes, steps, ACC: tl.constexpr):
    """Which targets name a class, the targets with the others set to 0, and their weights."""
    target = tl.load(targets + rows * steps[0])
    valid = (target >= 0) & (target < classes)
    safe = tl.where(valid, target, 0).to(tl.int32)
    if class_weights is None:
        weight = tl.full(rows.shape, 1.0, ACC)
    else:
        weight = tl.load(class_weights + safe * steps[1]).to(ACC)
    return valid, safe, weight


@tunable(_CONFIGS, _KEY)
@triton.jit
def _forward_kernel(
    logits, groups, targets, class_weights, parts, loss, cross_entropy, distance, batch, classes,
    steps, target_steps, group_steps, group_views,
    CONFIDENCE: tl.constexpr, OFF: tl.constexpr, ON: tl.constexpr,
    ROWS: tl.constexpr, CLASSES: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, CLASSES)
    entropies = tl.zeros([ROWS], ACC)
    weights = tl.zeros([ROWS], ACC)
    distances = tl.zeros([ROWS], ACC)
    for start in range(tl.program_id(0) * ROWS, batch, tl.num_programs(0) * ROWS):
        given = start + tl.arange(0, ROWS)
        present = given < batch
        rows = tl.minimum(given, batch - 1)
        valid, target, weight = _targets(targets, class_weights, rows, classes, target_steps, ACC)
        raw, centered, log_total = _softmax(logits, rows, columns, classes, steps, ACC)
        own = tl.sum(tl.where(columns[None, :] == target[:, None], centered, 0.0), 1)
        entropy = tl.where(valid, (log_total - own) * weight, float("nan"))
        entropies += tl.where(present, entropy, 0.0)
        weights += tl.where(present, weight, 0.0)
        soft = _soften(raw, columns, target, CONFIDENCE, OFF, ON)
        for group in tl.static_range(len(groups)):
            for v in range(group_views[group][0]):
                view = groups[group] + v * group_views[group][1]
                seen, _, _ = _softmax(view, rows, columns, classes, group_steps[group], ACC)
                apart = tl.where(columns[None, :] < classes, tl.abs(soft - seen), 0.0)
                distances += tl.where(present, tl.sum(apart, 1), 0.0)
    sums = tl.sum(entropies, 0), tl.sum(weights, 0), tl.sum(distances, 0)
    if parts is None:
        _leave(sums[0], sums[1], sums[2], loss, cross_entropy, distance, batch, classes)
    else:
        for i in tl.static_range(3):
            tl.store(parts + i * tl.num_programs(0) + tl.program_id(0), sums[i])


@triton.jit
def _leave(entropy, weight, apart, loss, cross_entropy, distance, batch, classes):
    """The three scalars from the sums over all rows."""
    # Over an empty batch both are 0 / 0, NaN, as torch's means are.
    of_raw = entropy / weight
    of_views = apart / (batch * classes)
    tl.store(loss, of_raw + of_views)
    tl.store(cross_entropy, of_raw)
    tl.store(distance, of_views)


@triton.jit
def _combine_kernel(
    parts, loss, cross_entropy, distance, programs, batch, classes, PROGRAMS: tl.constexpr
):
    at = tl.arange(0, PROGRAMS)
    inside = at < programs
    entropy = tl.sum(tl.load(parts + at, mask=inside, other=0.0), 0)
    weight = tl.sum(tl.load(parts + programs + at, mask=inside, other=0.0), 0)
    apart = tl.sum(tl.load(parts + 2 * programs + at, mask=inside, other=0.0), 0)
    _leave(entropy, weight, apart, loss, cross_entropy, distance, batch, classes)


@triton.jit
def _add_scalar(total, grad):
    if grad is not None:
        total += tl.load(grad).to(total.dtype)
    return total


@tunable(_CONFIGS, _KEY)
@triton.jit
def _backward_kernel(
    grad_loss, grad_cross_entropy, grad_distance, logits, groups, targets, class_weights,
    grad_logits, grad_groups, batch, classes,
    steps, target_steps, group_steps, group_views,
    CONFIDENCE: tl.constexpr, OFF: tl.constexpr, ON: tl.constexpr,
    ROWS: tl.constexpr, CLASSES: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, CLASSES)
    of_loss = _add_scalar(tl.zeros([], ACC), grad_loss)
    of_entropy = _add_scalar(of_loss, grad_cross_entropy)
    if class_weights is None:
        of_entropy /= batch
    else:
        total = tl.zeros([ROWS], ACC)
        for start in range(0, batch, ROWS):
            given = start + tl.arange(0, ROWS)
            _, _, weight = _targets(
                targets, class_weights, tl.minimum(given, batch - 1), classes, target_steps, ACC,
            )  # fmt: skip
            total += tl.where(given < batch, weight, 0.0)
        of_entropy /= tl.sum(total, 0)
    step = _add_scalar(of_loss, grad_distance) / (batch * classes)

    given = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    rows = tl.minimum(given, batch - 1)
    written = (given < batch)[:, None] & (columns < classes)[None, :]
    at = given[:, None].to(tl.int64) * classes + columns[None, :]
    valid, target, weight = _targets(targets, class_weights, rows, classes, target_steps, ACC)
    raw, _, _ = _softmax(logits, rows, columns, classes, steps, ACC)
    factor = tl.where(valid, of_entropy * weight, float("nan"))
    grad = (raw - (columns[None, :] == target[:, None]).to(ACC)) * factor[:, None]
    tl.store(grad_logits + at, grad.to(grad_logits.dtype.element_ty), mask=written)
    soft = _soften(raw, columns, target, CONFIDENCE, OFF, ON)
    for group in tl.static_range(len(groups)):
        for v in range(group_views[group][0]):
            view = groups[group] + v * group_views[group][1]
            seen, _, _ = _softmax(view, rows, columns, classes, group_steps[group], ACC)
            # d|view - soft| / d view is a sign; softmax's Jacobian takes its weighted mean away.
            sign = ((seen > soft).to(ACC) - (seen < soft).to(ACC)) * step
            mean = tl.sum(tl.where(columns[None, :] < classes, seen * sign, 0.0), 1)
            grad = seen * (sign - mean[:, None])
            to = grad_groups[group] + v * batch * classes + at
            tl.store(to, grad.to(grad_logits.dtype.element_ty), mask=written)


def soft_distance_loss(
    logits: torch.Tensor,
    view_logits: list[torch.Tensor],
    targets: torch.Tensor,
    class_weights: torch.Tensor | None,
    confidence: float,
    smoothing: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scalars loss, cross entropy and distance. view_logits: one (V, B, K) or V of (B, K)."""
    dtype = accumulation_dtype(logits.dtype)
    loss, cross_entropy, distance = (logits.new_empty((), dtype=dtype) for _ in range(3))
    views = _few(view_logits)
    settings = _settings(logits, confidence, smoothing)
    tiles = triton.cdiv(logits.shape[0], settings["ROWS"])
    programs = 1 if tiles <= _MOST_TURNS else min(tiles, _MOST_PROGRAMS)
    parts = None if programs == 1 else logits.new_empty((3, programs), dtype=dtype)
    _forward_kernel[(programs,)](
        logits, tuple(views), targets, class_weights, parts, loss, cross_entropy, distance,
        *_sizes(logits, views, targets, class_weights), **settings,
    )  # fmt: skip
    if parts is not None:
        _combine_kernel[(1,)](
            parts, loss, cross_entropy, distance, programs, *logits.shape,
            PROGRAMS=triton.next_power_of_2(programs),
        )  # fmt: skip
    return loss, cross_entropy, distance


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
    grad = logits.new_empty(logits.shape)
    views = _few(view_logits)
    grads = [view.new_empty(view.shape) for view in views]
    if logits.shape[0] > 0:
        settings = _settings(logits, confidence, smoothing)
        _backward_kernel[(triton.cdiv(logits.shape[0], settings["ROWS"]),)](
            grad_loss, grad_cross_entropy, grad_distance, logits, tuple(views), targets,
            class_weights, grad, tuple(grads), *_sizes(logits, views, targets, class_weights),
            **settings,
        )  # fmt: skip
    if len(views) != len(view_logits):
        grads = [each.clone() for each in grads[0]]
    return grad, grads


def _few(view_logits: list[torch.Tensor]) -> list[torch.Tensor]:
    return view_logits if len(view_logits) <= _MOST_GROUPS else [torch.stack(view_logits)]


def _sizes(
    logits: torch.Tensor,
    views: list[torch.Tensor],
    targets: torch.Tensor,
    class_weights: torch.Tensor | None,
) -> tuple[object, ...]:
    stacked = views[0].dim() == 3
    return (
        *logits.shape, logits.stride(),
        (targets.stride(0), 0 if class_weights is None else class_weights.stride(0)),
        tuple(view.stride()[-2:] for view in views),
        tuple((view.shape[0], view.stride(0)) if stacked else (1, 0) for view in views),
    )  # fmt: skip


def _settings(logits: torch.Tensor, confidence: float, smoothing: float) -> dict[str, object]:
    batch, classes = logits.shape
    columns = triton.next_power_of_2(classes)
    # With more in float64 the constants of its functions do not fit into AMD's scalar registers.
    most = tile(64) if logits.dtype == torch.float64 else _TILE
    return {
        "CONFIDENCE": confidence,
        "OFF": smoothing,
        "ON": 1 - classes * smoothing,
        "ROWS": block(batch, max(most // columns, 1)),
        "CLASSES": columns,
        "ACC": accumulation(logits.dtype),
    }
