"""Boxes of the guided views: one launch, one program per image and view.

A program walks over the pixels of a tile of columns, tile of rows by tile of rows, upsamples the
map where it stands, and keeps for every column the first and the last row that pass. The map is
read through the caches.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from magsd_kernels.triton._common import block, tile, tunable, with_warps
from magsd_kernels.triton._guide import (
    MAP_TILE,
    blended,
    map_of,
    padded_extent,
    sample_at,
    step_of,
    threshold_of,
)

# Pixels in flight, and warps: many, because there are few programs.
_CONFIGS = [
    *with_warps(16, TILE=tile(2048)),
    *with_warps(8, registers=144, TILE=tile(2048)),
    *with_warps(16, registers=96, TILE=tile(4096)),
]
_COLUMNS = tile(2048)
_FAR: tl.constexpr = tl.constexpr(2147483647)  # the first row or column where none is found


@tunable(_CONFIGS, ["height", "width", "low_height", "low_width"])
@triton.jit
def _boxes_kernel(
    attention, index, theta, boxes, batch, maps, low_height, low_width, height, width,
    step_b, step_m, step_y, step_x, step_index, step_index_view, step_theta, step_theta_view,
    FIRST: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, ALIGN: tl.constexpr,
    TILE: tl.constexpr, COLUMNS: tl.constexpr, MAP_TILE: tl.constexpr,
):  # fmt: skip
    ROWS: tl.constexpr = TILE // COLUMNS
    b = tl.program_id(0).to(tl.int64)
    view = FIRST + STRIDE * tl.program_id(1)
    if index is not None:
        index += view * step_index_view
    image_map = map_of(attention, index, b, maps, step_b, step_m, step_index)
    share = tl.load(theta + b * step_theta + view * step_theta_view)
    threshold = threshold_of(image_map, share, low_height, low_width, step_y, step_x, MAP_TILE)
    scale_y = step_of(low_height, height, ALIGN, tl.float32)
    scale_x = step_of(low_width, width, ALIGN, tl.float32)
    top, left = tl.full([], _FAR, tl.int32), tl.full([], _FAR, tl.int32)
    bottom, right = tl.full([], -1, tl.int32), tl.full([], -1, tl.int32)
    for first_x in range(0, width, COLUMNS):
        x = first_x + tl.arange(0, COLUMNS)[None, :]
        near, far, across = sample_at(x, low_width, scale_x, ALIGN)
        near, far = near * step_x, far * step_x
        first = tl.full([ROWS, COLUMNS], _FAR, tl.int32)
        last = tl.full([ROWS, COLUMNS], -1, tl.int32)
        for first_y in range(0, height, ROWS):
            y = first_y + tl.arange(0, ROWS)[:, None]
            upper, lower, down = sample_at(y, low_height, scale_y, ALIGN)
            upper, lower = image_map + upper * step_y, image_map + lower * step_y
            value = blended(upper, lower, near, far, down, across)
            passed = (value >= threshold) & (y < height)
            first = tl.where(passed, tl.minimum(first, y), first)
            last = tl.where(passed, y, last)
        found = (last >= 0) & (x < width)
        top = tl.minimum(top, tl.min(tl.where(found, first, _FAR)))
        bottom = tl.maximum(bottom, tl.max(tl.where(found, last, -1)))
        left = tl.minimum(left, tl.min(tl.where(found, x, _FAR)))
        right = tl.maximum(right, tl.max(tl.where(found, x, -1)))
    start_y, stop_y = padded_extent(top, bottom, height, PADDING)
    start_x, stop_x = padded_extent(left, right, width, PADDING)
    box = boxes + (tl.program_id(1) * batch + b) * 4
    tl.store(box, start_y)
    tl.store(box + 1, start_x)
    tl.store(box + 2, stop_y)
    tl.store(box + 3, stop_x)


def find_boxes(
    attention: torch.Tensor,
    index: torch.Tensor | None,
    theta: torch.Tensor,
    size: tuple[int, int],
    padding: float,
    align_corners: bool,
    views: range = range(1),
) -> torch.Tensor:
    """Boxes (views, B, 4) int32 of some columns of theta (B, 3), or of theta (B,)."""
    batch, maps, low_height, low_width = attention.shape
    height, width = size
    boxes = theta.new_empty((len(views), batch, 4), dtype=torch.int32)
    if batch == 0:
        return boxes
    of_index = (0, 0) if index is None else (*index.stride(), 0)[:2]
    _boxes_kernel[(batch, len(views))](
        attention, index, theta, boxes, batch, maps, low_height, low_width, height, width,
        *attention.stride(), *of_index, *(*theta.stride(), 0)[:2],
        FIRST=views.start, STRIDE=views.step, PADDING=padding, ALIGN=align_corners,
        COLUMNS=block(width, _COLUMNS), MAP_TILE=block(low_height * low_width, MAP_TILE),
        enable_fp_fusion=False,
    )  # fmt: skip
    return boxes
