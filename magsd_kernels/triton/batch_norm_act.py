"""Batch norm of several groups of a batch, residual addition and activation.

Two launches in training, one in evaluation. `_statistics_kernel`: every program writes mean and
squared deviations of its part of a group. `_apply_kernel`: every program combines the parts of its
own channels, normalizes, adds the residual and activates. The first programs write the statistics
instead, and update the running ones. `_batch_norm.py` says how the tensors are cut.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from magsd_kernels._layout import (
    accumulation_dtype,
    dense,
    empty_like_format,
    is_channels_last,
)
from magsd_kernels.triton._batch_norm import (
    by_channel,
    channels_of,
    combined,
    count_of,
    load_parts,
    normalization,
    plan,
    program_of,
    sigmoid,
    store_part,
    tile_at,
    tiles_of,
    to_lanes,
)
from magsd_kernels.triton._batch_norm_backward import batch_norm_act_backward
from magsd_kernels.triton._common import tunable, with_warps

__all__ = ["batch_norm_act", "batch_norm_act_backward"]


@tunable(
    [*with_warps(8, registers=128, STAGES=4), *with_warps(8, registers=128, STAGES=1)], ["sizes"]
)
@triton.jit
def _statistics_kernel(
    x, parts, sizes, units, UNITS: tl.constexpr, ROWS: tl.constexpr, PLANES: tl.constexpr,
    SPAN: tl.constexpr, PARTS: tl.constexpr, STAGES: tl.constexpr, INDEX: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Mean and squared deviations of every part -> parts (groups, parts, 2, C)."""
    block, _, _, begin, end = program_of(tl.program_id(0), sizes)
    at, inside = tile_at(0, block, begin, end, sizes, units, UNITS, ROWS, PLANES, SPAN, INDEX)
    # A lane's first value is taken off the others. It is one of its values, so a far one costs no
    # more digits than it adds to the deviations.
    first = tl.load(x + at, mask=inside, other=0.0).to(ACC)
    total = tl.zeros(inside.shape, ACC)
    squares = tl.zeros(inside.shape, ACC)
    for i in tl.range(1, tiles_of(begin, end, sizes, ROWS), num_stages=STAGES):
        at, inside = tile_at(i, block, begin, end, sizes, units, UNITS, ROWS, PLANES, SPAN, INDEX)
        apart = tl.where(inside, tl.load(x + at, mask=inside, other=0.0).to(ACC) - first, 0.0)
        total += apart
        squares += apart * apart
    LANES: tl.constexpr = PLANES * SPAN
    lane = tl.arange(0, LANES)[None, :]
    row = tl.arange(0, ROWS)[:, None]
    rows = (tl.maximum(end - begin - row, 0) + (ROWS - 1)) // ROWS
    steps = (tl.maximum(PLANES * count_of(2, units, UNITS) - lane, 0) + (LANES - 1)) // LANES
    size = (rows * steps).to(ACC)
    apart = total / tl.maximum(size, 1.0)
    base, rest, deviations, count = combined(first, apart, squares - total * apart, size, 0)
    if SPAN > 1:
        base, rest, deviations, _ = combined(
            by_channel(base, units, UNITS, PLANES, SPAN),
            by_channel(rest, units, UNITS, PLANES, SPAN),
            by_channel(deviations, units, UNITS, PLANES, SPAN),
            by_channel(count, units, UNITS, PLANES, SPAN), 1,
        )  # fmt: skip
    store_part(base + rest, deviations, parts, tl.program_id(0), sizes, units, UNITS, PLANES)


@triton.jit
def _batch_statistics(
    parts, group, block, sizes, units, UNITS: tl.constexpr, PLANES: tl.constexpr,
    PARTS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Mean, biased variance and size (PLANES) of a group's channels, from its parts."""
    mean, deviations, present = load_parts(parts, group, block, sizes, units, UNITS, PLANES, PARTS)
    part = tl.arange(0, PARTS)[:, None]
    items = tl.minimum(tl.maximum(sizes[0] - part * sizes[2], 0), sizes[2])
    size = tl.where(present, (items * count_of(2, units, UNITS)).to(ACC), 0.0)
    base, rest, deviations, count = combined(mean, 0.0, deviations, size, 0)
    return base + rest, deviations / tl.maximum(count, 1.0), count


@triton.jit
def _rstd(variance, EPS: tl.constexpr):
    return 1.0 / tl.sqrt(variance + tl.full([], EPS, variance.dtype))


@triton.jit
def _updated(running, value, MOMENTUM: tl.constexpr):
    """(1 - momentum) running + momentum value, rounded once."""
    keep = tl.full([], 1 - MOMENTUM, value.dtype)
    take = tl.full([], MOMENTUM, value.dtype)
    return (keep * running.to(value.dtype) + take * value).to(running.dtype)


@triton.jit
def _write_statistics(
    parts, running_mean, running_var, mean_out, rstd_out, steps, block, groups, sizes, units,
    TRAINING: tl.constexpr, MOMENTUM: tl.constexpr, EPS: tl.constexpr, UNITS: tl.constexpr,
    PLANES: tl.constexpr, PARTS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Mean and 1 / standard deviation of a block's channels; in training the running statistics."""
    channel, present = channels_of(block, units, UNITS, PLANES)
    running_mean += channel * steps[2]
    running_var += channel * steps[3]
    all_mean = tl.load(running_mean, mask=present, other=0.0)
    all_variance = tl.load(running_var, mask=present, other=0.0)
    for group in range(groups):
        if TRAINING:
            mean, variance, count = _batch_statistics(
                parts, group, block, sizes, units, UNITS, PLANES, PARTS, ACC
            )
            unbiased = variance * (count / tl.maximum(count - 1.0, 1.0))
            all_mean = _updated(all_mean, mean, MOMENTUM)
            all_variance = _updated(all_variance, unbiased, MOMENTUM)
        else:
            mean, variance = all_mean.to(ACC), all_variance.to(ACC)
        to = group * count_of(1, units, UNITS) + channel
        tl.store(mean_out + to, mean, mask=present)
        tl.store(rstd_out + to, _rstd(variance, EPS), mask=present)
    if TRAINING:
        tl.store(running_mean, all_mean, mask=present)
        tl.store(running_var, all_variance, mask=present)


@triton.jit
def _apply(
    program, x, residual, out, parts, weight, bias, running_mean, running_var, steps,
    sizes, units, ACT: tl.constexpr, TRAINING: tl.constexpr, EPS: tl.constexpr,
    UNITS: tl.constexpr, ROWS: tl.constexpr, PLANES: tl.constexpr, SPAN: tl.constexpr,
    PARTS: tl.constexpr, STAGES: tl.constexpr, INDEX: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The result of one part."""
    block, _, group, begin, end = program_of(program, sizes)
    if TRAINING:
        mean, variance, _ = _batch_statistics(
            parts, group, block, sizes, units, UNITS, PLANES, PARTS, ACC
        )
    else:
        channel, present = channels_of(block, units, UNITS, PLANES)
        mean = tl.load(running_mean + channel * steps[2], mask=present, other=0.0).to(ACC)
        variance = tl.load(running_var + channel * steps[3], mask=present, other=0.0).to(ACC)
    factor, offset = normalization(
        mean, _rstd(variance, EPS), weight, bias, steps, block, units, UNITS, PLANES
    )
    mean = to_lanes(mean, units, UNITS, PLANES, SPAN)
    factor = to_lanes(factor, units, UNITS, PLANES, SPAN)
    offset = to_lanes(offset, units, UNITS, PLANES, SPAN)
    tiles = tiles_of(begin, end, sizes, ROWS)
    for i in tl.range(tiles, num_stages=STAGES):
        # From the end: what the statistics read last may still lie in the cache.
        at, inside = tile_at(
            tiles - 1 - i, block, begin, end, sizes, units, UNITS, ROWS, PLANES, SPAN, INDEX
        )
        value = (tl.load(x + at, mask=inside, other=0.0).to(ACC) - mean) * factor + offset
        if residual is not None:
            value += tl.load(residual + at, mask=inside, other=0.0).to(ACC)
        if ACT == "relu":
            value = tl.where(value <= 0, 0.0, value)  # NaN stays NaN.
        elif ACT == "silu":
            value *= sigmoid(value)
        tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)


# Not tuned, because it adds to the running statistics: timing would run it many times.
@tunable(with_warps(8, registers=128, STAGES=2), [], autotune=False)
@triton.jit
def _apply_kernel(
    x, residual, out, parts, weight, bias, running_mean, running_var, mean_out, rstd_out,
    steps, groups, sizes, units, ACT: tl.constexpr, TRAINING: tl.constexpr,
    MOMENTUM: tl.constexpr, EPS: tl.constexpr, UNITS: tl.constexpr, ROWS: tl.constexpr,
    PLANES: tl.constexpr, SPAN: tl.constexpr, PARTS: tl.constexpr, STAGES: tl.constexpr,
    INDEX: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0) - sizes[4]
    if program < 0:
        _write_statistics(
            parts, running_mean, running_var, mean_out, rstd_out, steps, tl.program_id(0), groups,
            sizes, units, TRAINING, MOMENTUM, EPS, UNITS, PLANES, PARTS, ACC,
        )  # fmt: skip
    else:
        _apply(
            program, x, residual, out, parts, weight, bias, running_mean, running_var, steps,
            sizes, units, ACT, TRAINING, EPS, UNITS, ROWS, PLANES, SPAN, PARTS, STAGES, INDEX,
            ACC,
        )  # fmt: skip


def batch_norm_act(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    running_mean: torch.Tensor,
    running_var: torch.Tensor,
    residual: torch.Tensor | None,
    groups: int,
    act: str,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Result like x, and the mean and 1 / standard deviation (groups, C) that it used.

    In training the running statistics are updated in place, group by group.
    """
    last = is_channels_last(x)
    x = dense(x, last)
    residual = None if residual is None else dense(residual, last)
    out = empty_like_format(x)
    dtype, channels = accumulation_dtype(x.dtype), x.shape[1]
    mean, rstd = (x.new_empty((groups, channels), dtype=dtype) for _ in range(2))
    training = training and x.shape[0] > 0
    cut = plan(x, groups)
    parts = None
    if training:
        parts = x.new_empty((groups, cut.parts, 2, channels), dtype=dtype)
        # It keeps three numbers of every element, and has half the tile.
        rows = max(cut.rows // 2, 1)
        _statistics_kernel[(cut.programs,)](x, parts, **(cut.arguments | {"ROWS": rows}))
    norm = (weight, bias, running_mean, running_var)
    _apply_kernel[(cut.blocks + cut.programs,)](
        x, residual, out, parts, *norm, mean, rstd, tuple(v.stride(0) for v in norm), groups,
        ACT=act, TRAINING=training, MOMENTUM=momentum, EPS=eps, **cut.arguments,
    )  # fmt: skip
    return out, mean, rstd
