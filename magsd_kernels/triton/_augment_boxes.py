"""Boxes of the guided views: one launch, one program per image and view.

A program walks over the pixels of a tile of columns, tile of rows by tile of rows, upsamples the
map where it stands, and keeps for every column the first and the last row that pass. The map is
read through the caches. Where maps are to be drawn, a program first weighs all maps of its image.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from magsd_kernels.triton._common import block, pixel_steps, tile, tunable, with_warps
from magsd_kernels.triton._guide import MAP_TILE, blended, map_of, padded_extent, threshold_of
from magsd_kernels.triton._resampling import bilinear_inputs, bilinear_scale
from magsd_kernels.triton.attention_sampling import cumulative_weights, drawn_maps, weighing_tile

# Pixels in flight, and warps: many, because there are few programs.
_CONFIGS = [
    *with_warps(16, registers=96, TILE=tile(2048)),
    *with_warps(8, registers=144, TILE=tile(2048)),
]
_COLUMNS = tile(2048)
_FAR: tl.constexpr = tl.constexpr(2147483647)  # the first row or column where none is found


@triton.jit
def _draw(uniforms, index, cumulative, view, maps, uniform_steps, index_steps, MAPS: tl.constexpr):
    """A view's map, noted in the index."""
    one = tl.arange(0, 1)
    u = tl.load(uniforms + view * uniform_steps[1] + one)
    m = drawn_maps(cumulative, u, maps, MAPS)
    tl.store(index + view * index_steps[1] + one, m)
    return tl.sum(m, 0)


@tunable(_CONFIGS, ["size", "map_sizes"])
@triton.jit
def _boxes_kernel(
    attention, index, theta, uniforms, boxes, batch, size, map_sizes, map_steps, step_pixel,
    index_steps, theta_steps, uniform_steps,
    FIRST: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, ALIGN: tl.constexpr,
    EPS: tl.constexpr, MAPS: tl.constexpr, PIXELS: tl.constexpr,
    TILE: tl.constexpr, COLUMNS: tl.constexpr, MAP_TILE: tl.constexpr,
):  # fmt: skip
    ROWS: tl.constexpr = TILE // COLUMNS
    height, width = size
    maps, low_height, low_width = map_sizes
    step_y, step_x = map_steps[2], map_steps[3]
    b = tl.program_id(0).to(tl.int64)
    view = FIRST + STRIDE * tl.program_id(1)
    if uniforms is not None:
        image = attention + b * map_steps[0]
        cumulative = cumulative_weights(
            image, maps, low_height * low_width, map_steps[1], step_pixel, EPS, MAPS, PIXELS
        )
        uniforms += b * uniform_steps[0]
        index += b * index_steps[0]
        m = _draw(uniforms, index, cumulative, view, maps, uniform_steps, index_steps, MAPS)
        if tl.program_id(1) == 0:  # and for the view without a box
            _draw(uniforms, index, cumulative, 1, maps, uniform_steps, index_steps, MAPS)
        image_map = image + m * map_steps[1]
    else:
        if index is not None:
            index += view * index_steps[1]
        image_map = map_of(attention, index, b, maps, map_steps, index_steps[0])
    share = tl.load(theta + b * theta_steps[0] + view * theta_steps[1])
    threshold = threshold_of(image_map, share, map_sizes, map_steps, MAP_TILE)
    scale_y = bilinear_scale(low_height, height, ALIGN, tl.float32)
    scale_x = bilinear_scale(low_width, width, ALIGN, tl.float32)
    top, left = tl.full([], _FAR, tl.int32), tl.full([], _FAR, tl.int32)
    bottom, right = tl.full([], -1, tl.int32), tl.full([], -1, tl.int32)
    for first_x in range(0, width, COLUMNS):
        x = first_x + tl.arange(0, COLUMNS)[None, :]
        near, far, across = bilinear_inputs(x, low_width, scale_x, ALIGN)
        near, far = near * step_x, far * step_x
        first = tl.full([ROWS, COLUMNS], _FAR, tl.int32)
        last = tl.full([ROWS, COLUMNS], -1, tl.int32)
        for first_y in range(0, height, ROWS):
            y = first_y + tl.arange(0, ROWS)[:, None]
            upper, lower, down = bilinear_inputs(y, low_height, scale_y, ALIGN)
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
    batch, *map_sizes = attention.shape
    boxes = theta.new_empty((len(views), batch, 4), dtype=torch.int32)
    if batch == 0:
        return boxes
    cut = {"MAPS": 1, "PIXELS": 1} if uniforms is None else weighing_tile(attention)
    _boxes_kernel[(batch, len(views))](
        attention, index, theta, uniforms, boxes, batch, size, tuple(map_sizes),
        attention.stride(), pixel_steps(attention)[2], index_steps=_steps(index),
        theta_steps=_steps(theta), uniform_steps=_steps(uniforms),
        FIRST=views.start, STRIDE=views.step, PADDING=padding, ALIGN=align_corners, EPS=eps, **cut,
        COLUMNS=block(size[1], _COLUMNS), MAP_TILE=block(math.prod(map_sizes[1:]), MAP_TILE),
        enable_fp_fusion=False,
    )  # fmt: skip
    return boxes


def _steps(columns: torch.Tensor | None) -> tuple[int, int]:
    """From image to image and from view to view of a tensor (B, views) or (B,)."""
    if columns is None:
        return (0, 0)
    return (columns.stride(0), columns.stride(1) if columns.dim() == 2 else 0)
