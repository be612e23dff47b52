"""The guide of a view in a kernel: sampling rule, upsampled map, threshold, paste corner.

Rounds as written: kernels that call this are compiled with `enable_fp_fusion=False`, and divisions
of float32 are correctly rounded, so that boxes and masks equal the reference's.
"""

from __future__ import annotations

import triton
import triton.language as tl

from magsd_kernels.triton._common import tile

MAP_TILE = tile(256)  # elements of a low-resolution map in flight, at the most


@triton.jit
def step_of(length, size, ALIGN: tl.constexpr, REAL: tl.constexpr):
    """Inputs per output of a bilinear resize from `length` to `size` entries."""
    if ALIGN:
        over = tl.cast(length - 1, REAL)
        under = tl.cast(tl.maximum(size - 1, 1), REAL)
    else:
        over = tl.cast(length, REAL)
        under = tl.cast(size, REAL)
    # Chosen by the compiler: div_rn is for float32 alone.
    return over / under if over.dtype.is_fp64() else tl.div_rn(over, under)


@triton.jit
def sample_at(o, length, step, ALIGN: tl.constexpr):
    """Lower and upper neighbour of outputs `o`, and the weight of the upper one."""
    if ALIGN:
        position = tl.cast(o, step.dtype) * step
    else:
        # A Python constant would be float32 in a float64 product.
        position = tl.maximum((tl.cast(o, step.dtype) + 0.5) * step - 0.5, 0.0)
    lower = tl.minimum(position.to(tl.int32), length - 1)
    upper = tl.minimum(lower + 1, length - 1)
    return lower, upper, position - tl.cast(lower, step.dtype)


@triton.jit
def map_of(attention, index, b, maps, step_b, step_m, step_index):
    """Pointer to the map that image b's index names; one outside counts as the nearest inside."""
    m = 0
    if index is not None:
        m = tl.minimum(tl.maximum(tl.load(index + b * step_index), 0), maps - 1)
    return attention + b * step_b + m * step_m


@triton.jit
def threshold_of(image_map, theta, height, width, step_y, step_x, TILE: tl.constexpr):
    """Theta * (maximum of the low-resolution map); NaN if the map holds one."""
    peak = tl.full([TILE], -float("inf"), tl.float32)
    spoilt = tl.zeros([TILE], tl.int32)
    for start in range(0, height * width, TILE):
        p = start + tl.arange(0, TILE)
        value = tl.load(
            image_map + p // width * step_y + p % width * step_x,
            mask=p < height * width,
            other=-float("inf"),
        ).to(tl.float32)
        spoilt = tl.maximum(spoilt, (value != value).to(tl.int32))
        peak = tl.where(value > peak, value, peak)
    threshold = theta * tl.max(peak, 0)
    return tl.where(tl.max(spoilt, 0) > 0, float("nan"), threshold)


@triton.jit
def upsampled(
    image_map, y, x, height, width, step_y, step_x, scale_y, scale_x, ALIGN: tl.constexpr
):
    """U at rows y (N, 1) and columns x (1, N) of the image, float32."""
    top, bottom, down = sample_at(y, height, scale_y, ALIGN)
    left, right, across = sample_at(x, width, scale_x, ALIGN)
    upper, lower = image_map + top * step_y, image_map + bottom * step_y
    return blended(upper, lower, left * step_x, right * step_x, down, across)


@triton.jit
def blended(upper, lower, left, right, down, across):
    """U between two rows of a map, pointers (N, 1), and two columns, offsets (1, N), float32."""
    a, b = tl.load(upper + left).to(tl.float32), tl.load(upper + right).to(tl.float32)
    c, d = tl.load(lower + left).to(tl.float32), tl.load(lower + right).to(tl.float32)
    top = a * (1.0 - across) + b * across
    bottom = c * (1.0 - across) + d * across
    return top * (1.0 - down) + bottom * down


@triton.jit
def factor_of(
    attention, index, theta, b, y, x, maps, low_height, low_width, height, width,
    step_b, step_m, step_y, step_x, step_index, step_theta,
    FLOOR: tl.constexpr, ALIGN: tl.constexpr, MAP_TILE: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    """[U < t] + floor at rows y (N, 1) and columns x (1, N)."""
    image_map = map_of(attention, index, b, maps, step_b, step_m, step_index)
    share = tl.load(theta + b * step_theta)
    threshold = threshold_of(image_map, share, low_height, low_width, step_y, step_x, MAP_TILE)
    value = upsampled(
        image_map, y, x, low_height, low_width, step_y, step_x,
        step_of(low_height, height, ALIGN, tl.float32),
        step_of(low_width, width, ALIGN, tl.float32), ALIGN,
    )  # fmt: skip
    floor = tl.full([], FLOOR, REAL)
    return (value < threshold).to(REAL) + floor


@triton.jit
def padded_extent(first, last, length, padding):
    """Interval from the first to the last entry that passes, padded; none passes: the whole."""
    wide = tl.cast(length, tl.float64)
    start = tl.maximum(first.to(tl.float64) - padding * wide, 0.0).to(tl.int32)
    stop = tl.minimum(last.to(tl.float64) + padding * wide, wide).to(tl.int32)
    stop = tl.maximum(stop, start + 1)
    none = first > last
    return tl.where(none, 0, start), tl.where(none, length, stop)


@triton.jit
def paste_start(u, extent, length):
    """Where a box of `extent` entries is pasted into `length`, for a uniform u in [0, 1)."""
    room = length - extent
    corner = tl.floor(u.to(tl.float64) * tl.cast(room + 1, tl.float64))
    # The comparison is false for NaN, which counts as 0.
    inside = tl.where(corner > 0, tl.minimum(corner, tl.cast(room, tl.float64)), 0.0)
    return inside.to(tl.int32)


@triton.jit
def box_of(boxes, b, height, width):
    """Rows and columns of a box, clamped to the image and holding at least one pixel."""
    top = tl.minimum(tl.maximum(tl.load(boxes + b * 4), 0), height - 1)
    left = tl.minimum(tl.maximum(tl.load(boxes + b * 4 + 1), 0), width - 1)
    bottom = tl.minimum(tl.maximum(tl.load(boxes + b * 4 + 2), top + 1), height)
    right = tl.minimum(tl.maximum(tl.load(boxes + b * 4 + 3), left + 1), width)
    return top, left, bottom - top, right - left
