"""Adjoint of the guided views: the gradient of the images from those of the views.

It gathers, so that it is deterministic: every element of the gradient is written once, by the
program that owns it, and reads the elements of the views that it was spread over. For dim and patch
these are one and two. The crop is a product of two resizings, of rows and of columns, and so is its
adjoint: a program that owns a tile of rows first adds up the output rows that sample each of them,
in tiles that are read row by row, then picks from these sums the output columns that sample each
column. A box of h x w in an image of H x W gives every row about 2 H / h + 2 candidates and every
column 2 W / w + 2; both loops end where the box of the image at hand ends them, so that the work
over an image hardly depends on its box.
"""

from __future__ import annotations

import triton
import triton.language as tl

from magsd_kernels.triton._common import tile, tunable, with_warps
from magsd_kernels.triton._guide import box_of, factor_of, paste_start
from magsd_kernels.triton._resampling import bilinear_outputs, bilinear_scale, bilinear_weight


@triton.jit
def _crop_adjoint(
    grad, boxes, b, y, x, c, height, width, row, grad_y,
    INNER: tl.constexpr, ALIGN: tl.constexpr, OUTPUTS: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    """What rows y (N, 1) and elements (x, c) (1, K) of the image receive from the crop.

    grad (N, 1) points to the planes of the rows; a y below 0 is no row.
    """
    top, left, box_height, box_width = box_of(boxes, b, height, width)
    scale_y = bilinear_scale(box_height, height, ALIGN, REAL)
    scale_x = bilinear_scale(box_width, width, ALIGN, REAL)
    i, j = tl.where(y < 0, -1, y - top), x - left
    from_y, past_y = bilinear_outputs(i, box_height, height, scale_y, ALIGN)
    from_x, past_x = bilinear_outputs(j, box_width, width, scale_x, ALIGN)
    rows = tl.max(past_y - from_y)
    # A multiple of 16, so that whole vectors are read.
    begin = tl.min(tl.where(past_x > from_x, from_x, width)) * INNER // 16 * 16
    end = tl.where(rows > 0, tl.max(tl.where(past_x > from_x, past_x, 0)), 0) * INNER
    total = tl.zeros([y.shape[0], x.shape[1]], REAL)
    for start in range(begin, end, OUTPUTS):
        e = start + tl.arange(0, OUTPUTS)[None, :]
        sums = tl.zeros([y.shape[0], OUTPUTS], REAL)
        for k in range(rows):
            o = from_y + k
            weight = tl.where(o < past_y, bilinear_weight(o, i, box_height, scale_y, ALIGN), 0.0)
            line = grad + o.to(tl.int64) * grad_y
            # What is not sampled is not read, so that a NaN there does not count.
            value = tl.load(line + e, mask=(weight > 0) & (e < row), other=0.0).to(REAL)
            sums += value * weight
        # The output columns of every element that lie among these sums.
        first = tl.maximum(from_x, (start - c + INNER - 1) // INNER)
        past = tl.minimum(past_x, (start + OUTPUTS - c + INNER - 1) // INNER)
        place = tl.broadcast_to(first * INNER + c - start, total.shape)
        for k in range(tl.max(past - first)):
            o = first + k
            weight = tl.where(o < past, bilinear_weight(o, j, box_width, scale_x, ALIGN), 0.0)
            value = tl.gather(sums, tl.minimum(place + k * INNER, OUTPUTS - 1), 1)
            total += tl.where(weight > 0, value * weight, 0.0)
    return total


# As many warps as there are groups of 128 elements, in more registers than the 96 or 128 that ptxas
# would choose: there what the adjoint keeps of every column spills.
_CONFIGS = [
    *with_warps(8, registers=144, TILE=tile(1024)),
    *with_warps(4, registers=144, TILE=tile(512)),
]


@tunable(_CONFIGS, ["size"])
@triton.jit
def backward_kernel(
    mixed, dimmed, patched, result, mix_boxes, patch_boxes, offsets, attention, index, theta,
    size, mixed_steps, dimmed_steps, patched_steps, offset_steps, map_sizes, map_steps, guide_steps,
    INNER: tl.constexpr, WEIGHT: tl.constexpr, FLOOR: tl.constexpr, ALIGN: tl.constexpr,
    TILE: tl.constexpr, COLUMNS: tl.constexpr, MAP_TILE: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    """One program per image, tile of its rows (those of all planes), and tile of columns."""
    ROWS: tl.constexpr = TILE // COLUMNS
    planes, height, width, row = size
    tiles = tl.cdiv(planes * height, ROWS)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    r = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)[:, None]
    e = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    plane, y = (r // height).to(tl.int64), r % height
    x, c = e // INNER, e % INNER
    present = r < planes * height
    inside = present & (e < row)
    total = tl.zeros([ROWS, COLUMNS], REAL)
    if mixed is not None:
        grad = mixed + b * mixed_steps[0] + plane * mixed_steps[1]
        if WEIGHT != 1:
            own = tl.load(grad + y.to(tl.int64) * mixed_steps[2] + e, mask=inside, other=0.0).to(
                REAL
            )
            total += own * tl.full([], 1 - WEIGHT, REAL)
        crop = _crop_adjoint(
            grad, mix_boxes, b, tl.where(present, y, -1), x, c, height, width, row, mixed_steps[2],
            INNER, ALIGN, COLUMNS, REAL,
        )  # fmt: skip
        total += crop * tl.full([], WEIGHT, REAL)
    if dimmed is not None:
        grad = (
            dimmed
            + b * dimmed_steps[0]
            + plane * dimmed_steps[1]
            + y.to(tl.int64) * dimmed_steps[2]
        )
        factor = factor_of(
            attention, index, theta, b, y, x, height, width, map_sizes, map_steps, guide_steps,
            FLOOR, ALIGN, MAP_TILE, REAL,
        )  # fmt: skip
        total += tl.load(grad + e, mask=inside, other=0.0).to(REAL) * factor
    if patched is not None:
        grad = patched + b * patched_steps[0] + plane * patched_steps[1]
        top, left, box_height, box_width = box_of(patch_boxes, b, height, width)
        to_y = paste_start(tl.load(offsets + b * offset_steps[0]), box_height, height)
        to_x = paste_start(
            tl.load(offsets + b * offset_steps[0] + offset_steps[1]), box_width, width
        )
        covered = (y >= to_y) & (y < to_y + box_height) & (x >= to_x) & (x < to_x + box_width)
        own = grad + y.to(tl.int64) * patched_steps[2] + e
        total += tl.load(own, mask=inside & (covered == 0), other=0.0).to(REAL)
        copied = (y >= top) & (y < top + box_height) & (x >= left) & (x < left + box_width)
        source = grad + (y - top + to_y).to(tl.int64) * patched_steps[2] + e + (to_x - left) * INNER
        total += tl.load(source, mask=inside & copied, other=0.0).to(REAL)
    to = result + (b * planes * height + r) * row + e
    tl.store(to, total.to(result.dtype.element_ty), mask=inside)
