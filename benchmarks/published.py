"""What the released networks do, in our own words: a Python loop per image, the host in between.

MAG-SD (Li et al., arXiv 2012.02278) and WS-DAN (Hu et al., arXiv 1901.09891) as their released
training code computes: boxes through nonzero() and item(), one interpolation per image, maps drawn
with numpy per image, an `if` on a tensor per image in the loss; normalization, rectifier, pooling,
root and norm as operations of their own. Everything random comes in, on the host where the
released code draws it on the host, so that a result can be compared with ours.

Maps and logits are taken in float32, in which the released code runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

_EPSILON = 1e-12
Box = tuple[int, int, int, int]
Floats = Sequence[float]
Ints = Sequence[int]
Size = tuple[int, int]


def multiscale_attention(
    projections: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    running_means: Sequence[Tensor],
    running_vars: Sequence[Tensor],
    size: Size,
) -> Tensor:
    """Batch norm, rectifier and average pooling to the coarsest size, each scale by itself."""
    total = None
    for x, weight, bias, mean, var in zip(
        projections, weights, biases, running_means, running_vars, strict=True
    ):
        x = F.batch_norm(x, mean, var, weight, bias, training=True, momentum=0.1, eps=1e-3)
        x = F.adaptive_avg_pool2d(F.relu(x, inplace=True), size)
        total = x if total is None else total + x
    assert total is not None
    return total


def batch_norm_act(
    x: Tensor, residual: Tensor | None = None, act: str = "relu", **norm: Any
) -> Tensor:
    """Batch norm, and in place the addition and the activation, as in torchvision's networks."""
    x = F.batch_norm(x, training=True, **norm)
    if residual is not None:
        x += residual
    return x if act == "none" else {"relu": F.relu, "silu": F.silu}[act](x, inplace=True)


def resample_attention(maps: Sequence[Tensor], size: Size) -> Tensor:
    """Average pooling of every map to the size of the last, and the sum."""
    total = maps[-1]
    for x in maps[:-1]:
        total = total + F.adaptive_avg_pool2d(x, size)
    return total


def bilinear_attention_pool(features: Tensor, attention: Tensor, pool: str = "avg") -> Tensor:
    """(B, M*C), times 100: einsum or a loop over maps, signed root, L2 norm."""
    batch, channels, height, width = features.shape
    if pool == "avg":
        matrix = torch.einsum("bmhw,bchw->bmc", attention, features) / (height * width)
        matrix = matrix.reshape(batch, -1)
    else:
        rows = [
            F.adaptive_max_pool2d(features * attention[:, m : m + 1], 1).view(batch, channels)
            for m in range(attention.shape[1])
        ]
        matrix = torch.cat(rows, dim=1)
    matrix = torch.sign(matrix) * torch.sqrt(torch.abs(matrix) + _EPSILON)
    return F.normalize(matrix, dim=-1) * 100.0


def sample_attention(attention: Tensor, uniforms: NDArray[np.float64]) -> Tensor:
    """Maps per image drawn as `numpy.random.choice(M, K, p=...)` does, from given uniforms."""
    rows = []
    for image, uniform in zip(attention, uniforms, strict=True):
        weights = torch.sqrt(image.detach().float().sum(dim=(1, 2)) + _EPSILON)
        probabilities = F.normalize(weights, p=1, dim=0).cpu().numpy().astype(np.float64)
        cumulative = probabilities.cumsum()
        rows.append((cumulative / cumulative[-1]).searchsorted(uniform, side="right"))
    return torch.from_numpy(np.stack(rows)).to(attention.device)


def attention_boxes(
    attention: Tensor, theta: Floats, index: Ints, size: Size, align_corners: bool = False
) -> Tensor:
    """(B, 4) int32: the box of every image, found on the device and read back number by number."""
    boxes = list(_boxes(attention, theta, index, size, align_corners))
    return torch.tensor(boxes, dtype=torch.int32, device=attention.device)


def attention_crop(
    images: Tensor, attention: Tensor, theta: Floats, index: Ints, align_corners: bool = False
) -> Tensor:
    """The box of every image, resized to the whole image."""
    size = (images.shape[2], images.shape[3])
    crops = [
        F.interpolate(
            images[b : b + 1, :, top:bottom, left:right],
            size=size,
            mode="bilinear",
            align_corners=align_corners,
        )
        for b, (top, left, bottom, right) in enumerate(
            _boxes(attention, theta, index, size, align_corners)
        )
    ]
    return torch.cat(crops, dim=0)


def attention_mixup(images: Tensor, attention: Tensor, theta: Floats, index: Ints) -> Tensor:
    """0.6 image + 0.4 crop."""
    return images * 0.6 + attention_crop(images, attention, theta, index) * 0.4


def attention_patch(
    images: Tensor, attention: Tensor, theta: Floats, index: Ints, offsets: Sequence[Floats]
) -> Tensor:
    """The content of the box pasted at another place of its image."""
    height, width = images.shape[2:]
    patched = []
    for b, (top, left, bottom, right) in enumerate(
        _boxes(attention, theta, index, (height, width), False)
    ):
        rows, columns = bottom - top, right - left
        y = math.floor(offsets[b][0] * (height - rows + 1))
        x = math.floor(offsets[b][1] * (width - columns + 1))
        image = images[b : b + 1].clone()
        image[:, :, y : y + rows, x : x + columns] = images[b : b + 1, :, top:bottom, left:right]
        patched.append(image)
    return torch.cat(patched, dim=0)


def attention_dim(
    images: Tensor,
    attention: Tensor,
    theta: Floats,
    index: Ints,
    floor: float = 0.001,
    align_corners: bool = False,
) -> Tensor:
    """Images times (mask of the pixels below the threshold + floor)."""
    masks = []
    for b, m in enumerate(index):
        upsampled, threshold = _threshold(
            attention[b : b + 1, m : m + 1], theta[b], images.shape[2:], align_corners
        )
        masks.append(upsampled < threshold)
    mask = torch.cat(masks, dim=0).to(images.dtype)
    return images * (mask + floor if floor else mask)


def attention_drop(
    images: Tensor, attention: Tensor, theta: Floats, index: Ints, align_corners: bool = False
) -> Tensor:
    """Images times the mask of the pixels below the threshold."""
    return attention_dim(images, attention, theta, index, 0.0, align_corners)


def attention_views(
    images: Tensor,
    attention: Tensor,
    theta: Sequence[Floats],
    index: Sequence[Ints],
    offsets: Sequence[Floats],
) -> list[Tensor]:
    """Mix-up, dim and patch, one loop over the images after the other."""
    thetas, maps = list(zip(*theta, strict=True)), list(zip(*index, strict=True))
    return [
        attention_mixup(images, attention, thetas[0], maps[0]),
        attention_dim(images, attention, thetas[1], maps[1]),
        attention_patch(images, attention, thetas[2], maps[2], offsets),
    ]


def soft_distance_loss(logits: Tensor, view_logits: Sequence[Tensor], targets: Tensor) -> Tensor:
    """Cross entropy, and the distance of every view from the soft target of its image."""
    logits = logits.float()
    target = F.softmax(logits.detach(), dim=1)
    classes = logits.shape[1]
    for b in range(logits.shape[0]):
        label = targets[b]
        if target[b].argmax() != label or target[b].max() < 0.7:
            target[b] = 0.01
            target[b, label] = 1 - 0.01 * classes
    loss = F.cross_entropy(logits, targets)
    for view in view_logits:
        loss = loss + torch.mean(torch.abs(target - F.softmax(view.float(), dim=1)))
    return loss


def _threshold(
    attention: Tensor, theta: float, size: Sequence[int], align_corners: bool
) -> tuple[Tensor, Tensor]:
    """The upsampled map (1, 1, H, W) of one image and its threshold, on the device."""
    attention = attention.detach().float()
    upsampled = F.interpolate(
        attention, size=tuple(size), mode="bilinear", align_corners=align_corners
    )
    return upsampled, theta * attention.max()


def _boxes(
    attention: Tensor, theta: Floats, index: Ints, size: Size, align_corners: bool
) -> Iterator[Box]:
    """(top, left, bottom, right) of each image on the host, padded by a tenth of the image."""
    for b, m in enumerate(index):
        upsampled, threshold = _threshold(
            attention[b : b + 1, m : m + 1], theta[b], size, align_corners
        )
        found = torch.nonzero((upsampled >= threshold)[0, 0])
        bounds = []
        for axis, length in enumerate(size):
            low, high = found[:, axis].min().item(), found[:, axis].max().item()
            bounds.append((max(int(low - 0.1 * length), 0), min(int(high + 0.1 * length), length)))
        (top, bottom), (left, right) = bounds
        yield top, left, bottom, right
