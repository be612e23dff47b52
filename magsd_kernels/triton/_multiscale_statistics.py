"""Mean and deviation of every map over a batch, for multiscale attention. Two launches:

- a program takes a part of the pixels of one scale and writes its mean and its sum of squared
  deviations, by Welford's recurrence, so that no digits are lost to a far mean or value. Every
  program loads about as much, whatever the scales' sizes;
- a program per scale combines the parts of its maps (Chan et al. 1983), always in the same order,
  and updates the running statistics.
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
    with_warps,
)
from magsd_kernels.triton._scales import (
    COMBINED,
    Tensors,
    parameter_steps,
    partition,
    parts_in,
    tile_of,
)

_TILE = 4096  # elements in flight
_CONFIGS = [*with_warps(8, STAGES=3), *with_warps(8, STAGES=1)]


@triton.jit
def _statistics_part(
    x, to, part, batch, maps, pixels, length, steps,
    PIXELS: tl.constexpr, MAPS: tl.constexpr, STAGES: tl.constexpr, INDEX: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Mean and squared deviations of one part of one scale -> to (2, M)."""
    m = tl.program_id(1) * MAPS + tl.arange(0, MAPS)[None, :]
    present = m < maps
    total = tl.cast(batch, INDEX) * pixels
    begin = tl.minimum(tl.cast(part, INDEX) * length, total)
    end = tl.minimum(begin + length, total)
    step_b, step_c, step_p = steps
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
    tl.store(to + m, all_mean + shift, mask=present)
    tl.store(to + maps + m, deviation, mask=present)


@tunable(_CONFIGS, ["maps", "pixels", "lengths", "steps"])
@triton.jit
def _statistics_kernel(
    xs, parts, batch, maps, pixels, lengths, steps,
    PIXELS: tl.constexpr, MAPS: tl.constexpr, STAGES: tl.constexpr, INDEX: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Mean and squared deviations of every part of every scale -> parts (all parts, 2, M)."""
    first = 0
    for scale in tl.static_range(len(xs)):
        part = tl.program_id(0) - first
        count = parts_in(batch, pixels[scale], lengths[scale], INDEX)
        if (part >= 0) & (part < count):
            _statistics_part(
                xs[scale], parts + tl.program_id(0) * 2 * maps, part, batch, maps, pixels[scale],
                lengths[scale], steps[scale], PIXELS, MAPS, STAGES, INDEX, ACC,
            )  # fmt: skip
        first += count


@triton.jit
def _combined(
    parts, count, m, maps, total, length, ROWS: tl.constexpr, MAPS: tl.constexpr,
    INDEX: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Mean and biased variance of one scale's maps, from its parts (count, 2, M)."""
    row = tl.arange(0, ROWS)[:, None]
    mean = tl.zeros([1, MAPS], ACC)
    for start in range(0, count, ROWS):
        part = start + row
        size = tl.minimum(tl.maximum(total - part.to(INDEX) * length, 0), length).to(ACC)
        inside = (part < count) & (m < maps)
        mean_of_part = tl.load(parts + part * 2 * maps + m, mask=inside, other=0.0)
        mean += tl.sum(mean_of_part * size, 0)[None, :]
    mean /= tl.cast(total, ACC)
    squares = tl.zeros([1, MAPS], ACC)
    for start in range(0, count, ROWS):
        part = start + row
        size = tl.minimum(tl.maximum(total - part.to(INDEX) * length, 0), length).to(ACC)
        inside = (part < count) & (m < maps)
        at = parts + part * 2 * maps + m
        apart = tl.load(at, mask=inside, other=0.0) - mean
        deviation = tl.load(at + maps, mask=inside, other=0.0)
        squares += tl.sum(deviation + apart * apart * size, 0)[None, :]
    return mean, squares / tl.cast(total, ACC)


@triton.jit
def _update(running, at, present, momentum: tl.constexpr, value):
    """Running <- (1 - momentum) running + momentum value, rounded once."""
    keep = tl.full([], 1 - momentum, value.dtype)
    take = tl.full([], momentum, value.dtype)
    old = tl.load(running + at, mask=present, other=0.0).to(value.dtype)
    tl.store(running + at, (keep * old + take * value).to(running.dtype.element_ty), mask=present)


# Fixed, because it adds to the running statistics: timing would run it many times.
@triton.jit
def _combine_kernel(
    parts, running_means, running_vars, mean_out, rstd_out, batch, maps, pixels, lengths,
    parameter_steps, MOMENTUM: tl.constexpr, EPS: tl.constexpr, ROWS: tl.constexpr,
    MAPS: tl.constexpr, INDEX: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Mean and 1 / standard deviation (scales, M); the running statistics of every scale."""
    m = tl.program_id(1) * MAPS + tl.arange(0, MAPS)[None, :]
    present = m < maps
    first = 0
    for scale in tl.static_range(len(running_means)):
        count = parts_in(batch, pixels[scale], lengths[scale], INDEX)
        if tl.program_id(0) == scale:
            total = tl.cast(batch, INDEX) * pixels[scale]
            mean, variance = _combined(
                parts + first * 2 * maps, count, m, maps, total, lengths[scale],
                ROWS, MAPS, INDEX, ACC,
            )  # fmt: skip
            tl.store(mean_out + scale * maps + m, mean, mask=present)
            rstd = 1.0 / tl.sqrt(variance + tl.full([], EPS, ACC))
            tl.store(rstd_out + scale * maps + m, rstd, mask=present)
            unbiased = variance * (tl.cast(total, ACC) / tl.cast(total - 1, ACC))
            steps = parameter_steps[scale]
            _update(running_means[scale], m * steps[0], present, MOMENTUM, mean)
            _update(running_vars[scale], m * steps[1], present, MOMENTUM, unbiased)
        first += count


def batch_statistics(
    maps: Tensors,
    running_means: Tensors,
    running_vars: Tensors,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    momentum: float,
    eps: float,
) -> None:
    """Write mean and rstd (scales, M) of maps[i] (B, M, h_i, w_i), and the running statistics."""
    batch, channels = maps[0].shape[:2]
    tile = tile_of(channels, _TILE, mean.dtype)
    parts = partition(maps, tile.pixels)
    shape = (sum(parts.counts), 2, channels)
    written = maps[0].new_empty(shape, dtype=accumulation_dtype(maps[0].dtype))
    sizes = (batch, channels, tuple(m.shape[2] * m.shape[3] for m in maps), parts.lengths)
    settings = {"INDEX": offset_type(*maps), "ACC": accumulation(maps[0].dtype), "MAPS": tile.maps}
    _statistics_kernel[(sum(parts.counts), tile.chunks)](
        tuple(maps), written, *sizes, tuple(pixel_steps(m) for m in maps),
        PIXELS=tile.pixels, **settings,
    )  # fmt: skip
    _combine_kernel[(len(maps), tile.chunks)](
        written, tuple(running_means), tuple(running_vars), mean, rstd, *sizes,
        parameter_steps((running_means, running_vars), len(maps)), MOMENTUM=momentum, EPS=eps,
        ROWS=COMBINED, num_warps=4, **settings,
    )  # fmt: skip
