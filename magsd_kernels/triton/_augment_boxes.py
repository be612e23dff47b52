"""Boxes of the guided views: one launch, one program per image and view.

A program walks over the pixels of a tile of columns, tile of rows by tile of rows, upsamples the
map where it stands, and keeps for every column the first and the last row that pass. The map is
read through the caches. Where maps are to be drawn, a program first weighs all maps of its image.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from magsd_kernels.triton._common import block, pixel_steps, tile, tunable, with_warps
from magsd_kernels.triton._guide import (
    MAP_TILE,
    blended,
    map_of,
    padded_extent,
    sample_at,
    step_of,
    threshold_of,
)
from magsd_kernels.triton.attention_sampling import drawn_maps, shares_of, weighing_tile

# Pixels in flight, and warps: many, because there are few programs.
_CONFIGS = [
    *with_warps(16, registers=96, TILE=tile(2048)),
    *with_warps(8, registers=144, TILE=tile(2048)),
]
_COLUMNS = tile(2048)
_FAR: tl.constexpr = tl.constexpr(2147483647)  # the first row or column where none is found


@triton.jit
def _draw(uniforms, index, share, view, maps, step_view, step_index_view, MAPS: tl.constexpr):
    """A view's map, noted in the index."""
    one = tl.arange(0, 1)
    u = tl.load(uniforms + view * step_view + one)
    m = drawn_maps(share, u, maps, MAPS)
    tl.store(index + view * step_index_view + one, m)
    return tl.sum(m, 0)


@tunable(_CONFIGS, ["height", "width", "low_height", "low_width"])
@triton.jit
def _boxes_kernel(
    attention, index, theta, uniforms, boxes, batch, maps, low_height, low_width, height, width,
    step_b, step_m, step_y, step_x, step_index, step_index_view, step_theta, step_theta_view,
    step_pixel, step_uniform, step_uniform_view,
    FIRST: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, ALIGN: tl.constexpr,
    EPS: tl.constexpr, MAPS: tl.constexpr, PIXELS: tl.constexpr,
    TILE: tl.constexpr, COLUMNS: tl.constexpr, MAP_TILE: tl.constexpr,
):  # fmt: skip
    ROWS: tl.constexpr = TILE // COLUMNS
    b = tl.program_id(0).to(tl.int64)
    view = FIRST + STRIDE * tl.program_id(1)
    if uniforms is not None:
        image = attention + b * step_b
        share = shares_of(
            image, maps, low_height * low_width, step_m, step_pixel, EPS, MAPS, PIXELS
        )
        uniforms += b * step_uniform
        index += b * step_index
        m = _draw(uniforms, index, share, view, maps, step_uniform_view, step_index_view, MAPS)
        if tl.program_id(1) == 0:  # and for the view without a box
            _draw(uniforms, index, share, 1, maps, step_uniform_view, step_index_view, MAPS)
        image_map = image + m * step_m
    else:
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
    uniforms: torch.Tensor | None = None,
    eps: float = 0.0,
) -> torch.Tensor:
    """Boxes (views, B, 4) int32 of some columns of theta (B, 3), or of theta (B,).

    With uniforms, of the shape of theta, the maps are drawn, and index is written: for these views
    and for view 1. The maps have rows, see `with_rows`.
    """
    batch, maps, low_height, low_width = attention.shape
    height, width = size
    boxes = theta.new_empty((len(views), batch, 4), dtype=torch.int32)
    if batch == 0:
        return boxes
    of_index = (0, 0) if index is None else (*index.stride(), 0)[:2]
    of_uniforms, cut = (0, 0), {"MAPS": 1, "PIXELS": 1}
    if uniforms is not None:
        of_uniforms, cut = uniforms.stride(), weighing_tile(attention)
    _boxes_kernel[(batch, len(views))](
        attention, index, theta, uniforms, boxes, batch, maps, low_height, low_width, height, width,
        *attention.stride(), *of_index, *(*theta.stride(), 0)[:2],
        pixel_steps(attention)[2], *of_uniforms,
        FIRST=views.start, STRIDE=views.step, PADDING=padding, ALIGN=align_corners, EPS=eps, **cut,
        COLUMNS=block(width, _COLUMNS), MAP_TILE=block(low_height * low_width, MAP_TILE),
        enable_fp_fusion=False,
    )  # fmt: skip
    return boxes
