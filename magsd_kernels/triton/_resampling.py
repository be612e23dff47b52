"""Area, bilinear and nearest resampling in one dimension, in a kernel, and their adjoints.

An output o reads the inputs first_input(o) + k, k < a number known to the host, and weighs each by
weight_of(o, i), which is 0 where o does not read i; the adjoint walks from an input over the
outputs first_output(i) + k with the same weights. TAPS is that number; "blocks" is area where every
output reads its own TAPS inputs, so that no weight is computed. The type of o or i must hold the
product of two sides. Source: torch's adaptive_avg_pool2d and interpolate.

The bilinear rule rounds as written where it is compiled with `enable_fp_fusion=False`, and
divisions of float32 are correctly rounded, so that positions equal the reference's.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl


@triton.constexpr_function
def entry(values, *places):
    """An entry of a constexpr tuple, or of a tuple in it; Triton 3.6 loses that it is constexpr."""
    for place in places:
        values = values[place]
    return values


@triton.jit
def bilinear_scale(size_in, size_out, ALIGN: tl.constexpr, REAL: tl.constexpr):
    """Inputs per output of a bilinear resize."""
    if ALIGN:
        over = tl.cast(size_in - 1, REAL)
        under = tl.cast(tl.maximum(size_out - 1, 1), REAL)
    else:
        over = tl.cast(size_in, REAL)
        under = tl.cast(size_out, REAL)
    # Chosen by the compiler: div_rn is for float32 alone.
    return over / under if over.dtype.is_fp64() else tl.div_rn(over, under)


@triton.jit
def _bilinear_position(o, scale, ALIGN: tl.constexpr):
    """Where outputs `o` lie among the inputs, before the last input bounds it."""
    if ALIGN:
        position = tl.cast(o, scale.dtype) * scale
    else:
        # A Python constant would be float32 in a float64 product.
        position = tl.maximum((tl.cast(o, scale.dtype) + 0.5) * scale - 0.5, 0.0)
    return position


@triton.jit
def bilinear_inputs(o, size_in, scale, ALIGN: tl.constexpr):
    """The two inputs that outputs `o` read, and the weight of the second."""
    position = _bilinear_position(o, scale, ALIGN)
    lower = tl.minimum(position.to(tl.int32), size_in - 1)
    upper = tl.minimum(lower + 1, size_in - 1)
    return lower, upper, position - tl.cast(lower, scale.dtype)


@triton.jit
def bilinear_outputs(i, size_in, size_out, scale, ALIGN: tl.constexpr):
    """From which to which output those lie that read inputs i; none where i is not an input."""
    rate = 1.0 / tl.maximum(scale, 1e-30)
    shift = 0.0
    if not ALIGN:
        shift = 0.5
    at = tl.cast(i, scale.dtype) + shift
    most = tl.cast(size_out, scale.dtype)
    # An output reads i if its position lies less than 1 from i; rounding may move a bound by less
    # than an output. The first and the last input also take what is clamped to them.
    low = tl.floor((at - 1.0) * rate - shift)
    high = tl.floor((at + 1.0) * rate - shift) + 2.0
    low = tl.where(i <= 0, 0, tl.minimum(tl.maximum(low, 0.0), most).to(tl.int32))
    high = tl.where(
        i >= size_in - 1, size_out, tl.minimum(tl.maximum(high, 0.0), most).to(tl.int32)
    )
    return low, tl.where((i >= 0) & (i < size_in), high, low)


@triton.jit
def bilinear_weight(o, i, size_in, scale, ALIGN: tl.constexpr):
    """With what weight outputs o read inputs i: `bilinear_inputs` as a tent around i."""
    position = _bilinear_position(o, scale, ALIGN)
    position = tl.minimum(position, tl.cast(size_in - 1, scale.dtype))
    return tl.maximum(1.0 - tl.abs(position - tl.cast(i, scale.dtype)), 0.0)


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
        scale = bilinear_scale(size_in, size_out, ALIGN, REAL)
        first, _, _ = bilinear_inputs(o, size_in, scale, ALIGN)
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
        scale = bilinear_scale(size_in, size_out, ALIGN, tl.float32)
        shift = 0.0
        if not ALIGN:
            shift = 0.5
        # One earlier than rounding could ask for.
        place = (tl.cast(i, tl.float32) - 1.0 + shift) / tl.maximum(scale, 1e-30) - shift
        low = tl.minimum(tl.floor(place) - 1.0, tl.cast(size_out, tl.float32)).to(tl.int32)
        first = tl.where(i <= 0, 0, tl.maximum(low, 0))
    return first


@triton.jit
def weight_of(
    o, i, size_in, size_out, MODE: tl.constexpr, TAPS: tl.constexpr, ALIGN: tl.constexpr,
    REAL: tl.constexpr,
):  # fmt: skip
    """With what weight output o reads input i."""
    if MODE == "blocks":
        weight = tl.full([], 1.0 / TAPS, REAL)
    elif MODE == "area":
        begin = o * size_in // size_out
        end = ((o + 1) * size_in + size_out - 1) // size_out
        read = (i >= begin) & (i < end)
        weight = tl.where(read, 1.0 / tl.cast(end - begin, REAL), 0.0)
    elif MODE == "nearest":
        weight = (_nearest_index(o, size_in, size_out) == i).to(REAL)
    else:
        scale = bilinear_scale(size_in, size_out, ALIGN, REAL)
        lower, upper, of_upper = bilinear_inputs(o, size_in, scale, ALIGN)
        weight = tl.where(lower == i, 1.0 - of_upper, 0.0) + tl.where(upper == i, of_upper, 0.0)
    return weight


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
