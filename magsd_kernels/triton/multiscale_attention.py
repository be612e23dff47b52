"""Multiscale attention: batch norm, ReLU, resampling and the sum over the scales.

Training reads every projection twice forward and twice backward, in two launches each:

- statistics: a program adds up a part of the pixels of one scale, shifted by the channel's first
  value, and writes mean and sum of squares of its part (Chan et al. 1983);
- apply: a program owns a tile of output pixels by maps. It first combines the parts of its maps,
  always in the same order, and then gathers, normalises and sums what every output reads.

Backward alike: sums of the batch norm's gradient by parts, then the gradient itself. No normalised
or resampled map is stored. Evaluation and resample_attention need the second launch only. Maps of
either memory format are read by strides.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from magsd_kernels._layout import accumulation_dtype, empty_like_format, is_channels_last
from magsd_kernels.triton._common import accumulation, block, pixel_steps, with_rows
from magsd_kernels.triton._resampling import (
    first_input,
    first_output,
    most_inputs,
    most_outputs,
    share,
)

_TILE = 2048  # elements in flight
_MOST_PARTS = 32
_MOST_MAPS = 64  # maps of a tile

Tensors = list[torch.Tensor]


@triton.jit
def _statistics_part(
    x, parts, scale, batch, maps, pixels, step_b, step_c, step_p,
    PARTS: tl.constexpr, PIXELS: tl.constexpr, MAPS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Mean and sum of squares of one part of one scale -> parts (scales, PARTS, 2, M)."""
    part = tl.program_id(0)
    m = tl.program_id(2) * MAPS + tl.arange(0, MAPS)[None, :]
    present = m < maps
    shift = tl.load(x + m * step_c, mask=present, other=0.0).to(ACC)
    total = batch * pixels
    length = tl.cdiv(total, PARTS)
    begin = part * length
    end = tl.minimum(begin + length, total)
    plain = tl.zeros([PIXELS, MAPS], ACC)
    squares = tl.zeros([PIXELS, MAPS], ACC)
    for start in range(begin, end, PIXELS):
        n = start + tl.arange(0, PIXELS)[:, None]
        at = x + (n // pixels).to(tl.int64) * step_b + n % pixels * step_p + m * step_c
        inside = (n < end) & present
        value = tl.where(inside, tl.load(at, mask=inside, other=0.0).to(ACC) - shift, 0.0)
        plain += value
        squares += value * value
    count = tl.cast(tl.maximum(end - begin, 1), ACC)
    mean = tl.sum(plain, 0)[None, :] / count
    deviation = tl.maximum(tl.sum(squares, 0)[None, :] - mean * mean * count, 0.0)
    to = parts + ((scale * PARTS + part) * 2) * maps + m
    tl.store(to, mean + shift, mask=present)
    tl.store(to + maps, deviation, mask=present)


@triton.jit
def _statistics_kernel(
    xs, parts, batch, maps, pixels, steps,
    PARTS: tl.constexpr, PIXELS: tl.constexpr, MAPS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    for scale in tl.static_range(len(xs)):
        if tl.program_id(1) == scale:
            _statistics_part(
                xs[scale], parts, scale, batch, maps, pixels[scale],
                steps[scale][0], steps[scale][1], steps[scale][2], PARTS, PIXELS, MAPS, ACC,
            )  # fmt: skip


@triton.jit
def _combined(parts, scale, m, maps, total, PARTS: tl.constexpr, MAPS: tl.constexpr,
              ACC: tl.constexpr):  # fmt: skip
    """Mean and biased variance of every map, from its parts in their order."""
    length = tl.cdiv(total, PARTS)
    mean = tl.zeros([1, MAPS], ACC)
    squares = tl.zeros([1, MAPS], ACC)
    count = 0
    for part in range(PARTS):
        size = tl.minimum(length, tl.maximum(total - part * length, 0))
        at = parts + ((scale * PARTS + part) * 2) * maps + m
        other = tl.load(at, mask=m < maps, other=0.0)
        deviation = tl.load(at + maps, mask=m < maps, other=0.0)
        both = tl.cast(tl.maximum(count + size, 1), ACC)
        ratio = tl.cast(size, ACC) / both
        apart = other - mean
        mean += apart * ratio
        here = tl.cast(tl.minimum(size, 1), ACC)
        squares += here * deviation + apart * apart * (tl.cast(count, ACC) * ratio)
        count += size
    return mean, squares / tl.cast(total, ACC)


@triton.jit
def _update(running, at, present, momentum: tl.constexpr, value):
    """Running <- (1 - momentum) running + momentum value, rounded once."""
    keep = tl.full([], 1 - momentum, value.dtype)
    take = tl.full([], momentum, value.dtype)
    old = tl.load(running + at, mask=present, other=0.0).to(value.dtype)
    tl.store(running + at, (keep * old + take * value).to(running.dtype.element_ty), mask=present)


@triton.jit
def _apply_kernel(
    xs, out, weights, biases, running_means, running_vars, parts, mean_out, rstd_out,
    batch, maps, height, width, out_b, out_c, out_p, heights, widths, steps, parameter_steps,
    NORM: tl.constexpr, TRAINING: tl.constexpr, MOMENTUM: tl.constexpr, EPS: tl.constexpr,
    MODE: tl.constexpr, ALIGN: tl.constexpr, TAPS: tl.constexpr,
    PARTS: tl.constexpr, PIXELS: tl.constexpr, MAPS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(1) * MAPS + tl.arange(0, MAPS)[None, :]
    present = m < maps
    n = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)[:, None]
    pixels = height * width
    inside = n < batch * pixels
    b = (n // pixels).to(tl.int64)
    p = n % pixels
    y, x = p // width, p % width
    total = tl.zeros([PIXELS, MAPS], ACC)
    for scale in tl.static_range(len(xs)):
        low_height, low_width = heights[scale], widths[scale]
        if NORM:
            if TRAINING:
                count = batch * low_height * low_width
                mean, variance = _combined(parts, scale, m, maps, count, PARTS, MAPS, ACC)
            else:
                at = m * parameter_steps[scale][2]
                mean = tl.load(running_means[scale] + at, mask=present, other=0.0).to(ACC)
                at = m * parameter_steps[scale][3]
                variance = tl.load(running_vars[scale] + at, mask=present, other=0.0).to(ACC)
            rstd = 1.0 / tl.sqrt(variance + tl.full([], EPS, ACC))
            if tl.program_id(0) == 0:
                tl.store(mean_out + scale * maps + m, mean, mask=present)
                tl.store(rstd_out + scale * maps + m, rstd, mask=present)
                if TRAINING:
                    unbiased = variance * (tl.cast(count, ACC) / tl.cast(count - 1, ACC))
                    _update(running_means[scale], m * parameter_steps[scale][2], present,
                            MOMENTUM, mean)  # fmt: skip
                    _update(running_vars[scale], m * parameter_steps[scale][3], present,
                            MOMENTUM, unbiased)  # fmt: skip
            at = m * parameter_steps[scale][0]
            factor = rstd * tl.load(weights[scale] + at, mask=present, other=0.0).to(ACC)
            at = m * parameter_steps[scale][1]
            bias = tl.load(biases[scale] + at, mask=present, other=0.0).to(ACC)
        first_y = first_input(y, low_height, height, MODE, ALIGN, ACC)
        first_x = first_input(x, low_width, width, MODE, ALIGN, ACC)
        for k in range(TAPS[scale][0] * TAPS[scale][1]):
            i = first_y + k // TAPS[scale][1]
            j = first_x + k % TAPS[scale][1]
            part = share(y, i, low_height, height, MODE, ALIGN, ACC)
            part *= share(x, j, low_width, width, MODE, ALIGN, ACC)
            read = inside & (i < low_height) & (j < low_width)
            if MODE == "area":  # Windows of fewer inputs than the largest.
                read = read & (part != 0)
            at = b * steps[scale][0] + (i * low_width + j) * steps[scale][2] + m * steps[scale][1]
            value = tl.load(xs[scale] + at, mask=read & present, other=0.0).to(ACC)
            if NORM:
                value = (value - mean) * factor + bias
                value = tl.where(value < 0, 0.0, value)  # NaN stays NaN.
            total += tl.where(read, value * part, 0.0)
    to = out + b * out_b + p * out_p + m * out_c
    tl.store(to, total.to(out.dtype.element_ty), mask=inside & present)


@triton.jit
def _resized_back(
    grad, b, m, y, x, inside, low_height, low_width, height, width, grad_b, grad_c, grad_p,
    MODE: tl.constexpr, ALIGN: tl.constexpr, OUTPUTS_Y: tl.constexpr, OUTPUTS_X: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """The gradient of one scale's input pixels: what the outputs that read them give back."""
    first_y = first_output(y, low_height, height, MODE, ALIGN)
    first_x = first_output(x, low_width, width, MODE, ALIGN)
    total = tl.cast(inside, ACC) * 0.0
    for k in range(OUTPUTS_Y * OUTPUTS_X):
        o_y = first_y + k // OUTPUTS_X
        o_x = first_x + k % OUTPUTS_X
        part = share(o_y, y, low_height, height, MODE, ALIGN, ACC)
        part *= share(o_x, x, low_width, width, MODE, ALIGN, ACC)
        read = inside & (o_y < height) & (o_x < width) & (part != 0)
        at = grad + b * grad_b + (o_y * width + o_x) * grad_p + m * grad_c
        value = tl.load(at, mask=read, other=0.0).to(ACC)
        total += tl.where(read, value * part, 0.0)
    return total


@triton.jit
def _normal(x, at, inside, mean, rstd, weight, bias, ACC: tl.constexpr):
    """(x - mean) rstd, and whether the norm of x passes the ReLU."""
    offset = tl.load(x + at, mask=inside, other=0.0).to(ACC) - mean
    return offset * rstd, offset * (weight * rstd) + bias > 0


@triton.jit
def _parameters(weight, bias, mean, rstd, scale, m, maps, step_weight, step_bias,
                ACC: tl.constexpr):  # fmt: skip
    present = m < maps
    return (
        tl.load(mean + scale * maps + m, mask=present, other=0.0),
        tl.load(rstd + scale * maps + m, mask=present, other=0.0),
        tl.load(weight + m * step_weight, mask=present, other=0.0).to(ACC),
        tl.load(bias + m * step_bias, mask=present, other=0.0).to(ACC),
    )


@triton.jit
def _sums_kernel(
    grad, xs, weights, biases, mean, rstd, sums, batch, maps, height, width,
    grad_b, grad_c, grad_p, heights, widths, steps, parameter_steps,
    MODE: tl.constexpr, ALIGN: tl.constexpr, OUTPUTS: tl.constexpr,
    PARTS: tl.constexpr, PIXELS: tl.constexpr, MAPS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Sums of the norm's gradient, and of that times (x - mean) rstd, by parts."""
    part = tl.program_id(0)
    m = tl.program_id(2) * MAPS + tl.arange(0, MAPS)[None, :]
    for scale in tl.static_range(len(xs)):
        if tl.program_id(1) == scale:
            low_height, low_width = heights[scale], widths[scale]
            pixels = low_height * low_width
            total = batch * pixels
            length = tl.cdiv(total, PARTS)
            end = tl.minimum(part * length + length, total)
            at_mean, at_rstd, weight, bias = _parameters(
                weights[scale], biases[scale], mean, rstd, scale, m, maps,
                parameter_steps[scale][0], parameter_steps[scale][1], ACC,
            )  # fmt: skip
            plain = tl.zeros([PIXELS, MAPS], ACC)
            centred = tl.zeros([PIXELS, MAPS], ACC)
            for start in range(part * length, end, PIXELS):
                n = start + tl.arange(0, PIXELS)[:, None]
                b, p = (n // pixels).to(tl.int64), n % pixels
                inside = (n < end) & (m < maps)
                back = _resized_back(
                    grad, b, m, p // low_width, p % low_width, inside, low_height, low_width,
                    height, width, grad_b, grad_c, grad_p,
                    MODE, ALIGN, OUTPUTS[scale][0], OUTPUTS[scale][1], ACC,
                )  # fmt: skip
                at = b * steps[scale][0] + p * steps[scale][2] + m * steps[scale][1]
                normal, passes = _normal(xs[scale], at, inside, at_mean, at_rstd, weight, bias, ACC)
                back = tl.where(passes & inside, back, 0.0)
                plain += back
                centred += tl.where(back != 0, back * normal, 0.0)
            to = sums + ((scale * PARTS + part) * 2) * maps + m
            tl.store(to, tl.sum(plain, 0)[None, :], mask=m < maps)
            tl.store(to + maps, tl.sum(centred, 0)[None, :], mask=m < maps)


@triton.jit
def _gradient_kernel(
    grad, xs, weights, biases, mean, rstd, sums, grads, grad_weights, grad_biases,
    batch, maps, height, width, grad_b, grad_c, grad_p, heights, widths, steps, to_steps,
    parameter_steps, NORM: tl.constexpr, TRAINING: tl.constexpr,
    MODE: tl.constexpr, ALIGN: tl.constexpr, OUTPUTS: tl.constexpr,
    PARTS: tl.constexpr, PIXELS: tl.constexpr, MAPS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(2) * MAPS + tl.arange(0, MAPS)[None, :]
    present = m < maps
    for scale in tl.static_range(len(grads)):
        low_height, low_width = heights[scale], widths[scale]
        pixels = low_height * low_width
        total = batch * pixels
        first = tl.program_id(0) * PIXELS
        if (tl.program_id(1) == scale) & (first < total):
            n = first + tl.arange(0, PIXELS)[:, None]
            b, p = (n // pixels).to(tl.int64), n % pixels
            inside = (n < total) & present
            back = _resized_back(
                grad, b, m, p // low_width, p % low_width, inside, low_height, low_width,
                height, width, grad_b, grad_c, grad_p,
                MODE, ALIGN, OUTPUTS[scale][0], OUTPUTS[scale][1], ACC,
            )  # fmt: skip
            if NORM:
                at_mean, at_rstd, weight, bias = _parameters(
                    weights[scale], biases[scale], mean, rstd, scale, m, maps,
                    parameter_steps[scale][0], parameter_steps[scale][1], ACC,
                )  # fmt: skip
                of_bias = tl.zeros([1, MAPS], ACC)
                of_weight = tl.zeros([1, MAPS], ACC)
                for part in range(PARTS):
                    at_part = sums + ((scale * PARTS + part) * 2) * maps + m
                    of_bias += tl.load(at_part, mask=present, other=0.0)
                    of_weight += tl.load(at_part + maps, mask=present, other=0.0)
                if first == 0:
                    to = grad_weights[scale] + m
                    tl.store(to, of_weight.to(grad_weights[scale].dtype.element_ty), mask=present)
                    to = grad_biases[scale] + m
                    tl.store(to, of_bias.to(grad_biases[scale].dtype.element_ty), mask=present)
                at = b * steps[scale][0] + p * steps[scale][2] + m * steps[scale][1]
                normal, passes = _normal(xs[scale], at, inside, at_mean, at_rstd, weight, bias, ACC)
                back = tl.where(passes, back, 0.0)
                if TRAINING:
                    # Ioffe and Szegedy 2015: the batch's mean and variance depend on every element.
                    back -= (of_bias + normal * of_weight) / tl.cast(total, ACC)
                back *= weight * at_rstd
            to = b * to_steps[scale][0] + p * to_steps[scale][2] + m * to_steps[scale][1]
            kind = grads[scale].dtype.element_ty
            tl.store(grads[scale] + to, back.to(kind), mask=inside)


def _tile(maps: int) -> tuple[int, int]:
    """Pixels and maps of a tile."""
    wide = block(maps, _MOST_MAPS)
    return max(_TILE // wide, 1), wide


def _parts(batch: int, maps: Tensors, pixels: int) -> int:
    """Into how many parts the pixels of a scale are cut."""
    largest = max(m.shape[2] * m.shape[3] for m in maps)
    return block(triton.cdiv(batch * largest, pixels), _MOST_PARTS)


def _empty_like_first(first: torch.Tensor, size: list[int]) -> torch.Tensor:
    batch, channels = first.shape[:2]
    if is_channels_last(first):
        return first.new_empty((batch, *size, channels)).movedim(-1, -3)
    return first.new_empty((batch, channels, *size))


def _apply(
    maps: Tensors,
    norms: tuple[tuple[torch.Tensor, ...] | None, ...],
    statistics: tuple[torch.Tensor | None, ...],
    size: list[int],
    mode: str,
    align_corners: bool,
    **settings: object,
) -> torch.Tensor:
    """Sum of the maps, normalised if there are norms, resampled to `size`."""
    first = maps[0]
    batch, channels = first.shape[:2]
    out = _empty_like_first(first, size)
    pixels, wide = _tile(channels)
    parameter_steps = tuple(
        (0, 0, 0, 0) if norms[0] is None else tuple(values[i].stride(0) for values in norms)
        for i in range(len(maps))
    )  # fmt: skip
    grid = (triton.cdiv(max(batch, 1) * size[0] * size[1], pixels), triton.cdiv(channels, wide))
    _apply_kernel[grid](
        tuple(maps), out, *norms, *statistics, batch, channels, *size,
        *pixel_steps(out), tuple(m.shape[2] for m in maps), tuple(m.shape[3] for m in maps),
        tuple(pixel_steps(m) for m in maps), parameter_steps, MODE=mode, ALIGN=align_corners,
        TAPS=tuple(
            tuple(most_inputs(m.shape[2 + d], size[d], mode) for d in range(2)) for m in maps
        ),
        PIXELS=pixels, MAPS=wide, ACC=accumulation(first.dtype), **settings,
    )  # fmt: skip
    return out


def _gradients(
    grad: torch.Tensor,
    grads: Tensors,
    maps: Tensors,
    norms: tuple[object, ...],
    statistics: tuple[torch.Tensor | None, ...],
    results: tuple[object, ...],
    parameter_steps: tuple[tuple[int, int], ...],
    mode: str,
    align_corners: bool,
    training: bool,
) -> None:
    """Write `grads`, and with norms the parameters' gradients `results`."""
    batch, channels, height, width = grad.shape
    grad = with_rows(grad)
    pixels, wide = _tile(channels)
    parts = _parts(batch, grads, pixels)
    sums = grad.new_empty(0)
    common = (
        batch, channels, height, width, *pixel_steps(grad),
        tuple(g.shape[2] for g in grads), tuple(g.shape[3] for g in grads),
        tuple(pixel_steps(m) for m in maps),
    )  # fmt: skip
    settings = {
        "MODE": mode, "ALIGN": align_corners, "PARTS": parts, "PIXELS": pixels, "MAPS": wide,
        "ACC": accumulation(grad.dtype),
        "OUTPUTS": tuple(
            (
                most_outputs(g.shape[2], height, mode, align_corners),
                most_outputs(g.shape[3], width, mode, align_corners),
            )
            for g in grads
        ),
    }  # fmt: skip
    chunks = triton.cdiv(channels, wide)
    norm = norms[0] is not None
    if norm:
        sums = grad.new_empty(
            (len(grads), parts, 2, channels), dtype=accumulation_dtype(grad.dtype)
        )
        _sums_kernel[(parts, len(grads), chunks)](
            grad, tuple(maps), *norms, *statistics, sums, *common, parameter_steps, **settings
        )
    largest = max(g.shape[2] * g.shape[3] for g in grads)
    _gradient_kernel[(triton.cdiv(max(batch * largest, 1), pixels), len(grads), chunks)](
        grad, tuple(maps), *norms, *statistics, sums, tuple(grads), *results, *common,
        tuple(pixel_steps(g) for g in grads), parameter_steps,
        NORM=norm, TRAINING=training, **settings,
    )  # fmt: skip


_NO_NORMS = (None,) * 4


def resample_attention(
    maps: Tensors, size: list[int], mode: str, align_corners: bool
) -> torch.Tensor:
    """Sum of maps[i] (B, M, h_i, w_i) resampled to size -> (B, M, H, W)."""
    if maps[0].shape[0] == 0:
        return _empty_like_first(maps[0], size)
    return _apply(
        [with_rows(m) for m in maps], _NO_NORMS, (None,) * 3, size, mode, align_corners,
        NORM=False, TRAINING=False, MOMENTUM=0.0, EPS=0.0, PARTS=1,
    )  # fmt: skip


def resample_attention_backward(
    grad: torch.Tensor, heights: list[int], widths: list[int], mode: str, align_corners: bool
) -> Tensors:
    """Gradients (B, M, heights[i], widths[i]) of the maps."""
    grads = [_empty_like_first(grad, [h, w]) for h, w in zip(heights, widths, strict=True)]
    if grad.shape[0] > 0:
        _gradients(
            grad, grads, grads, (None, None), (None, None), (None, None),
            ((0, 0),) * len(grads), mode, align_corners, False,
        )  # fmt: skip
    return grads


def multiscale_attention(
    projections: Tensors,
    weights: Tensors,
    biases: Tensors,
    running_means: Tensors,
    running_vars: Tensors,
    size: list[int],
    training: bool,
    momentum: float,
    eps: float,
    mode: str,
    align_corners: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attention (B, M, H, W), and the mean and 1 / standard deviation (scales, M) that it used.

    In training the running statistics are updated in place, as torch's batch norm does.
    """
    maps = [with_rows(x) for x in projections]
    batch, channels = maps[0].shape[:2]
    dtype = accumulation_dtype(maps[0].dtype)
    mean, rstd = (maps[0].new_empty((len(maps), channels), dtype=dtype) for _ in range(2))
    training = training and batch > 0
    pixels, wide = _tile(channels)
    count = _parts(batch, maps, pixels)
    parts = maps[0].new_empty((len(maps), count, 2, channels) if training else (0,), dtype=dtype)
    if training:
        _statistics_kernel[(count, len(maps), triton.cdiv(channels, wide))](
            tuple(maps), parts, batch, channels, tuple(m.shape[2] * m.shape[3] for m in maps),
            tuple(pixel_steps(m) for m in maps),
            PARTS=count, PIXELS=pixels, MAPS=wide, ACC=accumulation(maps[0].dtype),
        )  # fmt: skip
    norms = tuple(map(tuple, (weights, biases, running_means, running_vars)))
    attention = _apply(
        maps, norms, (parts, mean, rstd), size, mode, align_corners,
        NORM=True, TRAINING=training, MOMENTUM=momentum, EPS=eps, PARTS=count,
    )  # fmt: skip
    return attention, mean, rstd


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
        steps = tuple((w.stride(0), b.stride(0)) for w, b in zip(weights, biases, strict=True))
        _gradients(
            grad, grads, [with_rows(x) for x in projections], (tuple(weights), tuple(biases)),
            (mean.contiguous(), rstd.contiguous()), (tuple(grad_weights), tuple(grad_biases)),
            steps, mode, align_corners, training,
        )  # fmt: skip
    return grads, grad_weights, grad_biases
