"""Multiscale attention, backward: sums of the batch norm's gradient by parts, then the gradient.

Must move every projection twice in and its gradient once out; the incoming gradient, which is
small, is gathered. Three launches: sums by parts of about as many loads each, the sums of the
parts, and the gradient; without norms the last alone. The gradient of a resampled map is computed
where it is needed, in the first and in the last, instead of stored.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from magsd_kernels._layout import accumulation_dtype, empty_like_format
from magsd_kernels.triton._common import (
    accumulation,
    offset_type,
    pixel_steps,
    tunable,
    with_rows,
    with_warps,
)
from magsd_kernels.triton._resampling import entry, first_output, weight_of
from magsd_kernels.triton._scales import (
    COMBINED,
    Tensors,
    empty_like_first,
    parameter_steps,
    partition,
    parts_in,
    resampling,
    sizes_of,
    tile_of,
)

_SUMS_TILE = 2048  # elements in flight
_GRADIENT_TILE = 4096
_CONFIGS = [*with_warps(8, registers=168), *with_warps(16, registers=128)]
_KEY = ["maps", "height", "width", "heights", "widths", "steps"]


@triton.jit
def _resized_back(
    grad, b, m, y, x, inside, low_height, low_width, height, width, grad_steps,
    MODE: tl.constexpr, ALIGN: tl.constexpr, TAPS: tl.constexpr, OUTPUTS: tl.constexpr,
    INDEX: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The gradient of one scale's input pixels: what the outputs that read them give back."""
    TAPS_Y: tl.constexpr = entry(TAPS, 0)
    TAPS_X: tl.constexpr = entry(TAPS, 1)
    OUTPUTS_Y: tl.constexpr = entry(OUTPUTS, 0)
    OUTPUTS_X: tl.constexpr = entry(OUTPUTS, 1)
    # Begun earlier at the far end, every walk stays inside.
    first_y = first_output(y, low_height, height, MODE, TAPS_Y, ALIGN).to(INDEX)
    first_y = tl.minimum(first_y, height - OUTPUTS_Y)
    first_x = first_output(x, low_width, width, MODE, TAPS_X, ALIGN).to(INDEX)
    first_x = tl.minimum(first_x, width - OUTPUTS_X)
    place = b * grad_steps[0] + m * grad_steps[1] + (first_y * width + first_x) * grad_steps[2]
    total = tl.zeros(inside.shape, ACC)
    for k_y in range(OUTPUTS_Y):
        o_y = first_y + k_y
        row = weight_of(o_y, y, low_height, height, MODE, TAPS_Y, ALIGN, ACC)
        for k_x in range(OUTPUTS_X):
            o_x = first_x + k_x
            part = row * weight_of(o_x, x, low_width, width, MODE, TAPS_X, ALIGN, ACC)
            read = inside
            if MODE != "blocks":
                read = read & (part != 0)
            at = place + (k_y * width + k_x) * grad_steps[2]
            value = tl.load(grad + at, mask=read, other=0.0).to(ACC)
            total += value * part
    return total


@triton.jit
def _normal(x, at, inside, mean, rstd, weight, bias, ACC: tl.constexpr):
    """(x - mean) rstd, and whether the norm of x passes the ReLU."""
    offset = tl.load(x + at, mask=inside, other=0.0).to(ACC) - mean
    return offset * rstd, offset * (weight * rstd) + bias > 0


@triton.jit
def _parameters(weight, bias, mean, rstd, scale, m, maps, steps, ACC: tl.constexpr):
    present = m < maps
    return (
        tl.load(mean + scale * maps + m, mask=present, other=0.0),
        tl.load(rstd + scale * maps + m, mask=present, other=0.0),
        tl.load(weight + m * steps[0], mask=present, other=0.0).to(ACC),
        tl.load(bias + m * steps[1], mask=present, other=0.0).to(ACC),
    )


@tunable(_CONFIGS, _KEY)
@triton.jit
def _sums_kernel(
    grad, xs, weights, biases, mean, rstd, sums,
    batch, maps: tl.constexpr, height: tl.constexpr, width: tl.constexpr,
    grad_steps, heights, widths, steps, lengths, parameter_steps,
    MODES: tl.constexpr, ALIGN: tl.constexpr, TAPS: tl.constexpr, OUTPUTS: tl.constexpr,
    PIXELS: tl.constexpr, MAPS: tl.constexpr, INDEX: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Sums of the norm's gradient, and of that times (x - mean) rstd -> sums (all parts, 2, M)."""
    m = tl.program_id(1) * MAPS + tl.arange(0, MAPS)[None, :]
    earlier = 0
    for scale in tl.static_range(len(xs)):
        low_height, low_width = heights[scale], widths[scale]
        pixels = tl.cast(low_height, INDEX) * low_width
        part = tl.program_id(0) - earlier
        count = parts_in(batch, pixels, lengths[scale], INDEX)
        earlier += count
        if (part >= 0) & (part < count):
            begin = tl.cast(part, INDEX) * lengths[scale]
            end = tl.minimum(begin + lengths[scale], batch * pixels)
            at_mean, at_rstd, weight, bias = _parameters(
                weights[scale], biases[scale], mean, rstd, scale, m, maps,
                parameter_steps[scale], ACC,
            )  # fmt: skip
            plain = tl.zeros([PIXELS, MAPS], ACC)
            centered = tl.zeros([PIXELS, MAPS], ACC)
            for start in range(begin, end, PIXELS):
                n = start + tl.arange(0, PIXELS)[:, None]
                b, p = n // pixels, n % pixels
                inside = (n < end) & (m < maps)
                back = _resized_back(
                    grad, b, m.to(INDEX), p // low_width, p % low_width, inside,
                    low_height, low_width, height, width, grad_steps,
                    entry(MODES, scale), ALIGN, entry(TAPS, scale), entry(OUTPUTS, scale),
                    INDEX, ACC,
                )  # fmt: skip
                at = b * steps[scale][0] + p * steps[scale][2] + m.to(INDEX) * steps[scale][1]
                normal, passes = _normal(xs[scale], at, inside, at_mean, at_rstd, weight, bias, ACC)
                back = tl.where(passes & inside, back, 0.0)
                plain += back
                centered += tl.where(back != 0, back * normal, 0.0)
            to = sums + tl.program_id(0) * 2 * maps + m
            tl.store(to, tl.sum(plain, 0)[None, :], mask=m < maps)
            tl.store(to + maps, tl.sum(centered, 0)[None, :], mask=m < maps)


@tunable(with_warps(4), ["maps", "heights", "widths", "lengths"])
@triton.jit
def _total_kernel(
    sums, totals, grad_weights, grad_biases, batch, maps, heights, widths, lengths,
    ROWS: tl.constexpr, MAPS: tl.constexpr, INDEX: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Sums of the parts, in a fixed order -> totals (scales, 2, M); the parameters' gradients."""
    m = tl.program_id(1) * MAPS + tl.arange(0, MAPS)[None, :]
    present = m < maps
    earlier = 0
    for scale in tl.static_range(len(grad_weights)):
        pixels = tl.cast(heights[scale], INDEX) * widths[scale]
        count = parts_in(batch, pixels, lengths[scale], INDEX)
        if tl.program_id(0) == scale:
            of_bias = tl.zeros([1, MAPS], ACC)
            of_weight = tl.zeros([1, MAPS], ACC)
            for start in range(0, count, ROWS):
                part = start + tl.arange(0, ROWS)[:, None]
                at = sums + (earlier + part) * 2 * maps + m
                inside = (part < count) & present
                of_bias += tl.sum(tl.load(at, mask=inside, other=0.0), 0)[None, :]
                of_weight += tl.sum(tl.load(at + maps, mask=inside, other=0.0), 0)[None, :]
            to = totals + scale * 2 * maps + m
            tl.store(to, of_bias, mask=present)
            tl.store(to + maps, of_weight, mask=present)
            kind = grad_weights[scale].dtype.element_ty
            tl.store(grad_weights[scale] + m, of_weight.to(kind), mask=present)
            kind = grad_biases[scale].dtype.element_ty
            tl.store(grad_biases[scale] + m, of_bias.to(kind), mask=present)
        earlier += count


@tunable(with_warps(16, registers=128), _KEY)
@triton.jit
def _gradient_kernel(
    grad, xs, weights, biases, mean, rstd, totals, grads,
    batch, maps: tl.constexpr, height: tl.constexpr, width: tl.constexpr,
    grad_steps, heights: tl.constexpr, widths: tl.constexpr, steps, to_steps,
    parameter_steps, NORM: tl.constexpr, TRAINING: tl.constexpr,
    MODES: tl.constexpr, ALIGN: tl.constexpr, TAPS: tl.constexpr, OUTPUTS: tl.constexpr,
    PIXELS: tl.constexpr, MAPS: tl.constexpr, INDEX: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(2) * MAPS + tl.arange(0, MAPS)[None, :]
    for scale in tl.static_range(len(grads)):
        low_height, low_width = heights[scale], widths[scale]
        pixels = tl.cast(low_height, INDEX) * low_width
        total = batch * pixels
        first = tl.cast(tl.program_id(0), INDEX) * PIXELS
        if (tl.program_id(1) == scale) & (first < total):
            n = first + tl.arange(0, PIXELS)[:, None]
            b, p = n // pixels, n % pixels
            inside = (n < total) & (m < maps)
            back = _resized_back(
                grad, b, m.to(INDEX), p // low_width, p % low_width, inside,
                low_height, low_width, height, width, grad_steps,
                entry(MODES, scale), ALIGN, entry(TAPS, scale), entry(OUTPUTS, scale),
                INDEX, ACC,
            )  # fmt: skip
            if NORM:
                at_mean, at_rstd, weight, bias = _parameters(
                    weights[scale], biases[scale], mean, rstd, scale, m, maps,
                    parameter_steps[scale], ACC,
                )  # fmt: skip
                at = b * steps[scale][0] + p * steps[scale][2] + m.to(INDEX) * steps[scale][1]
                normal, passes = _normal(xs[scale], at, inside, at_mean, at_rstd, weight, bias, ACC)
                back = tl.where(passes, back, 0.0)
                if TRAINING:
                    # Ioffe and Szegedy 2015: the batch's mean and variance depend on every element.
                    count = tl.cast(total, ACC)
                    sums = totals + scale * 2 * maps + m
                    of_bias = tl.load(sums, mask=m < maps, other=0.0)
                    of_weight = tl.load(sums + maps, mask=m < maps, other=0.0)
                    back -= of_bias / count + normal * (of_weight / count)
                back *= weight * at_rstd
            to = b * to_steps[scale][0] + p * to_steps[scale][2] + m.to(INDEX) * to_steps[scale][1]
            kind = grads[scale].dtype.element_ty
            tl.store(grads[scale] + to, back.to(kind), mask=inside)


def _loads(outputs: tuple[tuple[int, int], ...]) -> tuple[int, ...]:
    """Loads of a pixel of each scale: its own, and those of the outputs that read it."""
    return tuple(1 + rows * columns for rows, columns in outputs)


def _gradients(
    grad: torch.Tensor,
    grads: Tensors,
    maps: Tensors,
    norms: tuple[Tensors | None, ...],
    statistics: tuple[torch.Tensor | None, ...],
    results: tuple[Tensors, ...],
    mode: str,
    align_corners: bool,
    training: bool,
) -> None:
    """Write `grads`, and with norms the parameters' gradients `results`."""
    batch, channels, height, width = grad.shape
    grad = with_rows(grad)
    norm = norms[0] is not None
    parameters = [None if values is None else tuple(values) for values in norms]
    steps = parameter_steps(norms, len(grads))
    sizes = (batch, channels, height, width, pixel_steps(grad), *sizes_of(maps))
    resampled = resampling(grads, (height, width), mode, align_corners)
    tile = tile_of(channels, _SUMS_TILE, grad.dtype)
    common = {
        "MAPS": tile.maps, "INDEX": offset_type(grad, *maps, *grads),
        "ACC": accumulation(grad.dtype),
    }  # fmt: skip
    totals = grad.new_empty(0)
    if norm:
        dtype = accumulation_dtype(grad.dtype)
        parts = partition(grads, tile.pixels, _loads(resampled["OUTPUTS"]))
        sums = grad.new_empty((sum(parts.counts), 2, channels), dtype=dtype)
        totals = grad.new_empty((len(grads), 2, channels), dtype=dtype)
        _sums_kernel[(sum(parts.counts), tile.chunks)](
            grad, tuple(maps), *parameters, *statistics, sums, *sizes, parts.lengths, steps,
            PIXELS=tile.pixels, **common, **resampled,
        )  # fmt: skip
        _total_kernel[(len(grads), tile.chunks)](
            sums, totals, *map(tuple, results), batch, channels, *sizes_of(maps)[:2],
            parts.lengths, ROWS=COMBINED, **common,
        )  # fmt: skip
    tile = tile_of(channels, _GRADIENT_TILE, grad.dtype)
    largest = max(g.shape[2] * g.shape[3] for g in grads)
    _gradient_kernel[(triton.cdiv(max(batch * largest, 1), tile.pixels), len(grads), tile.chunks)](
        grad, tuple(maps), *parameters, *statistics, totals, tuple(grads), *sizes,
        tuple(pixel_steps(g) for g in grads), steps,
        NORM=norm, TRAINING=training, PIXELS=tile.pixels, **common, **resampled,
    )  # fmt: skip


def resample_attention_backward(
    grad: torch.Tensor, heights: list[int], widths: list[int], mode: str, align_corners: bool
) -> Tensors:
    """Gradients (B, M, heights[i], widths[i]) of the maps."""
    grads = [empty_like_first(grad, size) for size in zip(heights, widths, strict=True)]
    if grad.shape[0] > 0:
        _gradients(grad, grads, grads, (None, None), (None, None), (), mode, align_corners, False)
    return grads


def multiscale_attention_backward(
    grad: torch.Tensor,
    projections: Tensors,
    weights: Tensors,
    biases: Tensors,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    training: bool,
    mode: str,
    align_corners: bool,
) -> tuple[Tensors, Tensors, Tensors]:
    """Gradients of projections, weights and biases."""
    grads = [empty_like_format(x) for x in projections]
    empty = torch.zeros_like if grad.shape[0] == 0 else torch.empty_like
    grad_weights, grad_biases = ([empty(v) for v in values] for values in (weights, biases))
    if grad.shape[0] > 0:
        _gradients(
            grad, grads, [with_rows(x) for x in projections], (weights, biases),
            (mean.contiguous(), rstd.contiguous()), (grad_weights, grad_biases),
            mode, align_corners, training,
        )  # fmt: skip
    return grads, grad_weights, grad_biases
