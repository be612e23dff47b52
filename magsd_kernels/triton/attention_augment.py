"""Attention-guided views: boxes, crop and mix-up, patch, dim and drop, three views at once.

The images are read once and every view is written once; the attention maps are small. Two launches:

- boxes, in `_augment_boxes.py`, and the maps that views draw;
- views: one program per tile of rows and columns of an image, the rows of all its planes counted in
  one. A row holds the pixels of an NCHW plane or the pixels times channels of an NHWC image, where
  the neighbor to the right lies C elements on: one kernel for both. The crop and the patch are
  gathered through the caches.

Rows are 64-bit pointers, what lies along a row is a 32-bit offset. The backward is in
`_augment_backward.py`. Boxes that came from outside are clamped to the image.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from magsd_kernels._layout import empty_like_format, is_channels_last
from magsd_kernels.triton._augment_backward import backward_kernel
from magsd_kernels.triton._augment_boxes import find_boxes
from magsd_kernels.triton._common import (
    Grid,
    accumulation,
    block,
    tile,
    tunable,
    with_rows,
    with_warps,
)
from magsd_kernels.triton._guide import MAP_TILE, box_of, factor_of, paste_start
from magsd_kernels.triton._resampling import bilinear_inputs, bilinear_scale

_COLUMNS = tile(256)  # elements of a row that a program takes at the most
# Elements of a program, and warps.
_CONFIGS = [*with_warps(4, TILE=tile(1024)), *with_warps(8, 4, TILE=tile(2048))]


@tunable(_CONFIGS, ["size"])
@triton.jit
def _views_kernel(
    images, mixed, dimmed, patched, mix_boxes, patch_boxes, offsets, attention, index, theta,
    size, image_steps, offset_steps, map_sizes, map_steps, guide_steps,
    INNER: tl.constexpr, WEIGHT: tl.constexpr, FLOOR: tl.constexpr, ALIGN: tl.constexpr,
    TILE: tl.constexpr, SHARE: tl.constexpr, COLUMNS: tl.constexpr, MAP_TILE: tl.constexpr,
    REAL: tl.constexpr,
):  # fmt: skip
    """One program per image, tile of its rows (those of all planes), and tile of columns."""
    ROWS: tl.constexpr = TILE // SHARE // COLUMNS
    planes, height, width, row = size
    tiles = tl.cdiv(planes * height, ROWS)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    r = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)[:, None]
    e = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    y = r % height
    x, c = e // INNER, e % INNER
    inside = (r < planes * height) & (e < row)
    image = images + b * image_steps[0] + (r // height).to(tl.int64) * image_steps[1]
    at = (b * planes * height + r) * row + e
    kind = images.dtype.element_ty
    value = tl.load(image + y.to(tl.int64) * image_steps[2] + e, mask=inside, other=0.0)
    upcast = value.to(REAL)
    if mixed is not None:
        top, left, box_height, box_width = box_of(mix_boxes, b, height, width)
        scale_y = bilinear_scale(box_height, height, ALIGN, REAL)
        scale_x = bilinear_scale(box_width, width, ALIGN, REAL)
        upper, lower, down = bilinear_inputs(y, box_height, scale_y, ALIGN)
        near, far, across = bilinear_inputs(x, box_width, scale_x, ALIGN)
        upper = image + (top + upper).to(tl.int64) * image_steps[2]
        lower = image + (top + lower).to(tl.int64) * image_steps[2]
        near, far = (left + near) * INNER + c, (left + far) * INNER + c
        first = tl.load(upper + near, mask=inside, other=0.0).to(REAL)
        second = tl.load(upper + far, mask=inside, other=0.0).to(REAL)
        third = tl.load(lower + near, mask=inside, other=0.0).to(REAL)
        fourth = tl.load(lower + far, mask=inside, other=0.0).to(REAL)
        crop = first * (1.0 - down) + third * down
        crop = crop * (1.0 - across) + (second * (1.0 - down) + fourth * down) * across
        if WEIGHT != 1:
            crop = upcast * tl.full([], 1 - WEIGHT, REAL) + crop * tl.full([], WEIGHT, REAL)
        tl.store(mixed + at, crop.to(kind), mask=inside)
    if dimmed is not None:
        factor = factor_of(
            attention, index, theta, b, y, x, height, width, map_sizes, map_steps, guide_steps,
            FLOOR, ALIGN, MAP_TILE, REAL,
        )  # fmt: skip
        tl.store(dimmed + at, (upcast * factor).to(kind), mask=inside)
    if patched is not None:
        top, left, box_height, box_width = box_of(patch_boxes, b, height, width)
        to_y = paste_start(tl.load(offsets + b * offset_steps[0]), box_height, height)
        to_x = paste_start(
            tl.load(offsets + b * offset_steps[0] + offset_steps[1]), box_width, width
        )
        covered = (y >= to_y) & (y < to_y + box_height) & (x >= to_x) & (x < to_x + box_width)
        source = image + (y - to_y + top).to(tl.int64) * image_steps[2] + e + (left - to_x) * INNER
        pasted = tl.load(source, mask=inside & covered, other=0.0)
        tl.store(patched + at, tl.where(covered, pasted, value), mask=inside)


@dataclass(frozen=True)
class _Images:
    """Images as planes of rows: NCHW has C planes of W elements, NHWC one of W C elements."""

    tensor: torch.Tensor
    batch: int
    planes: int
    height: int
    width: int
    inner: int
    steps: tuple[int, int, int]  # from image to image, plane to plane, row to row

    @property
    def row(self) -> int:
        return self.width * self.inner

    @property
    def size(self) -> tuple[int, int, int, int]:
        return (self.planes, self.height, self.width, self.row)


def _rows_of(images: torch.Tensor) -> _Images:
    """Read in place where rows are dense, else a dense copy in the same memory format."""
    batch, channels, height, width = images.shape
    if is_channels_last(images):
        if width > 1 and images.stride(3) != channels:
            images = images.contiguous(memory_format=torch.channels_last)
        steps = (images.stride(0), 0, images.stride(2))
        return _Images(images, batch, 1, height, width, channels, steps)
    if width > 1 and images.stride(3) != 1:
        images = images.contiguous()
    return _Images(images, batch, channels, height, width, 1, images.stride()[:3])


@dataclass(frozen=True)
class _Guide:
    """The map of each image and its threshold, of one view."""

    attention: torch.Tensor
    index: torch.Tensor | None
    theta: torch.Tensor

    @classmethod
    def of_view(
        cls, attention: torch.Tensor, index: torch.Tensor | None, theta: torch.Tensor, view: int
    ) -> _Guide:
        """From the columns of a view in index and theta (B, V)."""
        return cls(attention, None if index is None else index[:, view], theta[:, view])

    @property
    def map_sizes(self) -> tuple[int, ...]:
        return tuple(self.attention.shape[1:])

    @property
    def steps(self) -> tuple[int, int]:
        return (0 if self.index is None else self.index.stride(0), self.theta.stride(0))


@dataclass(frozen=True)
class _Plan:
    """What a call makes, and from what: the arguments that all views share."""

    mix_boxes: torch.Tensor | None = None
    patch_boxes: torch.Tensor | None = None
    offsets: torch.Tensor | None = None
    guide: _Guide | None = None
    weight: float = 1.0
    floor: float = 0.0
    align_corners: bool = False

    def arguments(self) -> dict[str, object]:
        """By their names in a kernel; what a view does not need is None or 0."""
        guide = self.guide
        return {
            "mix_boxes": self.mix_boxes,
            "patch_boxes": self.patch_boxes,
            "offsets": self.offsets,
            "offset_steps": (0, 0) if self.offsets is None else self.offsets.stride(),
            "attention": guide and guide.attention,
            "index": guide and guide.index,
            "theta": guide and guide.theta,
            "map_sizes": guide.map_sizes if guide else (0,) * 3,
            "map_steps": guide.attention.stride() if guide else (0,) * 4,
            "guide_steps": guide.steps if guide else (0,) * 2,
        }

    def settings(self, images: _Images) -> dict[str, object]:
        pixels = self.guide.map_sizes[1] * self.guide.map_sizes[2] if self.guide else 1
        return {
            "INNER": images.inner, "WEIGHT": self.weight, "FLOOR": self.floor,
            "ALIGN": self.align_corners, "REAL": accumulation(images.tensor.dtype),
            "MAP_TILE": block(pixels, MAP_TILE), "enable_fp_fusion": False,
        }  # fmt: skip


def _cut(images: _Images, share: int = 1) -> tuple[Grid, int]:
    """Grid and columns of a kernel that has a program for a tile of an image's rows and columns.

    share: the part of the configuration's tile that a program takes is 1 / share.
    """
    # In float64, what a kernel keeps of every column takes twice the registers.
    columns = block(images.row, _COLUMNS // (2 if images.tensor.dtype == torch.float64 else 1))

    def grid(settings: dict[str, Any]) -> tuple[int, int]:
        tiles = triton.cdiv(images.planes * images.height, settings["TILE"] // share // columns)
        return images.batch * tiles, triton.cdiv(images.row, columns)

    return grid, columns


def _make(images: torch.Tensor, plan: _Plan, views: tuple[torch.Tensor | None, ...]) -> None:
    """Write the views that are not None: mixed, dimmed, patched."""
    given = _rows_of(images)
    if given.batch == 0:
        return
    share = 2 if images.dtype == torch.float64 else 1  # which takes twice the registers
    grid, columns = _cut(given, share)
    _views_kernel[grid](
        given.tensor, *views, size=given.size, image_steps=given.steps, **plan.arguments(),
        SHARE=share, COLUMNS=columns, **plan.settings(given),
    )  # fmt: skip


def _make_gradient(grads: tuple[torch.Tensor | None, ...], plan: _Plan) -> torch.Tensor:
    """Gradient of the images from those of the views that are not None."""
    # Every view is read in the memory format of the first.
    layouts = [None if grad is None else _rows_of(grad) for grad in grads]
    main = next(layout for layout in layouts if layout is not None)
    steps = [(0, 0, 0) if layout is None else layout.steps for layout in layouts]
    like = next(grad for grad in grads if grad is not None)
    result = empty_like_format(like)
    if main.batch == 0:
        return result
    grid, columns = _cut(main)
    backward_kernel[grid](
        *(layout and layout.tensor for layout in layouts), result,
        size=main.size, mixed_steps=steps[0], dimmed_steps=steps[1], patched_steps=steps[2],
        **plan.arguments(), COLUMNS=columns, **plan.settings(main),
    )  # fmt: skip
    return result


def attention_boxes(
    attention: torch.Tensor,
    index: torch.Tensor | None,
    theta: torch.Tensor,
    size: list[int],
    padding: float,
    align_corners: bool,
) -> torch.Tensor:
    """Boxes (B, 4) int32, rows (top, left, bottom, right), around the pixels with U >= t."""
    return find_boxes(attention, index, theta, (size[0], size[1]), padding, align_corners)[0]


def attention_mixup(
    images: torch.Tensor,
    attention: torch.Tensor,
    index: torch.Tensor | None,
    theta: torch.Tensor,
    padding: float,
    weight: float,
    align_corners: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(1 - weight) images + weight crop, and the boxes; weight 1 is the crop alone."""
    boxes = attention_boxes(attention, index, theta, list(images.shape[2:]), padding, align_corners)
    mixed = empty_like_format(images)
    plan = _Plan(mix_boxes=boxes, weight=weight, align_corners=align_corners)
    _make(images, plan, (mixed, None, None))
    return mixed, boxes


def attention_mixup_backward(
    grad: torch.Tensor, boxes: torch.Tensor, weight: float, align_corners: bool
) -> torch.Tensor:
    """Gradient of the images."""
    plan = _Plan(mix_boxes=boxes.contiguous(), weight=weight, align_corners=align_corners)
    return _make_gradient((grad, None, None), plan)


def attention_patch(
    images: torch.Tensor,
    attention: torch.Tensor,
    index: torch.Tensor | None,
    theta: torch.Tensor,
    offsets: torch.Tensor,
    padding: float,
    align_corners: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Images with the content of their box pasted elsewhere, unscaled, and the boxes."""
    boxes = attention_boxes(attention, index, theta, list(images.shape[2:]), padding, align_corners)
    patched = empty_like_format(images)
    _make(images, _Plan(patch_boxes=boxes, offsets=offsets), (None, None, patched))
    return patched, boxes


def attention_patch_backward(
    grad: torch.Tensor, boxes: torch.Tensor, offsets: torch.Tensor
) -> torch.Tensor:
    """Gradient of the images."""
    plan = _Plan(patch_boxes=boxes.contiguous(), offsets=offsets)
    return _make_gradient((None, None, grad), plan)


def attention_dim(
    images: torch.Tensor,
    attention: torch.Tensor,
    index: torch.Tensor | None,
    theta: torch.Tensor,
    floor: float,
    align_corners: bool,
) -> torch.Tensor:
    """Images * ([U < t] + floor). Its own adjoint: the backward calls it on the gradient."""
    dimmed = empty_like_format(images)
    guide = _Guide(attention, index, theta)
    plan = _Plan(guide=guide, floor=floor, align_corners=align_corners)
    _make(images, plan, (None, dimmed, None))
    return dimmed


def attention_views(
    images: torch.Tensor,
    attention: torch.Tensor,
    index: torch.Tensor,
    theta: torch.Tensor,
    offsets: torch.Tensor,
    padding: float,
    weight: float,
    floor: float,
    align_corners: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Views (3, B, C, H, W): mix-up, dim, patch; and boxes (2, B, 4) of mix-up and patch."""
    size = (images.shape[2], images.shape[3])
    boxes = find_boxes(attention, index, theta, size, padding, align_corners, views=range(0, 4, 2))
    plan = _views_plan(attention, index, theta, offsets, boxes, weight, floor, align_corners)
    return _make_views(images, plan), boxes


def sampled_views(
    images: torch.Tensor,
    attention: torch.Tensor,
    uniforms: torch.Tensor,
    theta: torch.Tensor,
    offsets: torch.Tensor | None,
    eps: float,
    padding: float,
    weight: float,
    floor: float,
    align_corners: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Views of maps that are drawn, without offsets mix-up and dim alone; index; boxes."""
    attention, index = with_rows(attention), theta.new_empty(theta.shape, dtype=torch.int64)
    boxes = find_boxes(
        attention, index, theta, (images.shape[2], images.shape[3]), padding, align_corners,
        views=range(0, theta.shape[1], 2), uniforms=uniforms, eps=eps,
    )  # fmt: skip
    plan = _views_plan(attention, index, theta, offsets, boxes, weight, floor, align_corners)
    return _make_views(images, plan), index, boxes


def _views_plan(
    attention: torch.Tensor, index: torch.Tensor, theta: torch.Tensor,
    offsets: torch.Tensor | None, boxes: torch.Tensor, weight: float, floor: float,
    align_corners: bool,
) -> _Plan:  # fmt: skip
    guide = _Guide.of_view(attention, index, theta, view=1)
    patch_boxes = None if offsets is None else boxes[1]
    return _Plan(boxes[0], patch_boxes, offsets, guide, weight, floor, align_corners)


def _make_views(images: torch.Tensor, plan: _Plan) -> torch.Tensor:
    """Mix-up, dim and, with offsets, patch."""
    views = empty_like_format(images, 2 if plan.offsets is None else 3)
    mixed, dimmed, *patched = views.unbind()
    _make(images, plan, (mixed, dimmed, patched[0] if patched else None))
    return views


def attention_views_backward(
    grad: torch.Tensor,
    attention: torch.Tensor,
    index: torch.Tensor,
    theta: torch.Tensor,
    offsets: torch.Tensor | None,
    boxes: torch.Tensor,
    weight: float,
    floor: float,
    align_corners: bool,
) -> torch.Tensor:
    """Gradient (B, C, H, W) of the images, from that of the views (2 or 3, B, C, H, W)."""
    boxes = boxes.contiguous()
    plan = _views_plan(attention, index, theta, offsets, boxes, weight, floor, align_corners)
    mixed, dimmed, *patched = grad.unbind()
    return _make_gradient((mixed, dimmed, patched[0] if patched else None), plan)
