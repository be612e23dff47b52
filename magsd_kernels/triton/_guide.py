"""The guide of a view in a kernel: upsampled map, threshold, box, paste corner.

Rounds as written: kernels that call this are compiled with `enable_fp_fusion=False`, so that boxes
and masks equal the reference's. `map_sizes` are maps, height and width of the attention,
`map_steps` its four steps.
"""

from __future__ import annotations

import triton
import triton.language as tl

from magsd_kernels.triton._common import tile
from magsd_kernels.triton._resampling import bilinear_inputs, bilinear_scale

MAP_TILE = tile(256)  # elements of a low-resolution map in flight, at the most


@triton.jit
def map_of(attention, index, b, maps, map_steps, step_index):
    """Pointer to the map that image b's index names; one outside counts as the nearest inside."""
    m = 0
    if index is not None:
        m = tl.minimum(tl.maximum(tl.load(index + b * step_index), 0), maps - 1)
    return attention + b * map_steps[0] + m * map_steps[1]


@triton.jit
def threshold_of(image_map, theta, map_sizes, map_steps, TILE: tl.constexpr):
    """Theta * (maximum of the low-resolution map); NaN if the map holds one."""
    _, height, width = map_sizes
    peak = tl.full([TILE], -float("inf"), tl.float32)
    found_nan = tl.zeros([TILE], tl.int32)
    for start in range(0, height * width, TILE):
        p = start + tl.arange(0, TILE)
        value = tl.load(
            image_map + p // width * map_steps[2] + p % width * map_steps[3],
            mask=p < height * width,
            other=-float("inf"),
        ).to(tl.float32)
        found_nan = tl.maximum(found_nan, (value != value).to(tl.int32))
        peak = tl.where(value > peak, value, peak)
    threshold = theta * tl.max(peak, 0)
    return tl.where(tl.max(found_nan, 0) > 0, float("nan"), threshold)


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
    attention, index, theta, b, y, x, height, width, map_sizes, map_steps, guide_steps,
    FLOOR: tl.constexpr, ALIGN: tl.constexpr, MAP_TILE: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    """[U < t] + floor at rows y (N, 1) and columns x (1, N) of the image."""
    maps, low_height, low_width = map_sizes
    step_index, step_theta = guide_steps
    image_map = map_of(attention, index, b, maps, map_steps, step_index)
    share = tl.load(theta + b * step_theta)
    threshold = threshold_of(image_map, share, map_sizes, map_steps, MAP_TILE)
    scale_y = bilinear_scale(low_height, height, ALIGN, tl.float32)
    scale_x = bilinear_scale(low_width, width, ALIGN, tl.float32)
    top, bottom, down = bilinear_inputs(y, low_height, scale_y, ALIGN)
    left, right, across = bilinear_inputs(x, low_width, scale_x, ALIGN)
    upper, lower = image_map + top * map_steps[2], image_map + bottom * map_steps[2]
    value = blended(upper, lower, left * map_steps[3], right * map_steps[3], down, across)
    floor = tl.full([], FLOOR, REAL)
    return (value < threshold).to(REAL) + floor


@triton.jit
def padded_extent(first, last, length, padding):
    """Interval from the first to the last entry that passes, padded; none passes: the whole."""
    upcast = tl.cast(length, tl.float64)
    start = tl.maximum(first.to(tl.float64) - padding * upcast, 0.0).to(tl.int32)
    stop = tl.minimum(last.to(tl.float64) + padding * upcast, upcast).to(tl.int32)
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
