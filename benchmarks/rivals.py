"""What an engineer without our kernels would write: the fastest calls there are, and torch.compile.

Each function here builds a rival for one row and compiles its parts anew. Boxes and everything
around the call that gives a rival its name are compiled.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from magsd_kernels.reference import attention_augment as reference

Function = Callable[..., Any]

PADDING, WEIGHT, FLOOR = 0.1, 0.4, 0.001
_EPSILON = 1e-12


def _compiled(function: Function) -> Function:
    return torch.compile(function, fullgraph=True, dynamic=False)


def bmm() -> Function:
    """The product in half precision on matrix units, rounded once; the rest compiled."""
    rest = _compiled(_pooled)

    def pool(features: Tensor, attention: Tensor) -> Any:
        flat = features.flatten(2)
        product = torch.bmm(attention.flatten(2), flat.transpose(1, 2))
        return rest(product, flat.shape[2])

    return pool


def _pooled(product: Tensor, pixels: int) -> Tensor:
    """Average, signed root, L2 norm, times 100, in float32."""
    matrix = product.float() / pixels
    matrix = (matrix.sign() * (matrix.abs() + _EPSILON).sqrt()).flatten(1)
    return (F.normalize(matrix, dim=1) * 100.0).to(product.dtype)


def grid_sample_crop() -> Function:
    """The crop of WS-DAN, whose corners are aligned."""
    return _crop(partial(_grid, align_corners=True), _sampled)


def _crop(locate: Function, sample: Function) -> Function:
    """Samples float32: places must be of the images' dtype, and in half precision miss pixels."""
    places = _compiled(locate)

    def crop(images: Tensor, attention: Tensor, index: Tensor, theta: Tensor) -> Any:
        found = places(attention, index, theta, images.shape[2:])
        return sample(images.float(), found).to(images.dtype)

    return crop


def grid_sample_mixup() -> Function:
    """The crop of MAG-SD on the rest of the image."""
    grid = _compiled(partial(_grid, align_corners=False))
    blend = _compiled(_blend)

    def mixup(images: Tensor, attention: Tensor, index: Tensor, theta: Tensor) -> Any:
        found = grid(attention, index, theta, images.shape[2:])
        return blend(images, _sampled(images.float(), found))

    return mixup


def grid_sample_views() -> Function:
    """Mix-up by grid_sample; its blend, dim and patch in one compiled function."""
    grid = _compiled(partial(_grid, align_corners=False))
    rest = _compiled(_views)

    def views(images: Tensor, attention: Tensor, index: Tensor, theta: Tensor, **rests: Any) -> Any:
        found = grid(attention, index[:, 0], theta[:, 0], images.shape[2:])
        crop = _sampled(images.float(), found)
        return rest(images, crop, attention, index, theta, **rests)

    return views


def _sampled(images: Tensor, grid: Tensor) -> Tensor:
    return F.grid_sample(images, grid, "bilinear", "border", align_corners=True)


def _grid(
    attention: Tensor, index: Tensor, theta: Tensor, size: torch.Size, align_corners: bool
) -> Tensor:
    """(B, H, W, 2): where each box is sampled, as interpolate samples a slice.

    Held within the centers of the box's outer pixels, so that nothing outside it is read.
    """
    boxes = reference.attention_boxes(attention, index, theta, list(size), PADDING, align_corners)
    axes = []
    for axis, count in enumerate(size):
        start, stop = boxes[:, axis, None].float(), boxes[:, axis + 2, None].float()
        output = torch.arange(count, device=boxes.device, dtype=torch.float32)
        if align_corners:
            position = start + output * ((stop - start - 1) / (count - 1))
        else:
            position = start + (output + 0.5) * ((stop - start) / count) - 0.5
        position = torch.minimum(torch.maximum(position, start), stop - 1)
        axes.append(position * (2 / (count - 1)) - 1)
    shape = (len(boxes), size[0], size[1])
    y, x = axes[0][:, :, None].expand(shape), axes[1][:, None, :].expand(shape)
    return torch.stack([x, y], 3)


def _blend(images: Tensor, crop: Tensor) -> Tensor:
    return ((1 - WEIGHT) * images.float() + WEIGHT * crop).to(images.dtype)


def _views(
    images: Tensor, crop: Tensor, attention: Tensor, index: Tensor, theta: Tensor, offsets: Tensor
) -> Tensor:
    maps, thetas = index.unbind(1), theta.unbind(1)
    dim = reference.attention_dim(images, attention, maps[1], thetas[1], FLOOR, False)
    patch, _ = reference.attention_patch(
        images, attention, maps[2], thetas[2], offsets, PADDING, False
    )
    return torch.stack([_blend(images, crop), dim, patch])


def roi_align() -> Function:
    """The crop with aligned corners by torchvision's roi_align, one sample a pixel.

    Output i of n lies at start + (i + 1/2) length / n - 1/2 there, and here i (box - 1) / (n - 1)
    after the box's first pixel: the same, of a region that is shifted and stretched for it.
    Without aligned corners the rules differ at the edges of a box: roi_align reads what lies
    outside, where interpolate repeats the box's outer pixels, and it cannot compete.
    """
    from torchvision.ops import roi_align as align

    def sample(images: Tensor, regions: Tensor) -> Any:
        return align(images, regions, images.shape[2:], sampling_ratio=1, aligned=True)

    return _crop(_regions, sample)


def why_no_torchvision() -> str | None:
    """Reason why roi_align is not there, or None."""
    if find_spec("torchvision") is None:
        return "torchvision is not installed"
    try:
        import torchvision.ops  # noqa: F401
    except Exception as error:  # one that was built for another torch fails in many ways
        return f"torchvision cannot be imported: {error}"
    return None


def _regions(attention: Tensor, index: Tensor, theta: Tensor, size: torch.Size) -> Tensor:
    """(B, 5) float32: image, left, top, right, bottom."""
    boxes = reference.attention_boxes(attention, index, theta, list(size), PADDING, True).float()
    bounds = []
    for axis in (1, 0):
        step = (boxes[:, axis + 2] - boxes[:, axis] - 1) / (size[axis] - 1)
        start = boxes[:, axis] + 0.5 - 0.5 * step
        bounds.append((start, start + size[axis] * step))
    (left, right), (top, bottom) = bounds
    image = torch.arange(len(boxes), device=boxes.device, dtype=torch.float32)
    return torch.stack([image, left, top, right, bottom], 1)
