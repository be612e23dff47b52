"""Area, bilinear and nearest resampling in one dimension, in a kernel, and their adjoints.

An output o reads the inputs first_input(o) + k, k < a number known to the host, and weighs each by
share(o, i), which is 0 where o does not read i; the adjoint walks from an input over the outputs
first_output(i) + k with the same shares. TAPS is that number; "blocks" is area where every output
reads its own TAPS inputs, so that no weight is computed. The type of o or i must hold the product
of two sides. Source: torch's adaptive_avg_pool2d and interpolate.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from magsd_kernels.triton._guide import sample_at, step_of


@triton.constexpr_function
def entry(values, *places):
    """An entry of a constexpr tuple, or of a tuple in it; Triton 3.6 loses that it is constexpr."""
    for place in places:
        values = values[place]
    return values


@triton.jit
def _nearest_index(o, size_in, size_out):
    """Input of output o under nearest; torch computes it in float32 for every dtype."""
    scale = tl.div_rn(tl.cast(size_in, tl.float32), tl.cast(size_out, tl.float32))
    return tl.minimum(tl.floor(tl.cast(o, tl.float32) * scale).to(tl.int32), size_in - 1)


@triton.jit
def first_input(
    o, size_in, size_out, MODE: tl.constexpr, TAPS: tl.constexpr, ALIGN: tl.constexpr,
    REAL: tl.constexpr,
):  # fmt: skip
    """The first input that output o reads."""
    if MODE == "blocks":
        first = o * TAPS
    elif MODE == "area":
        first = o * size_in // size_out
    elif MODE == "nearest":
        first = _nearest_index(o, size_in, size_out)
    else:
        first, _, _ = sample_at(o, size_in, step_of(size_in, size_out, ALIGN, REAL), ALIGN)
    return first


@triton.jit
def first_output(
    i, size_in, size_out, MODE: tl.constexpr, TAPS: tl.constexpr, ALIGN: tl.constexpr
):  # fmt: skip
    """An output at or before the first that reads input i."""
    if MODE == "blocks":
        first = i // TAPS
    elif MODE == "area":
        first = i * size_out // size_in
    elif MODE == "nearest":
        first = tl.maximum(i * size_out // size_in - 1, 0)
    else:
        step = step_of(size_in, size_out, ALIGN, tl.float32)
        shift = 0.0
        if not ALIGN:
            shift = 0.5
        # One earlier than rounding could ask for.
        place = (tl.cast(i, tl.float32) - 1.0 + shift) / tl.maximum(step, 1e-30) - shift
        low = tl.minimum(tl.floor(place) - 1.0, tl.cast(size_out, tl.float32)).to(tl.int32)
        first = tl.where(i <= 0, 0, tl.maximum(low, 0))
    return first


@triton.jit
def share(
    o, i, size_in, size_out, MODE: tl.constexpr, TAPS: tl.constexpr, ALIGN: tl.constexpr,
    REAL: tl.constexpr,
):  # fmt: skip
    """With what weight output o reads input i."""
    if MODE == "blocks":
        part = tl.full([], 1.0 / TAPS, REAL)
    elif MODE == "area":
        begin = o * size_in // size_out
        end = ((o + 1) * size_in + size_out - 1) // size_out
        read = (i >= begin) & (i < end)
        part = tl.where(read, 1.0 / tl.cast(end - begin, REAL), 0.0)
    elif MODE == "nearest":
        part = (_nearest_index(o, size_in, size_out) == i).to(REAL)
    else:
        lower, upper, weight = sample_at(o, size_in, step_of(size_in, size_out, ALIGN, REAL), ALIGN)
        part = tl.where(lower == i, 1.0 - weight, 0.0) + tl.where(upper == i, weight, 0.0)
    return part


def kernel_mode(size_in: tuple[int, int], size_out: tuple[int, int], mode: str) -> str:
    """The mode by its name in a kernel: "blocks" is area with whole ratios, without a division."""
    whole = all(a % b == 0 for a, b in zip(size_in, size_out, strict=True))
    return "blocks" if mode == "area" and whole else mode


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
