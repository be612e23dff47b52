"""Multiscale attention: batch norm, ReLU, resampling and the sum over the scales.

Training reads every projection twice forward and twice backward: for the batch's statistics
(`_multiscale_statistics.py`, two launches), and here, where a program owns a tile of output pixels
by maps and gathers, normalizes and sums what every output reads.

Backward alike (`_multiscale_backward.py`). No normalized or resampled map is stored. Evaluation and
resample_attention need the launch here only. Maps of either memory format are read by strides.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from magsd_kernels._layout import accumulation_dtype, is_channels_last
from magsd_kernels.triton._common import (
    accumulation,
    offset_type,
    pixel_steps,
    with_rows,
)
from magsd_kernels.triton._multiscale_backward import (
    multiscale_attention_backward,
    resample_attention_backward,
)
from magsd_kernels.triton._multiscale_statistics import batch_statistics
from magsd_kernels.triton._resampling import entry, first_input, weight_of
from magsd_kernels.triton._scales import (
    Tensors,
    empty_like_first,
    parameter_steps,
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

_APPLY_TILE = 1024  # elements in flight; few, since the attention of a small batch is small


@triton.jit
def _norm_of(
    weight, bias, running_mean, running_var, means, rstds, scale, m, maps, parameter_steps,
    TRAINING: tl.constexpr, EPS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One scale's mean, factor and bias; in evaluation the first program keeps the statistics."""
    present = m < maps
    at = scale * maps + m
    if TRAINING:
        mean = tl.load(means + at, mask=present, other=0.0)
        rstd = tl.load(rstds + at, mask=present, other=0.0)
    else:
        mean = tl.load(running_mean + m * parameter_steps[2], mask=present, other=0.0).to(ACC)
        variance = tl.load(running_var + m * parameter_steps[3], mask=present, other=0.0).to(ACC)
        rstd = 1.0 / tl.sqrt(variance + tl.full([], EPS, ACC))
        if tl.program_id(0) == 0:
            tl.store(means + at, mean, mask=present)
            tl.store(rstds + at, rstd, mask=present)
    gain = tl.load(weight + m * parameter_steps[0], mask=present, other=0.0).to(ACC)
    offset = tl.load(bias + m * parameter_steps[1], mask=present, other=0.0).to(ACC)
    return mean, rstd * gain, offset


@triton.jit
def _gathered(
    x, b, y, x_out, m, inside, low_height, low_width, height, width, steps, mean, factor, bias,
    NORM: tl.constexpr, MODE: tl.constexpr, ALIGN: tl.constexpr, TAPS: tl.constexpr,
    UNROLL: tl.constexpr, INDEX: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One scale's maps, normalized and rectified where there is a norm, at outputs (y, x_out)."""
    TAPS_Y: tl.constexpr = entry(TAPS, 0)
    TAPS_X: tl.constexpr = entry(TAPS, 1)
    first_y = first_input(y, low_height, height, MODE, TAPS_Y, ALIGN, ACC).to(INDEX)
    first_x = first_input(x_out, low_width, width, MODE, TAPS_X, ALIGN, ACC).to(INDEX)
    place = x + (b * steps[0] + m * steps[1])
    total = tl.zeros(inside.shape, ACC)
    for k in tl.range(TAPS_Y * TAPS_X, loop_unroll_factor=UNROLL):
        i = first_y + k // TAPS_X
        j = first_x + k % TAPS_X
        part = weight_of(y, i, low_height, height, MODE, TAPS_Y, ALIGN, ACC)
        part *= weight_of(x_out, j, low_width, width, MODE, TAPS_X, ALIGN, ACC)
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


@triton.jit
def _apply_kernel(
    xs, out, weights, biases, running_means, running_vars, means, rstds,
    batch, maps, height, width, out_steps, heights, widths, steps, parameter_steps,
    NORM: tl.constexpr, TRAINING: tl.constexpr, EPS: tl.constexpr, MODES: tl.constexpr,
    ALIGN: tl.constexpr, TAPS: tl.constexpr, OUTPUTS: tl.constexpr, PIXELS: tl.constexpr,
    MAPS: tl.constexpr, UNROLL: tl.constexpr, INDEX: tl.constexpr, ACC: tl.constexpr,
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
            mean, factor, bias = _norm_of(
                weights[scale], biases[scale], running_means[scale], running_vars[scale],
                means, rstds, scale, m, maps, parameter_steps[scale], TRAINING, EPS, ACC,
            )  # fmt: skip
        total += _gathered(
            xs[scale], b, y, x, m.to(INDEX), inside, heights[scale], widths[scale], height, width,
            steps[scale], mean, factor, bias, NORM, entry(MODES, scale), ALIGN,
            entry(TAPS, scale), UNROLL, INDEX, ACC,
        )  # fmt: skip
    to = out + (b * out_steps[0] + p * out_steps[2] + m.to(INDEX) * out_steps[1])
    tl.store(to, total.to(out.dtype.element_ty), mask=inside)


def _apply(
    maps: Tensors,
    norms: tuple[Tensors | None, ...],
    statistics: tuple[torch.Tensor | None, ...],
    size: tuple[int, int],
    mode: str,
    align_corners: bool,
    **settings: object,
) -> torch.Tensor:
    """Sum of the maps, normalized if there are norms, resampled to `size`."""
    first = maps[0]
    batch, channels = first.shape[:2]
    out = empty_like_first(first, size)
    tile = tile_of(channels, _APPLY_TILE, first.dtype)
    parameters = [None if values is None else tuple(values) for values in norms]
    # In rows of maps a thread takes eight elements, 16 bytes in half precision.
    warps = 4 if is_channels_last(first) else 8
    grid = (triton.cdiv(max(batch, 1) * size[0] * size[1], tile.pixels), tile.chunks)
    _apply_kernel[grid](
        tuple(maps), out, *parameters, *statistics, batch, channels, *size, pixel_steps(out),
        *sizes_of(maps), parameter_steps(norms, len(maps)), PIXELS=tile.pixels, MAPS=tile.maps,
        # In float64 what four inputs keep does not fit into registers.
        UNROLL=1 if first.dtype == torch.float64 else 4, INDEX=offset_type(*maps, out),
        ACC=accumulation(first.dtype), num_warps=warps // 2 if torch.version.hip else warps,
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
        [with_rows(m) for m in maps], (None,) * 4, (None,) * 2, (height, width), mode,
        align_corners, NORM=False, TRAINING=False, EPS=0.0,
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
    norms = (weights, biases, running_means, running_vars)
    if training:
        batch_statistics(maps, running_means, running_vars, mean, rstd, momentum, eps)
    attention = _apply(
        maps, norms, (mean, rstd), (size[0], size[1]), mode, align_corners,
        NORM=True, TRAINING=training, EPS=eps,
    )  # fmt: skip
    return attention, mean, rstd
