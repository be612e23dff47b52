"""Area, bilinear and nearest resampling in one dimension, in a kernel, and their adjoints.

An output o reads the inputs first_input(o) + k, k < a number known to the host, and weighs each by
share(o, i), which is 0 where o does not read i; the adjoint walks from an input over the outputs
first_output(i) + k with the same shares. Source: torch's adaptive_avg_pool2d and interpolate.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from magsd_kernels.triton._guide import sample_at, step_of


@triton.jit
def _nearest_index(o, size_in, size_out):
    """Input of output o under nearest; torch computes it in float32 for every dtype."""
    scale = tl.div_rn(tl.cast(size_in, tl.float32), tl.cast(size_out, tl.float32))
    return tl.minimum(tl.floor(tl.cast(o, tl.float32) * scale).to(tl.int32), size_in - 1)


@triton.jit
def first_input(o, size_in, size_out, MODE: tl.constexpr, ALIGN: tl.constexpr, REAL: tl.constexpr):
    """The first input that output o reads."""
    if MODE == "area":
        return (tl.cast(o, tl.int64) * size_in // size_out).to(tl.int32)
    if MODE == "nearest":
        return _nearest_index(o, size_in, size_out)
    lower, _, _ = sample_at(o, size_in, step_of(size_in, size_out, ALIGN, REAL), ALIGN)
    return lower


@triton.jit
def first_output(i, size_in, size_out, MODE: tl.constexpr, ALIGN: tl.constexpr):
    """An output at or before the first that reads input i."""
    low = (tl.cast(i, tl.int64) * size_out // size_in).to(tl.int32)
    if MODE == "nearest":
        low = low - 1
    if MODE == "bilinear":
        step = step_of(size_in, size_out, ALIGN, tl.float32)
        shift = 0.0
        if not ALIGN:
            shift = 0.5
        # One earlier than rounding could ask for.
        place = (tl.cast(i, tl.float32) - 1.0 + shift) / tl.maximum(step, 1e-30) - shift
        low = tl.minimum(tl.floor(place) - 1.0, tl.cast(size_out, tl.float32)).to(tl.int32)
    return tl.where(i <= 0, 0, tl.maximum(low, 0))


@triton.jit
def share(o, i, size_in, size_out, MODE: tl.constexpr, ALIGN: tl.constexpr, REAL: tl.constexpr):
    """With what weight output o reads input i."""
    if MODE == "area":
        begin = (tl.cast(o, tl.int64) * size_in // size_out).to(tl.int32)
        end = ((tl.cast(o + 1, tl.int64) * size_in + size_out - 1) // size_out).to(tl.int32)
        read = (i >= begin) & (i < end)
        return tl.where(read, 1.0 / tl.cast(end - begin, REAL), 0.0)
    if MODE == "nearest":
        return (_nearest_index(o, size_in, size_out) == i).to(REAL)
    lower, upper, weight = sample_at(o, size_in, step_of(size_in, size_out, ALIGN, REAL), ALIGN)
    return tl.where(lower == i, 1.0 - weight, 0.0) + tl.where(upper == i, weight, 0.0)


def most_inputs(size_in: int, size_out: int, mode: str) -> int:
    """How many inputs an output reads at the most."""
    if mode != "area":
        return {"nearest": 1, "bilinear": 2}[mode]
    if size_in % size_out == 0:
        return size_in // size_out
    return min(size_in, math.ceil(size_in / size_out) + 1)


def most_outputs(size_in: int, size_out: int, mode: str, align_corners: bool) -> int:
    """How many outputs from `first_output` on may read an input."""
    if size_in == 1:
        return size_out
    if mode == "area":
        if size_in % size_out == 0:
            return 1
        return min(size_out, math.ceil(size_out / size_in) + 1)
    if mode == "nearest":
        return min(size_out, math.ceil(size_out / size_in) + 3)
    ratio = (size_out - 1) / (size_in - 1) if align_corners else size_out / size_in
    return min(size_out, math.ceil(2 * ratio) + 4)
