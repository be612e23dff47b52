"""Multiscale attention: batch norm, ReLU, resampling and the sum over the scales.

Training reads every projection twice forward and twice backward, in two launches each:

- statistics: a program takes a part of the pixels of one scale and writes its mean and its sum of
  squared deviations, by Welford's recurrence, so that no digits are lost to a far mean or value;
- apply: a program owns a tile of output pixels by maps. It first combines the parts of its maps
  (Chan et al. 1983), all at once and always in the same order, and then gathers, normalises and
  sums what every output reads.

Backward alike (`_multiscale_backward.py`). No normalised or resampled map is stored. Evaluation and
resample_attention need the second launch only. Maps of either memory format are read by strides.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from magsd_kernels._layout import accumulation_dtype
from magsd_kernels.triton._common import (
    accumulation,
    offset_type,
    pixel_steps,
    tunable,
    with_rows,
    with_warps,
)
from magsd_kernels.triton._multiscale_backward import (
    multiscale_attention_backward,
    resample_attention_backward,
)
from magsd_kernels.triton._resampling import entry, first_input, share
from magsd_kernels.triton._scales import (
    Parts,
    Tensors,
    empty_like_first,
    parts_of,
    resampling,
    sizes_of,
    tile_of,
)

__all__ = [
    "multiscale_attention",
    "multiscale_attention_backward",
    "resample_attention",
    "resample_attention_backward",
]

_STATISTICS_TILE = 4096  # elements in flight
_APPLY_TILE = 2048
_STATISTICS_CONFIGS = [*with_warps(8, STAGES=3), *with_warps(8, STAGES=1)]


@triton.jit
def _statistics_part(
    x, parts, scale, batch, maps, pixels, length, step_b, step_c, step_p,
    PARTS: tl.constexpr, PIXELS: tl.constexpr, MAPS: tl.constexpr, STAGES: tl.constexpr,
    INDEX: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Mean and squared deviations of one part of one scale -> parts (scales, PARTS, 2, M)."""
    part = tl.program_id(0)
    m = tl.program_id(2) * MAPS + tl.arange(0, MAPS)[None, :]
    present = m < maps
    total = tl.cast(batch, INDEX) * pixels
    begin = tl.minimum(tl.cast(part, INDEX) * length, total)
    end = tl.minimum(begin + length, total)
    place = x + m.to(INDEX) * step_c
    # A far mean is taken off first. Then every lane follows Welford, so that no far value costs the
    # others their digits, and the lanes are combined.
    lane = tl.arange(0, PIXELS)[:, None]
    n = begin + lane
    few = tl.load(
        place + (n // pixels * step_b + n % pixels * step_p), mask=(n < end) & present, other=0.0
    ).to(ACC)
    shift = tl.sum(few, 0)[None, :] / tl.minimum(tl.maximum(end - begin, 1), PIXELS).to(ACC)
    shift = tl.where(tl.abs(shift) < float("inf"), shift, 0.0)
    mean = tl.zeros([PIXELS, MAPS], ACC)
    squares = tl.zeros([PIXELS, MAPS], ACC)
    seen = tl.full([], 0.0, ACC)
    for start in tl.range(begin, end, PIXELS, num_stages=STAGES):
        n = start + lane
        inside = (n < end) & present
        value = (
            tl.load(
                place + (n // pixels * step_b + n % pixels * step_p), mask=inside, other=0.0
            ).to(ACC)
            - shift
        )
        seen += 1.0
        apart = tl.where(inside, value - mean, 0.0)
        mean += apart * (1.0 / seen)
        squares += apart * tl.where(inside, value - mean, 0.0)
    size = ((tl.maximum(end - begin - lane, 0) + PIXELS - 1) // PIXELS).to(ACC)
    all_mean = tl.sum(mean * size, 0)[None, :] / tl.maximum(end - begin, 1).to(ACC)
    apart = mean - all_mean
    deviation = tl.sum(squares + apart * apart * size, 0)[None, :]
    to = parts + ((scale * PARTS + part) * 2) * maps + m
    tl.store(to, all_mean + shift, mask=present)
    tl.store(to + maps, deviation, mask=present)


@tunable(_STATISTICS_CONFIGS, ["maps", "pixels", "steps", "PARTS", "PIXELS"])
@triton.jit
def _statistics_kernel(
    xs, parts, batch, maps, pixels, lengths, steps,
    PARTS: tl.constexpr, PIXELS: tl.constexpr, MAPS: tl.constexpr, STAGES: tl.constexpr,
    INDEX: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    for scale in tl.static_range(len(xs)):
        if tl.program_id(1) == scale:
            _statistics_part(
                xs[scale], parts, scale, batch, maps, pixels[scale], lengths[scale],
                steps[scale][0], steps[scale][1], steps[scale][2],
                PARTS, PIXELS, MAPS, STAGES, INDEX, ACC,
            )  # fmt: skip


@triton.jit
def _combined(
    parts, scale, m, maps, total, length,
    PARTS: tl.constexpr, INDEX: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Mean and biased variance of every map, from its parts."""
    part = tl.arange(0, PARTS)[:, None]
    size = tl.minimum(tl.maximum(total - part.to(INDEX) * length, 0), length).to(ACC)
    at = parts + ((scale * PARTS + part) * 2) * maps + m
    mean_of_part = tl.load(at, mask=m < maps, other=0.0)
    deviation = tl.load(at + maps, mask=m < maps, other=0.0)
    count = tl.cast(total, ACC)
    mean = tl.sum(mean_of_part * size, 0)[None, :] / count
    apart = mean_of_part - mean
    return mean, tl.sum(deviation + apart * apart * size, 0)[None, :] / count


@triton.jit
def _update(running, at, present, momentum: tl.constexpr, value):
    """Running <- (1 - momentum) running + momentum value, rounded once."""
    keep = tl.full([], 1 - momentum, value.dtype)
    take = tl.full([], momentum, value.dtype)
    old = tl.load(running + at, mask=present, other=0.0).to(value.dtype)
    tl.store(running + at, (keep * old + take * value).to(running.dtype.element_ty), mask=present)


@triton.jit
def _norm_of(
    weight, bias, running_mean, running_var, parts, mean_out, rstd_out, scale, m, maps, total,
    length, parameter_steps, TRAINING: tl.constexpr, MOMENTUM: tl.constexpr, EPS: tl.constexpr,
    PARTS: tl.constexpr, INDEX: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One scale's mean, factor and bias; the first program keeps the statistics."""
    present = m < maps
    at_mean, at_var = m * parameter_steps[2], m * parameter_steps[3]
    if TRAINING:
        mean, variance = _combined(parts, scale, m, maps, total, length, PARTS, INDEX, ACC)
    else:
        mean = tl.load(running_mean + at_mean, mask=present, other=0.0).to(ACC)
        variance = tl.load(running_var + at_var, mask=present, other=0.0).to(ACC)
    rstd = 1.0 / tl.sqrt(variance + tl.full([], EPS, ACC))
    if tl.program_id(0) == 0:
        tl.store(mean_out + scale * maps + m, mean, mask=present)
        tl.store(rstd_out + scale * maps + m, rstd, mask=present)
        if TRAINING:
            unbiased = variance * (tl.cast(total, ACC) / tl.cast(total - 1, ACC))
            _update(running_mean, at_mean, present, MOMENTUM, mean)
            _update(running_var, at_var, present, MOMENTUM, unbiased)
    gain = tl.load(weight + m * parameter_steps[0], mask=present, other=0.0).to(ACC)
    offset = tl.load(bias + m * parameter_steps[1], mask=present, other=0.0).to(ACC)
    return mean, rstd * gain, offset


@triton.jit
def _gathered(
    x, b, y, x_out, m, inside, low_height, low_width, height, width, steps, mean, factor, bias,
    NORM: tl.constexpr, MODE: tl.constexpr, ALIGN: tl.constexpr, TAPS_Y: tl.constexpr,
    TAPS_X: tl.constexpr, INDEX: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One scale's maps, normalised and rectified where there is a norm, at outputs (y, x_out)."""
    first_y = first_input(y, low_height, height, MODE, TAPS_Y, ALIGN, ACC).to(INDEX)
    first_x = first_input(x_out, low_width, width, MODE, TAPS_X, ALIGN, ACC).to(INDEX)
    place = x + (b * steps[0] + m * steps[1])
    total = tl.zeros(inside.shape, ACC)
    # In float64 what four taps keep does not fit into registers.
    UNROLL: tl.constexpr = 1 if ACC.is_fp64() else 4
    for k in tl.range(TAPS_Y * TAPS_X, loop_unroll_factor=UNROLL):
        i = first_y + k // TAPS_X
        j = first_x + k % TAPS_X
        part = share(y, i, low_height, height, MODE, TAPS_Y, ALIGN, ACC)
        part *= share(x_out, j, low_width, width, MODE, TAPS_X, ALIGN, ACC)
        read = inside
        if MODE != "blocks":
            read = read & (i < low_height) & (j < low_width)
        if MODE == "area":  # Windows of fewer inputs than the largest.
            read = read & (part != 0)
        value = tl.load(place + (i * low_width + j) * steps[2], mask=read, other=0.0).to(ACC)
        if NORM:
            value = (value - mean) * factor + bias
            value = tl.where(value < 0, 0.0, value)  # NaN stays NaN.
        total += tl.where(read, value * part, 0.0)
    return total


# Fixed, because it adds to the running statistics: timing would run it many times.
@triton.jit
def _apply_kernel(
    xs, out, weights, biases, running_means, running_vars, parts, mean_out, rstd_out,
    batch, maps, height, width, out_b, out_c, out_p, heights, widths, steps, lengths,
    parameter_steps, NORM: tl.constexpr, TRAINING: tl.constexpr, MOMENTUM: tl.constexpr,
    EPS: tl.constexpr, MODES: tl.constexpr, ALIGN: tl.constexpr, TAPS: tl.constexpr,
    OUTPUTS: tl.constexpr, PARTS: tl.constexpr, PIXELS: tl.constexpr, MAPS: tl.constexpr,
    INDEX: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(1) * MAPS + tl.arange(0, MAPS)[None, :]
    n = tl.cast(tl.program_id(0), INDEX) * PIXELS + tl.arange(0, PIXELS)[:, None]
    pixels = tl.cast(height, INDEX) * width
    inside = (n < batch * pixels) & (m < maps)
    b, p = n // pixels, n % pixels
    y, x = p // width, p % width
    total = tl.zeros([PIXELS, MAPS], ACC)
    for scale in tl.static_range(len(xs)):
        mean, factor, bias = 0.0, 0.0, 0.0
        if NORM:
            count = tl.cast(batch, INDEX) * heights[scale] * widths[scale]
            mean, factor, bias = _norm_of(
                weights[scale], biases[scale], running_means[scale], running_vars[scale], parts,
                mean_out, rstd_out, scale, m, maps, count, lengths[scale], parameter_steps[scale],
                TRAINING, MOMENTUM, EPS, PARTS, INDEX, ACC,
            )  # fmt: skip
        total += _gathered(
            xs[scale], b, y, x, m.to(INDEX), inside, heights[scale], widths[scale], height, width,
            steps[scale], mean, factor, bias, NORM, entry(MODES, scale), ALIGN,
            entry(TAPS, scale, 0), entry(TAPS, scale, 1), INDEX, ACC,
        )  # fmt: skip
    to = out + (b * out_b + p * out_p + m.to(INDEX) * out_c)
    tl.store(to, total.to(out.dtype.element_ty), mask=inside)


def _apply(
    maps: Tensors,
    norms: tuple[tuple[torch.Tensor, ...] | None, ...],
    statistics: tuple[torch.Tensor | None, ...],
    parts: Parts,
    size: tuple[int, int],
    mode: str,
    align_corners: bool,
    **settings: object,
) -> torch.Tensor:
    """Sum of the maps, normalised if there are norms, resampled to `size`."""
    first = maps[0]
    batch, channels = first.shape[:2]
    out = empty_like_first(first, size)
    tile = tile_of(channels, _APPLY_TILE, first.dtype)
    parameter_steps = tuple(
        (0, 0, 0, 0) if norms[0] is None else tuple(values[i].stride(0) for values in norms)
        for i in range(len(maps))
    )  # fmt: skip
    grid = (triton.cdiv(max(batch, 1) * size[0] * size[1], tile.pixels), tile.chunks)
    _apply_kernel[grid](
        tuple(maps), out, *norms, *statistics, batch, channels, *size, *pixel_steps(out),
        *sizes_of(maps), parts.lengths, parameter_steps, PARTS=parts.count, PIXELS=tile.pixels,
        MAPS=tile.maps, INDEX=offset_type(*maps, out), ACC=accumulation(first.dtype),
        num_warps=4 if torch.version.hip else 8,
        **resampling(maps, size, mode, align_corners), **settings,
    )  # fmt: skip
    return out


def resample_attention(
    maps: Tensors, size: list[int], mode: str, align_corners: bool
) -> torch.Tensor:
    """Sum of maps[i] (B, M, h_i, w_i) resampled to size -> (B, M, H, W)."""
    height, width = size
    if maps[0].shape[0] == 0:
        return empty_like_first(maps[0], (height, width))
    return _apply(
        [with_rows(m) for m in maps], (None,) * 4, (None,) * 3, Parts(1, (0,) * len(maps)),
        (height, width), mode, align_corners, NORM=False, TRAINING=False, MOMENTUM=0.0, EPS=0.0,
    )  # fmt: skip


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
    tile = tile_of(channels, _STATISTICS_TILE, dtype)
    parts = parts_of(maps, tile.pixels)
    shape = (len(maps), parts.count, 2, channels) if training else (0,)
    sums = maps[0].new_empty(shape, dtype=dtype)
    if training:
        _statistics_kernel[(parts.count, len(maps), tile.chunks)](
            tuple(maps), sums, batch, channels, tuple(m.shape[2] * m.shape[3] for m in maps),
            parts.lengths, tuple(pixel_steps(m) for m in maps),
            PARTS=parts.count, PIXELS=tile.pixels, MAPS=tile.maps,
            INDEX=offset_type(*maps), ACC=accumulation(maps[0].dtype),
        )  # fmt: skip
    norms = tuple(map(tuple, (weights, biases, running_means, running_vars)))
    attention = _apply(
        maps, norms, (sums, mean, rstd), parts, (size[0], size[1]), mode, align_corners,
        NORM=True, TRAINING=training, MOMENTUM=momentum, EPS=eps,
    )  # fmt: skip
    return attention, mean, rstd
