"""Attention-guided views: boxes, crop and mix-up, patch, dim and drop, and three views at once."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from magsd_kernels._layout import accumulation_dtype, in_format_of
from magsd_kernels.reference.attention_sampling import sample_attention


def attention_boxes(
    attention: torch.Tensor,
    index: torch.Tensor | None,
    theta: torch.Tensor,
    size: list[int],
    padding: float,
    align_corners: bool,
) -> torch.Tensor:
    """Boxes (B, 4) int32, rows (top, left, bottom, right), around the pixels with U >= t."""
    upsampled, threshold = _guide(attention, index, theta, size, align_corners)
    passed = upsampled >= threshold
    top, bottom = _extent(passed.any(2), padding)
    left, right = _extent(passed.any(1), padding)
    return torch.stack([top, left, bottom, right], 1).int()


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
    blend = _blend(images, boxes, weight, align_corners)
    return in_format_of(blend.to(images.dtype), images), boxes


def attention_mixup_backward(
    grad: torch.Tensor, boxes: torch.Tensor, weight: float, align_corners: bool
) -> torch.Tensor:
    """Gradient of the images."""
    # The crop is rows @ image @ columns^T; its adjoint runs in float64 for the reasons in resize.
    rows = _crop_matrix(boxes[:, 0], boxes[:, 2], grad.shape[2], align_corners)
    columns = _crop_matrix(boxes[:, 1], boxes[:, 3], grad.shape[3], align_corners)
    upcast = grad.double()
    result = weight * (rows.transpose(1, 2)[:, None] @ upcast @ columns[:, None])
    if weight != 1:
        result = result + (1 - weight) * upcast
    return in_format_of(result.to(grad.dtype), grad)


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
    start, corner = boxes[:, :2], _corners(boxes, offsets, list(images.shape[2:]))
    pasted = _shifted(images, start, corner, boxes)
    return in_format_of(torch.where(*pasted, images), images), boxes


def attention_patch_backward(
    grad: torch.Tensor, boxes: torch.Tensor, offsets: torch.Tensor
) -> torch.Tensor:
    """Gradient of the images."""
    start, corner = boxes[:, :2], _corners(boxes, offsets, list(grad.shape[2:]))
    covered, _ = _shifted(grad, start, corner, boxes)
    copied, source = _shifted(grad, corner, start, boxes)
    dtype = accumulation_dtype(grad.dtype)
    own = torch.where(covered, 0, grad.to(dtype))
    result = own + torch.where(copied, source.to(dtype), 0)
    return in_format_of(result.to(grad.dtype), grad)


def attention_dim(
    images: torch.Tensor,
    attention: torch.Tensor,
    index: torch.Tensor | None,
    theta: torch.Tensor,
    floor: float,
    align_corners: bool,
) -> torch.Tensor:
    """Images * ([U < t] + floor). Its own adjoint: the backward calls it on the gradient."""
    size = list(images.shape[2:])
    upsampled, threshold = _guide(attention, index, theta, size, align_corners)
    dtype = accumulation_dtype(images.dtype)
    factor = (upsampled < threshold).to(dtype) + floor
    return in_format_of((images.to(dtype) * factor[:, None]).to(images.dtype), images)


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
    maps, thetas = index.unbind(1), theta.unbind(1)
    mixup, mixup_boxes = attention_mixup(
        images, attention, maps[0], thetas[0], padding, weight, align_corners
    )
    dim = attention_dim(images, attention, maps[1], thetas[1], floor, align_corners)
    patch, patch_boxes = attention_patch(
        images, attention, maps[2], thetas[2], offsets, padding, align_corners
    )
    views = in_format_of(torch.stack([mixup, dim, patch]), images)
    return views, torch.stack([mixup_boxes, patch_boxes])


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
    index = sample_attention(attention, uniforms, eps)
    if offsets is not None:
        views, boxes = attention_views(
            images, attention, index, theta, offsets, padding, weight, floor, align_corners
        )
        return views, index, boxes
    maps, thetas = index.unbind(1), theta.unbind(1)
    mixup, boxes = attention_mixup(
        images, attention, maps[0], thetas[0], padding, weight, align_corners
    )
    dim = attention_dim(images, attention, maps[1], thetas[1], floor, align_corners)
    return in_format_of(torch.stack([mixup, dim]), images), index, boxes[None]


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
    upcast = grad.to(accumulation_dtype(grad.dtype))
    mixup = attention_mixup_backward(upcast[0], boxes[0], weight, align_corners)
    dim = attention_dim(upcast[1], attention, index[:, 1], theta[:, 1], floor, align_corners)
    total = mixup + dim
    if offsets is not None:
        total = total + attention_patch_backward(upcast[2], boxes[1], offsets)
    return in_format_of(total.to(grad.dtype), grad[0])


def _guide(
    attention: torch.Tensor,
    index: torch.Tensor | None,
    theta: torch.Tensor,
    size: list[int],
    align_corners: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Upsampled map U (B, H, W) and threshold t (B, 1, 1), float32.

    An index outside 0..M-1 counts as the nearest one inside.
    """
    maps = attention
    if index is not None:
        nearest = index.clamp(0, attention.shape[1] - 1)[:, None, None, None]
        maps = attention.gather(1, nearest.expand(-1, 1, *attention.shape[2:]))
    maps = maps.float()
    threshold = theta[:, None, None] * maps.amax((2, 3))[:, :, None]
    upsampled = F.interpolate(maps, size, mode="bilinear", align_corners=align_corners)
    return upsampled[:, 0], threshold


def _extent(passed: torch.Tensor, padding: float) -> tuple[torch.Tensor, torch.Tensor]:
    """First and last true entry of rows (B, N), padded, as a half-open interval in 0..N.

    A row without a true entry gives the whole interval.
    """
    length = passed.shape[1]
    first = passed.int().argmax(1).double()
    last = length - 1 - passed.flip(1).int().argmax(1).double()
    start = (first - padding * length).trunc().clamp(min=0)
    stop = (last + padding * length).trunc().clamp(max=length)
    found = passed.any(1)
    return torch.where(found, start, 0), torch.where(found, torch.maximum(stop, start + 1), length)


def _samples(
    start: torch.Tensor, stop: torch.Tensor, size: int, align_corners: bool, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Where `size` outputs sample intervals start..stop (B,): two neighbors and the weight of
    the second, each (B, size). The rule of torch.nn.functional.interpolate on the slice.
    """
    length = (stop - start).to(dtype)[:, None]
    output = torch.arange(size, device=start.device, dtype=dtype)
    if align_corners:
        position = output * ((length - 1) / max(size - 1, 1))
    else:
        position = ((output + 0.5) * (length / size) - 0.5).clamp(min=0)
    lower = torch.minimum(position.floor(), length - 1)
    upper = torch.minimum(lower + 1, length - 1)
    first = start.long()[:, None]
    return first + lower.long(), first + upper.long(), position - lower


def _blend(
    images: torch.Tensor, boxes: torch.Tensor, weight: float, align_corners: bool
) -> torch.Tensor:
    """(1 - weight) images + weight crop in the accumulation dtype."""
    height, width = images.shape[2:]
    dtype = accumulation_dtype(images.dtype)
    top, left, bottom, right = boxes.unbind(1)
    y0, y1, wy = _samples(top, bottom, height, align_corners, dtype)
    x0, x1, wx = _samples(left, right, width, align_corners, dtype)
    upcast, wy, wx = images.to(dtype), wy[:, None, :, None], wx[:, None, None, :]
    rows = _take(upcast, y0, 2) * (1 - wy) + _take(upcast, y1, 2) * wy
    crop = _take(rows, x0, 3) * (1 - wx) + _take(rows, x1, 3) * wx
    return crop if weight == 1 else (1 - weight) * upcast + weight * crop


def _take(images: torch.Tensor, index: torch.Tensor, dim: int) -> torch.Tensor:
    """Rows (dim 2) or columns (dim 3) of each image, index (B, n)."""
    view = index[:, None, :, None] if dim == 2 else index[:, None, None, :]
    shape = list(images.shape)
    shape[dim] = index.shape[1]
    return images.gather(dim, view.expand(shape))


def _crop_matrix(
    start: torch.Tensor, stop: torch.Tensor, size: int, align_corners: bool
) -> torch.Tensor:
    """(B, size, size) float64: row o holds the weights with which output o reads the inputs."""
    lower, upper, weight = _samples(start, stop, size, align_corners, torch.float64)
    matrix = weight.new_zeros(*weight.shape, size)
    matrix.scatter_add_(2, lower[:, :, None], (1 - weight)[:, :, None])
    return matrix.scatter_add_(2, upper[:, :, None], weight[:, :, None])


def _corners(boxes: torch.Tensor, offsets: torch.Tensor, size: list[int]) -> torch.Tensor:
    """Top-left corner (B, 2) at which each box is pasted; exact in float64."""
    corners = []
    for axis, length in enumerate(size):
        room = length - (boxes[:, 2 + axis] - boxes[:, axis]).double()
        corner = (offsets[:, axis].double() * (room + 1)).floor()
        corners.append(torch.minimum(corner.clamp(min=0), room))
    return torch.stack(corners, 1).to(boxes.dtype)


def _shifted(
    images: torch.Tensor, start: torch.Tensor, corner: torch.Tensor, boxes: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where boxes moved from `start` to `corner` lie (B, 1, H, W), and what they bring there."""
    inside, index = [], []
    for axis, size in enumerate(images.shape[2:]):
        position = torch.arange(size, device=images.device) - corner[:, axis, None]
        extent = (boxes[:, 2 + axis] - boxes[:, axis])[:, None]
        inside.append((position >= 0) & (position < extent))
        index.append((position + start[:, axis, None]).clamp(0, size - 1).long())
    moved = _take(_take(images, index[0], 2), index[1], 3)
    return inside[0][:, None, :, None] & inside[1][:, None, None, :], moved
