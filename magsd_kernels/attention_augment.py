"""Attention-guided views of a batch: crop, mix-up, patch, dim, drop, and three views at once.

Source: Li et al., MAG-SD, IEEE JBHI 2021 (arXiv 2012.02278) and its released code; crop and drop
as in WS-DAN (arXiv 1901.09891).

In every function `attention` is (B, 1, h, w), or (B, M, h, w) with `index` (B,) int64 that names
each image's map (an index outside 0..M-1 counts as the nearest one inside); `theta` is (B,)
float32. U is that map upsampled bilinearly to (H, W) in float32, and the threshold is
t = theta * (maximum of the low-resolution map). Gradients go to the images; attention and theta
get none.
"""

from __future__ import annotations

from typing import Any

import torch

from magsd_kernels import _checks as check
from magsd_kernels._layout import dense, empty_like_format, is_channels_last
from magsd_kernels.backends import select
from magsd_kernels.registry import define

_OPERATION = "attention_augment"
_VIEWS = 3


def attention_boxes(
    attention: torch.Tensor,
    theta: torch.Tensor,
    size: tuple[int, int],
    *,
    padding: float = 0.1,
    index: torch.Tensor | None = None,
    align_corners: bool = False,
    backend: str | None = None,
) -> torch.Tensor:
    """Padded boxes around the pixels with U >= t.

    top = max(int(min y - padding H), 0), bottom = min(int(max y + padding H), H), columns alike,
    in double precision, int truncating toward zero; a box holds at least one pixel. If no pixel
    passes (NaN in the map), the box is the whole image.

    Args:
        attention, theta, index: see the module.
        size: (H, W) of the image.
        padding: margin as a share of H and W, at least 0.
        align_corners: of the upsampling.
        backend: name of a backend, see `use_backend`.

    Returns:
        (B, 4) int32, rows (top, left, bottom, right), bottom and right exclusive.
    """
    op = "attention_boxes"
    check.tensor(op, "attention", attention, check.IMAGES)
    _check_guide(op, attention, theta, index)
    height, width = check.size(op, size)
    _check_box(op, padding, align_corners)
    backend = select(_OPERATION, backend, attention)
    boxes: torch.Tensor = _boxes(
        attention.detach(), index, theta.detach(), [height, width], float(padding),
        align_corners, backend,
    )  # fmt: skip
    return boxes


def attention_crop(
    images: torch.Tensor,
    attention: torch.Tensor,
    theta: torch.Tensor,
    *,
    padding: float = 0.1,
    index: torch.Tensor | None = None,
    align_corners: bool = False,
    backend: str | None = None,
) -> torch.Tensor:
    """The box of `attention_boxes`, resized bilinearly to the whole image.

    Args: images (B, C, H, W), floating; the others as for `attention_boxes`.

    Returns: (B, C, H, W), dtype and memory format of images.
    """
    return _mixed(
        "attention_crop", images, attention, theta, index, padding, 1.0, align_corners, backend
    )


def attention_mixup(
    images: torch.Tensor,
    attention: torch.Tensor,
    theta: torch.Tensor,
    *,
    padding: float = 0.1,
    weight: float = 0.4,
    index: torch.Tensor | None = None,
    align_corners: bool = False,
    backend: str | None = None,
) -> torch.Tensor:
    """(1 - weight) images + weight crop, crop as by `attention_crop`; weight in 0..1."""
    return _mixed(
        "attention_mixup", images, attention, theta, index, padding, weight, align_corners, backend
    )


def attention_patch(
    images: torch.Tensor,
    attention: torch.Tensor,
    theta: torch.Tensor,
    offsets: torch.Tensor,
    *,
    padding: float = 0.1,
    index: torch.Tensor | None = None,
    align_corners: bool = False,
    backend: str | None = None,
) -> torch.Tensor:
    """The content of the box pasted, unscaled, at another place of the same image.

    Args:
        offsets: (B, 2) float32 (u_y, u_x) in [0, 1): the top-left corner is at
            (floor(u_y (H - bh + 1)), floor(u_x (W - bw + 1))), bh x bw the box.
        images, attention, theta, padding, index, align_corners, backend: as for `attention_crop`.

    Returns: (B, C, H, W), dtype and memory format of images.
    """
    op = "attention_patch"
    _check_images(op, images, attention)
    _check_guide(op, attention, theta, index)
    check.tensor(op, "offsets", offsets, (images.shape[0], 2), (torch.float32,), images)
    _check_box(op, padding, align_corners)
    backend = select(_OPERATION, backend, images)
    patched: torch.Tensor = _patch(
        images, attention.detach(), index, theta.detach(), offsets.detach(), float(padding),
        align_corners, backend,
    )[0]  # fmt: skip
    return patched


def attention_dim(
    images: torch.Tensor,
    attention: torch.Tensor,
    theta: torch.Tensor,
    *,
    floor: float = 0.001,
    index: torch.Tensor | None = None,
    align_corners: bool = False,
    backend: str | None = None,
) -> torch.Tensor:
    """Images * ([U < t] + floor); floor is at least 0. Arguments as for `attention_crop`."""
    return _dimmed("attention_dim", images, attention, theta, index, floor, align_corners, backend)


def attention_drop(
    images: torch.Tensor,
    attention: torch.Tensor,
    theta: torch.Tensor,
    *,
    index: torch.Tensor | None = None,
    align_corners: bool = False,
    backend: str | None = None,
) -> torch.Tensor:
    """Images * [U < t]. Arguments as for `attention_crop`."""
    return _dimmed("attention_drop", images, attention, theta, index, 0.0, align_corners, backend)


def attention_views(
    images: torch.Tensor,
    attention: torch.Tensor,
    index: torch.Tensor,
    theta: torch.Tensor,
    offsets: torch.Tensor,
    *,
    padding: float = 0.1,
    weight: float = 0.4,
    floor: float = 0.001,
    align_corners: bool = False,
    backend: str | None = None,
) -> torch.Tensor:
    """Mix-up, dim and patch of one batch, equal to the three single functions.

    Args:
        images: (B, C, H, W), floating.
        attention: (B, M, h, w), floating.
        index: (B, 3) int64 and theta: (B, 3) float32; column 0 is for mix-up, 1 dim, 2 patch.
        offsets: (B, 2) float32, see `attention_patch`.
        padding, weight, floor, align_corners, backend: as for the single functions.

    Returns: (3, B, C, H, W); each view has the dtype and memory format of images.
    """
    op = "attention_views"
    batch = _check_images(op, images, attention)
    check.tensor(op, "index", index, (batch, _VIEWS), (torch.int64,), images)
    check.tensor(op, "theta", theta, (batch, _VIEWS), (torch.float32,), images)
    check.tensor(op, "offsets", offsets, (batch, 2), (torch.float32,), images)
    _check_box(op, padding, align_corners)
    check.number(op, "weight", weight, 0, 1)
    check.number(op, "floor", floor, 0)
    backend = select(_OPERATION, backend, images)
    views: torch.Tensor = _views(
        images, attention.detach(), index, theta.detach(), offsets.detach(), float(padding),
        float(weight), float(floor), align_corners, backend,
    )[0]  # fmt: skip
    return views


def _mixed(
    op: str, images: torch.Tensor, attention: torch.Tensor, theta: torch.Tensor,
    index: torch.Tensor | None, padding: float, weight: float, align_corners: bool,
    backend: str | None,
) -> torch.Tensor:  # fmt: skip
    _check_images(op, images, attention)
    _check_guide(op, attention, theta, index)
    _check_box(op, padding, align_corners)
    check.number(op, "weight", weight, 0, 1)
    backend = select(_OPERATION, backend, images)
    mixed: torch.Tensor = _mixup(
        images, attention.detach(), index, theta.detach(), float(padding), float(weight),
        align_corners, backend,
    )[0]  # fmt: skip
    return mixed


def _dimmed(
    op: str, images: torch.Tensor, attention: torch.Tensor, theta: torch.Tensor,
    index: torch.Tensor | None, floor: float, align_corners: bool, backend: str | None,
) -> torch.Tensor:  # fmt: skip
    _check_images(op, images, attention)
    _check_guide(op, attention, theta, index)
    check.number(op, "floor", floor, 0)
    check.flag(op, "align_corners", align_corners)
    backend = select(_OPERATION, backend, images)
    dimmed: torch.Tensor = _dim(
        images, attention.detach(), index, theta.detach(), float(floor), align_corners, backend
    )
    return dimmed


def _check_images(op: str, images: torch.Tensor, attention: torch.Tensor) -> int:
    """Returns the batch."""
    check.tensor(op, "images", images, check.IMAGES)
    batch = images.shape[0]
    check.tensor(op, "attention", attention, (batch, *check.IMAGES[1:]), like=images)
    return batch


def _check_guide(
    op: str, attention: torch.Tensor, theta: torch.Tensor, index: torch.Tensor | None
) -> None:
    batch, maps = attention.shape[:2]
    check.tensor(op, "theta", theta, (batch,), (torch.float32,), attention)
    if index is not None:
        check.tensor(op, "index", index, (batch,), (torch.int64,), attention)
    elif maps != 1:
        raise ValueError(
            f"{op}: index must name a map per image unless attention has one map, "
            f"got attention of shape {tuple(attention.shape)} and no index"
        )


def _check_box(op: str, padding: Any, align_corners: Any) -> None:
    check.number(op, "padding", padding, 0)
    check.flag(op, "align_corners", align_corners)


def _boxes_fake(attention: torch.Tensor, *_: Any) -> torch.Tensor:
    return attention.new_empty((attention.shape[0], 4), dtype=torch.int32)


def _view_and_boxes_fake(
    images: torch.Tensor, attention: torch.Tensor, *_: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    return empty_like_format(images), _boxes_fake(attention)


def _like_fake(images: torch.Tensor, *_: Any) -> torch.Tensor:
    return empty_like_format(images)


def _views_fake(
    images: torch.Tensor, attention: torch.Tensor, *_: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    boxes = attention.new_empty((2, attention.shape[0], 4), dtype=torch.int32)
    return empty_like_format(images, _VIEWS), boxes


def _views_backward_fake(grad: torch.Tensor, *_: Any) -> torch.Tensor:
    return empty_like_format(grad[0])


# The backward operators' results lie as the gradient does, for which a compiler may choose another
# memory format than that of the images. The attention requires grad in training and gets none: the
# public functions detach it, so that images without grad cost no backward.


def _keep_settings(ctx: Any, inputs: Any) -> None:
    """What the backward of every view needs besides the tensors that it saves."""
    ctx.set_materialize_grads(False)
    ctx.channels_last = is_channels_last(inputs.images)
    ctx.align_corners, ctx.backend = inputs.align_corners, inputs.backend


def _keep_mixup(ctx: Any, inputs: Any, output: tuple[torch.Tensor, ...]) -> None:
    _, boxes = output
    _keep_settings(ctx, inputs)
    ctx.save_for_backward(boxes)
    ctx.mark_non_differentiable(boxes)
    ctx.weight = inputs.weight


def _differentiate_mixup(ctx: Any, grad: torch.Tensor | None, _: Any) -> dict[str, torch.Tensor]:
    if grad is None:
        return {}
    (boxes,) = ctx.saved_tensors
    result = _mixup_backward(grad, boxes, ctx.weight, ctx.align_corners, ctx.backend)
    return {"images": dense(result, ctx.channels_last)}


def _keep_patch(ctx: Any, inputs: Any, output: tuple[torch.Tensor, ...]) -> None:
    _, boxes = output
    _keep_settings(ctx, inputs)
    ctx.save_for_backward(boxes, inputs.offsets)
    ctx.mark_non_differentiable(boxes)


def _differentiate_patch(ctx: Any, grad: torch.Tensor | None, _: Any) -> dict[str, torch.Tensor]:
    if grad is None:
        return {}
    boxes, offsets = ctx.saved_tensors
    result = _patch_backward(grad, boxes, offsets, ctx.backend)
    return {"images": dense(result, ctx.channels_last)}


def _keep_dim(ctx: Any, inputs: Any, output: torch.Tensor) -> None:
    _keep_settings(ctx, inputs)
    ctx.save_for_backward(inputs.attention, inputs.index, inputs.theta)
    ctx.floor = inputs.floor


def _differentiate_dim(ctx: Any, grad: torch.Tensor | None) -> dict[str, torch.Tensor]:
    if grad is None:
        return {}
    attention, index, theta = ctx.saved_tensors
    result = _dim(grad, attention, index, theta, ctx.floor, ctx.align_corners, ctx.backend)
    return {"images": dense(result, ctx.channels_last)}


def _keep_views(ctx: Any, inputs: Any, output: tuple[torch.Tensor, ...]) -> None:
    _, boxes = output
    keep_views(ctx, inputs, inputs.index, boxes)
    ctx.mark_non_differentiable(boxes)


def keep_views(ctx: Any, inputs: Any, index: torch.Tensor, boxes: torch.Tensor) -> None:
    """What `differentiate_views` needs."""
    _keep_settings(ctx, inputs)
    ctx.save_for_backward(inputs.attention, index, inputs.theta, inputs.offsets, boxes)
    ctx.weight, ctx.floor = inputs.weight, inputs.floor


def differentiate_views(ctx: Any, grad: torch.Tensor | None, *_: Any) -> dict[str, torch.Tensor]:
    """The gradient of the images from that of the views."""
    if grad is None:
        return {}
    attention, index, theta, offsets, boxes = ctx.saved_tensors
    result = _views_backward(
        grad, attention, index, theta, offsets, boxes, ctx.weight, ctx.floor, ctx.align_corners,
        ctx.backend,
    )  # fmt: skip
    return {"images": dense(result, ctx.channels_last)}


_boxes = define(
    _OPERATION,
    "attention_boxes(Tensor attention, Tensor? index, Tensor theta, SymInt[] size, float padding,"
    " bool align_corners, str backend) -> Tensor",
    _boxes_fake,
)
_mixup = define(
    _OPERATION,
    "attention_mixup(Tensor images, Tensor attention, Tensor? index, Tensor theta, float padding,"
    " float weight, bool align_corners, str backend) -> (Tensor, Tensor)",
    _view_and_boxes_fake,
    setup_context=_keep_mixup,
    backward=_differentiate_mixup,
)
_mixup_backward = define(
    _OPERATION,
    "attention_mixup_backward(Tensor grad, Tensor boxes, float weight, bool align_corners,"
    " str backend) -> Tensor",
    _like_fake,
)
_patch = define(
    _OPERATION,
    "attention_patch(Tensor images, Tensor attention, Tensor? index, Tensor theta, Tensor offsets,"
    " float padding, bool align_corners, str backend) -> (Tensor, Tensor)",
    _view_and_boxes_fake,
    setup_context=_keep_patch,
    backward=_differentiate_patch,
)
_patch_backward = define(
    _OPERATION,
    "attention_patch_backward(Tensor grad, Tensor boxes, Tensor offsets, str backend) -> Tensor",
    _like_fake,
)
_dim = define(
    _OPERATION,
    "attention_dim(Tensor images, Tensor attention, Tensor? index, Tensor theta, float floor,"
    " bool align_corners, str backend) -> Tensor",
    _like_fake,
    setup_context=_keep_dim,
    backward=_differentiate_dim,
)
_views = define(
    _OPERATION,
    "attention_views(Tensor images, Tensor attention, Tensor index, Tensor theta, Tensor offsets,"
    " float padding, float weight, float floor, bool align_corners, str backend)"
    " -> (Tensor, Tensor)",
    _views_fake,
    setup_context=_keep_views,
    backward=differentiate_views,
)
_views_backward = define(
    _OPERATION,
    "attention_views_backward(Tensor grad, Tensor attention, Tensor index, Tensor theta,"
    " Tensor? offsets, Tensor boxes, float weight, float floor, bool align_corners, str backend)"
    " -> Tensor",
    _views_backward_fake,
)
