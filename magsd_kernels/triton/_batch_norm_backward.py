"""Batch norm, residual addition and activation, backward.

Two launches. `_sums_kernel`: every program sums the gradient g before the activation, and g times
x - mean, over its part of a group; it writes g where the residual's gradient is needed.
`_gradient_kernel`: every program adds up the sums of its own channels and writes x's gradient; the
first programs write the parameters' gradients instead. In evaluation x's gradient needs no sums:
where the parameters' gradients are not needed, the second launch alone writes g, too.
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
from magsd_kernels.triton._common import tunable, with_warps


@triton.jit
def _statistics_of(mean, rstd, group, block, units, UNITS: tl.constexpr, PLANES: tl.constexpr):
    """(PLANES) mean and 1 / standard deviation of a group's channels."""
    channel, present = channels_of(block, units, UNITS, PLANES)
    at = group * count_of(1, units, UNITS) + channel
    return (
        tl.load(mean + at, mask=present, other=0.0),
        tl.load(rstd + at, mask=present, other=0.0),
    )


@triton.jit
def _before_activation(grad, apart, kept, at, inside, factor, offset, ACT: tl.constexpr):
    """The gradient of the sum that is activated. apart: x - mean."""
    back = tl.load(grad + at, mask=inside, other=0.0).to(apart.dtype)
    if ACT == "none":
        return back
    value = apart * factor + offset
    if kept is not None:
        other = tl.load(kept + at, mask=inside, other=0.0).to(apart.dtype)
        value = other if ACT == "relu" else value + other
    if ACT == "relu":
        return tl.where(value <= 0, 0.0, back)  # NaN lets it pass.
    share = sigmoid(value)
    return back * share * (1.0 + value * (1.0 - share))


@tunable(
    [*with_warps(8, registers=128, STAGES=2), *with_warps(8, registers=128, STAGES=1)], ["sizes"]
)
@triton.jit
def _sums_kernel(
    grad, x, kept, grad_residual, parts, weight, bias, mean, rstd, parameter_steps, sizes, units,
    ACT: tl.constexpr, UNITS: tl.constexpr, ROWS: tl.constexpr, PLANES: tl.constexpr,
    SPAN: tl.constexpr, PARTS: tl.constexpr, STAGES: tl.constexpr, INDEX: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Sums of g and of g (x - mean) of every part -> parts (groups, parts, 2, C); writes g."""
    block, _, group, begin, end = program_of(tl.program_id(0), sizes)
    center, scale = _statistics_of(mean, rstd, group, block, units, UNITS, PLANES)
    factor, offset = normalization(
        center, scale, weight, bias, parameter_steps, block, units, UNITS, PLANES
    )
    center = to_lanes(center, units, UNITS, PLANES, SPAN)
    factor = to_lanes(factor, units, UNITS, PLANES, SPAN)
    offset = to_lanes(offset, units, UNITS, PLANES, SPAN)
    plain = tl.zeros([ROWS, PLANES * SPAN], ACC)
    centered = tl.zeros([ROWS, PLANES * SPAN], ACC)
    for i in tl.range(tiles_of(begin, end, sizes, ROWS), num_stages=STAGES):
        at, inside = tile_at(i, block, begin, end, sizes, units, UNITS, ROWS, PLANES, SPAN, INDEX)
        apart = tl.load(x + at, mask=inside, other=0.0).to(ACC) - center
        back = _before_activation(grad, apart, kept, at, inside, factor, offset, ACT)
        plain += back
        centered += back * apart
        if grad_residual is not None:
            tl.store(grad_residual + at, back.to(grad_residual.dtype.element_ty), mask=inside)
    plain = by_channel(tl.sum(plain, 0), units, UNITS, PLANES, SPAN)
    centered = by_channel(tl.sum(centered, 0), units, UNITS, PLANES, SPAN)
    store_part(
        tl.sum(plain, 1), tl.sum(centered, 1), parts, tl.program_id(0), sizes, units, UNITS, PLANES
    )


@triton.jit
def _sums_of(
    parts, group, block, sizes, units, UNITS: tl.constexpr, PLANES: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """(PLANES) sums of a group's channels, in a fixed order."""
    plain, centered, _ = load_parts(parts, group, block, sizes, units, UNITS, PLANES, PARTS)
    return tl.sum(plain, 0), tl.sum(centered, 0)


@triton.jit
def _write_parameters(
    parts, grad_weight, grad_bias, mean, rstd, block, groups, sizes, units, UNITS: tl.constexpr,
    PLANES: tl.constexpr, PARTS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Gradients of weight and bias of a block's channels."""
    of_weight = tl.zeros([PLANES], ACC)
    of_bias = tl.zeros([PLANES], ACC)
    for group in range(groups):
        plain, centered = _sums_of(parts, group, block, sizes, units, UNITS, PLANES, PARTS)
        _, scale = _statistics_of(mean, rstd, group, block, units, UNITS, PLANES)
        of_weight += scale * centered
        of_bias += plain
    channel, present = channels_of(block, units, UNITS, PLANES)
    tl.store(grad_weight + channel, of_weight.to(grad_weight.dtype.element_ty), mask=present)
    tl.store(grad_bias + channel, of_bias.to(grad_bias.dtype.element_ty), mask=present)


@triton.jit
def _write_gradient(
    program, grad, x, kept, grad_x, grad_residual, parts, weight, bias, mean, rstd,
    parameter_steps, sizes, units, ACT: tl.constexpr, TRAINING: tl.constexpr,
    UNITS: tl.constexpr, ROWS: tl.constexpr, PLANES: tl.constexpr, SPAN: tl.constexpr,
    PARTS: tl.constexpr, STAGES: tl.constexpr, INDEX: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The gradients of one part of x and, where no sums were needed, of the residual."""
    block, _, group, begin, end = program_of(program, sizes)
    center, scale = _statistics_of(mean, rstd, group, block, units, UNITS, PLANES)
    factor, offset = normalization(
        center, scale, weight, bias, parameter_steps, block, units, UNITS, PLANES
    )
    if TRAINING:
        # Ioffe and Szegedy 2015: the batch's mean and variance depend on every element.
        plain, centered = _sums_of(parts, group, block, sizes, units, UNITS, PLANES, PARTS)
        count = tl.cast(sizes[0], ACC) * tl.cast(count_of(2, units, UNITS), ACC)
        plain = to_lanes(plain / count, units, UNITS, PLANES, SPAN)
        slope = to_lanes(centered / count * scale * scale, units, UNITS, PLANES, SPAN)
    center = to_lanes(center, units, UNITS, PLANES, SPAN)
    factor = to_lanes(factor, units, UNITS, PLANES, SPAN)
    offset = to_lanes(offset, units, UNITS, PLANES, SPAN)
    tiles = tiles_of(begin, end, sizes, ROWS)
    for i in tl.range(tiles, num_stages=STAGES):
        # From the end: what was read last for the sums may still lie in the cache.
        at, inside = tile_at(
            tiles - 1 - i, block, begin, end, sizes, units, UNITS, ROWS, PLANES, SPAN, INDEX
        )
        apart = tl.load(x + at, mask=inside, other=0.0).to(ACC) - center
        back = _before_activation(grad, apart, kept, at, inside, factor, offset, ACT)
        if grad_residual is not None:
            tl.store(grad_residual + at, back.to(grad_residual.dtype.element_ty), mask=inside)
        if grad_x is not None:
            if TRAINING:
                back -= plain + apart * slope
            tl.store(grad_x + at, (back * factor).to(grad_x.dtype.element_ty), mask=inside)


@tunable(with_warps(8, registers=128, STAGES=2), ["sizes"])
@triton.jit
def _gradient_kernel(
    grad, x, kept, grad_x, grad_residual, grad_weight, grad_bias, parts, weight, bias, mean, rstd,
    parameter_steps, groups, sizes, units, ACT: tl.constexpr, TRAINING: tl.constexpr,
    UNITS: tl.constexpr, ROWS: tl.constexpr, PLANES: tl.constexpr, SPAN: tl.constexpr,
    PARTS: tl.constexpr, STAGES: tl.constexpr, INDEX: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    if grad_weight is not None:
        program -= sizes[4]
        if program < 0:
            _write_parameters(
                parts, grad_weight, grad_bias, mean, rstd, tl.program_id(0), groups, sizes,
                units, UNITS, PLANES, PARTS, ACC,
            )  # fmt: skip
    if program >= 0:
        _write_gradient(
            program, grad, x, kept, grad_x, grad_residual, parts, weight, bias, mean, rstd,
            parameter_steps, sizes, units, ACT, TRAINING, UNITS, ROWS, PLANES, SPAN, PARTS,
            STAGES, INDEX, ACC,
        )  # fmt: skip


def batch_norm_act_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    kept: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    act: str,
    training: bool,
    needs: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, weight, bias and residual; `needs`: of x, of weight and bias, of residual.

    One that is not needed is empty. kept: with a residual the result for relu and the residual for
    silu, else None.
    """
    of_x, of_parameters, of_residual = needs
    last = is_channels_last(x)
    x, grad = dense(x, last), dense(grad, last)
    kept = None if kept is None else dense(kept, last)
    grad_x, grad_residual = (
        empty_like_format(x) if needed else x.new_empty(0) for needed in (of_x, of_residual)
    )
    empty = torch.zeros_like if x.shape[0] == 0 else torch.empty_like
    grad_weight, grad_bias = (
        empty(v, memory_format=torch.contiguous_format) if of_parameters else v.new_empty(0)
        for v in (weight, bias)
    )
    results = (grad_x, grad_weight, grad_bias, grad_residual)
    if x.shape[0] == 0 or not any(needs):
        return results
    groups, channels = mean.shape
    cut = plan(x, groups)
    norm = (weight, bias, mean.contiguous(), rstd.contiguous())
    steps = (weight.stride(0), bias.stride(0))
    sums = of_parameters or (of_x and training)
    to_residual = grad_residual if of_residual else None
    parts = None
    if sums:
        shape = (groups, cut.parts, 2, channels)
        parts = x.new_empty(shape, dtype=accumulation_dtype(x.dtype))
        _sums_kernel[(cut.programs,)](
            grad, x, kept, to_residual, parts, *norm, steps, ACT=act, **cut.arguments
        )
        # The residual's gradient is g, unless half precision has rounded it.
        if of_residual and (act == "relu" or x.dtype in (torch.float32, torch.float64)):
            grad, kept, act = grad_residual, None, "none"
        to_residual = None
    programs = cut.programs if of_x or to_residual is not None else 0
    if programs or of_parameters:
        _gradient_kernel[(programs + (cut.blocks if of_parameters else 0),)](
            grad, x, kept, grad_x if of_x else None, to_residual,
            *((grad_weight, grad_bias) if of_parameters else (None, None)), parts, *norm, steps,
            groups, ACT=act, TRAINING=training and of_x, **cut.arguments,
        )  # fmt: skip
    return results
