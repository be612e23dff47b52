"""Independent float64 oracles of the operations: loops over images, dense resize matrices.

They are written from the contract and the published description (MAG-SD, arXiv 2012.02278; WS-DAN,
arXiv 1901.09891), and share no code with `magsd_kernels`. Differentiable ones are built from plain
torch arithmetic, so that autograd gives the oracle of the gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# Backends may disagree about a pixel only where |U - t| <= 1e-6 |t|; test data keeps clear of it.
THRESHOLD_MARGIN = 1e-6


class Box(NamedTuple):
    top: int
    left: int
    bottom: int
    right: int


def resize_matrix(n_in: int, n_out: int, mode: str, align_corners: bool = False) -> Tensor:
    """Weights (n_out, n_in) of the one-dimensional resize."""
    weights = torch.zeros(n_out, n_in, dtype=torch.float64)
    if mode == "nearest":
        # Rounding of the scale is torch's own business here: the contract points at F.interpolate.
        positions = torch.arange(n_in, dtype=torch.float64).view(1, 1, n_in)
        chosen = F.interpolate(positions, size=n_out, mode="nearest").view(-1).long()
        weights[torch.arange(n_out), chosen] = 1.0
        return weights
    for i in range(n_out):
        if mode == "area":
            start, end = (i * n_in) // n_out, -((-(i + 1) * n_in) // n_out)
            weights[i, start:end] = 1.0 / (end - start)
            continue
        if align_corners:
            position = i * (n_in - 1) / (n_out - 1) if n_out > 1 else 0.0
        else:
            position = max((i + 0.5) * n_in / n_out - 0.5, 0.0)
        low = min(math.floor(position), n_in - 1)
        high = min(low + 1, n_in - 1)
        weights[i, low] += 1.0 - (position - low)
        weights[i, high] += position - low
    return weights


def resize(x: Tensor, size: Sequence[int], mode: str, align_corners: bool = False) -> Tensor:
    """Resize the last two dimensions of a float64 tensor."""
    rows = resize_matrix(x.shape[-2], size[0], mode, align_corners)
    columns = resize_matrix(x.shape[-1], size[1], mode, align_corners)
    return rows @ x @ columns.T


def resample_attention(
    maps: Sequence[Tensor],
    size: Sequence[int] | None = None,
    mode: str = "area",
    align_corners: bool = False,
) -> Tensor:
    size = tuple(maps[-1].shape[-2:]) if size is None else size
    total = resize(maps[0], size, mode, align_corners)
    for x in maps[1:]:
        total = total + resize(x, size, mode, align_corners)
    return total


def batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    var: Tensor,
    training: bool,
    eps: float,
) -> Tensor:
    """Batch norm, by the batch's biased variance in training."""
    mu, sigma2 = (x[:, None, None] for x in (mean, var))
    if training:
        count = x.numel() // x.shape[1]
        mu = x.sum((0, 2, 3), keepdim=True) / count
        sigma2 = ((x - mu) ** 2).sum((0, 2, 3), keepdim=True) / count
    scaled = (x - mu) / torch.sqrt(sigma2 + eps) * weight[:, None, None]
    return scaled + bias[:, None, None]


def batch_norm_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    *,
    groups: int = 1,
    residual: Tensor | None = None,
    act: str = "relu",
    training: bool,
    eps: float = 1e-5,
) -> Tensor:
    """Each group's batch norm, the residual, the activation. An empty group has no statistics."""
    own = training and len(x) > 0
    rows = len(x) // groups
    z = torch.cat(
        [
            batch_norm(part, weight, bias, running_mean, running_var, own, eps)
            for part in (x[i * rows : (i + 1) * rows] for i in range(groups))
        ]
    )
    if residual is not None:
        z = z + residual
    if act == "relu":
        return torch.where(z <= 0, 0.0, z)  # The gradient at 0 is 0, and NaN passes.
    return z * torch.sigmoid(z) if act == "silu" else z


def multiscale_attention(
    projections: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    running_means: Sequence[Tensor],
    running_vars: Sequence[Tensor],
    size: Sequence[int] | None = None,
    *,
    training: bool,
    eps: float = 1e-3,
    mode: str = "area",
    align_corners: bool = False,
) -> Tensor:
    rectified = [
        batch_norm(x, w, b, mean, var, training, eps).clamp_min(0.0)
        for x, w, b, mean, var in zip(
            projections, weights, biases, running_means, running_vars, strict=True
        )
    ]
    return resample_attention(rectified, size, mode, align_corners)


def bilinear_attention_pool(
    features: Tensor,
    attention: Tensor,
    pool: str = "avg",
    signed_sqrt: bool = True,
    normalize: bool = True,
    scale: float = 1.0,
    eps: float = 1e-12,
) -> Tensor:
    size = tuple(features.shape[-2:])
    if tuple(attention.shape[-2:]) != size:
        attention = resize(attention, size, "bilinear", align_corners=True)
    images = []
    for f, a in zip(features, attention, strict=True):
        rows = []
        for m in range(a.shape[0]):
            products = (a[m] * f).flatten(1)
            if pool == "avg":
                rows.append(products.sum(1) / products.shape[1])
            else:
                first = torch.from_numpy(np.argmax(products.detach().numpy(), 1))
                rows.append(products.gather(1, first[:, None])[:, 0])
        pooled = torch.cat(rows)
        if signed_sqrt:
            # Away from 0, where the derivative is 0 by definition and not by arithmetic.
            size_or_one = torch.where(pooled == 0, 1.0, pooled.abs() + eps)
            pooled = torch.where(pooled == 0, 0.0, pooled.sign() * size_or_one.sqrt())
        if normalize:
            norm = torch.sqrt((pooled * pooled).sum()) if bool(pooled.any()) else 0 * pooled.sum()
            pooled = pooled / norm.clamp_min(1e-12)
        images.append(scale * pooled)
    return torch.stack(images)


def sampling_probabilities(attention: Tensor, eps: float = 1e-12) -> np.ndarray:
    """Probabilities (B, M) of drawing each map."""
    sums = attention.double().cpu().numpy().sum(axis=(2, 3))
    sums = np.where(np.isnan(sums) | (sums < 0), 0.0, sums)
    roots = np.sqrt(sums + eps)
    return roots / roots.sum(axis=1, keepdims=True)


def sample_attention(attention: Tensor, uniforms: Tensor, eps: float = 1e-12) -> list[list[int]]:
    """Indices (B, K); asserts that no uniform lies within rounding of a boundary."""
    cumulative = np.cumsum(sampling_probabilities(attention, eps), axis=1)
    drawn = []
    for c, row in zip(cumulative, uniforms.double().cpu().numpy(), strict=True):
        if row.size:
            margin = np.abs(c[:, None] - row[None, :])[:-1]
            assert margin.size == 0 or margin.min() > 1e-6, "test data lies on a boundary"
        drawn.append([min(int((c <= u).sum()), len(c) - 1) for u in row])
    return drawn


def chosen_maps(attention: Tensor, index: Tensor | None) -> list[np.ndarray]:
    """Each image's low-resolution map as float64."""
    maps = attention.detach().double().cpu().numpy()
    if index is None:
        assert maps.shape[1] == 1
        return [image[0] for image in maps]
    return [image[int(i)] for image, i in zip(maps, index, strict=True)]


def upsampled(low: np.ndarray, size: Sequence[int], align_corners: bool) -> np.ndarray:
    return resize(torch.from_numpy(low), size, "bilinear", align_corners).numpy()


def threshold(low: np.ndarray, theta: float) -> float:
    return float(theta) * float(np.max(low))


def padded_extent(first: int, last: int, length: int, padding: float) -> tuple[int, int]:
    """The published rule along one dimension: from the first to the last passing entry, padded."""
    start = max(int(first - padding * length), 0)
    stop = min(int(last + padding * length), length)
    return start, max(stop, start + 1)


def box_of(passing: np.ndarray, padding: float) -> Box:
    """The published box rule on a boolean mask (H, W)."""
    height, width = passing.shape
    ys, xs = np.nonzero(passing)
    if len(ys) == 0:
        return Box(0, 0, height, width)
    top, bottom = padded_extent(int(ys.min()), int(ys.max()), height, padding)
    left, right = padded_extent(int(xs.min()), int(xs.max()), width, padding)
    return Box(top, left, bottom, right)


class Sides(NamedTuple):
    """On which side of the threshold each pixel of an image lies, as masks (H, W).

    A pixel in `undecided` may lie on either, and no other may lie elsewhere.
    """

    passes: np.ndarray
    below: np.ndarray
    undecided: np.ndarray


def threshold_sides(low: Tensor, theta: Tensor, size: Sequence[int], align_corners: bool) -> Sides:
    """Sides [U >= t] and [U < t] for one map (h, w) and a float32 scalar theta.

    Undecided are the pixels with |U - t| <= 1e-6 |t|, and those within reach of an infinite entry:
    a weight of 0 times infinity is NaN in one order of evaluation and is not read in another.
    """
    low = low.detach().float().cpu()
    t = float(theta.cpu() * low.max())
    if math.isnan(t):
        nowhere = np.zeros(tuple(size), dtype=bool)
        return Sides(nowhere, nowhere, nowhere)
    finite = low.masked_fill(low.isinf(), 0.0)
    # U is defined in float32; the dense float64 matrices confirm torch's.
    wide = F.interpolate(
        finite[None, None], tuple(size), mode="bilinear", align_corners=align_corners
    )
    upper = wide[0, 0].double().numpy()
    exact = upsampled(finite.double().numpy(), size, align_corners)
    assert np.abs(upper - exact).max() <= 1e-5 * float(finite.abs().max())
    undecided = within_reach(low.isinf(), size, align_corners)
    if t != 0 and math.isfinite(t):
        undecided |= np.abs(upper - t) <= THRESHOLD_MARGIN * abs(t)
    return Sides((upper >= t) & ~undecided, (upper < t) & ~undecided, undecided)


def within_reach(marked: Tensor, size: Sequence[int], align_corners: bool) -> np.ndarray:
    """Pixels (H, W) of a bilinear resize that read a marked entry, with whatever weight."""
    read = []
    for n_in, n_out in zip(marked.shape, size, strict=True):
        weights = resize_matrix(n_in, n_out, "bilinear", align_corners)
        entries = torch.arange(n_in, dtype=torch.float64)
        position = weights @ entries
        # The margin covers positions that another rounding puts beyond an entry.
        read.append(((position[:, None] - entries).abs() < 1 + 1e-5).double())
    return (read[0] @ marked.double() @ read[1].T > 0).numpy()


def box_is_allowed(box: Box, sides: Sides, padding: float) -> bool:
    """Whether `box` is the box of the passing pixels and some of the undecided ones."""
    height, width = sides.passes.shape
    if not sides.passes.any() and box == Box(0, 0, height, width):
        return True
    possible = sides.passes | sides.undecided
    rows = _extents(possible.any(1), sides.passes.any(1), padding, (box.top, box.bottom))
    columns = _extents(possible.any(0), sides.passes.any(0), padding, (box.left, box.right))
    for first, last in rows:
        for left, right in columns:
            window = possible[first : last + 1, left : right + 1]
            edges = (window[0], window[-1], window[:, 0], window[:, -1])
            if all(edge.any() for edge in edges):
                return True
    return False


def _extents(
    possible: np.ndarray, certain: np.ndarray, padding: float, wanted: tuple[int, int]
) -> list[tuple[int, int]]:
    """First and last entries that hold every certain one and give the wanted interval."""
    entries, held = np.nonzero(possible)[0].tolist(), np.nonzero(certain)[0].tolist()
    pairs = [
        (first, last)
        for first in entries
        for last in reversed(entries)
        if first <= min(held, default=last) and last >= max(held, default=first)
    ]
    length = len(possible)
    return [p for p in pairs if p[0] <= p[1] and padded_extent(*p, length, padding) == wanted]


def threshold_masks(
    attention: Tensor,
    theta: Tensor,
    size: Sequence[int],
    index: Tensor | None,
    align_corners: bool,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Per image ([U >= t], [U < t]); asserts that no pixel lies within rounding of t."""
    masks = []
    for low, angle in zip(chosen_maps(attention, index), theta.double().tolist(), strict=True):
        upper, t = upsampled(low, size, align_corners), threshold(low, angle)
        constant = low.size and low.max() == low.min()
        if not constant and np.isfinite(t):
            gap = np.nanmin(np.abs(upper - t))
            assert gap > 4 * THRESHOLD_MARGIN * abs(t), "test data lies on the threshold"
        masks.append((upper >= t, upper < t))
    return masks


def attention_boxes(
    attention: Tensor,
    theta: Tensor,
    size: Sequence[int],
    padding: float = 0.1,
    index: Tensor | None = None,
    align_corners: bool = False,
) -> list[Box]:
    masks = threshold_masks(attention, theta, size, index, align_corners)
    return [box_of(passing, padding) for passing, _ in masks]


def crop_to_image(image: Tensor, box: Box, align_corners: bool) -> Tensor:
    """The box of one image (C, H, W), resized to H x W."""
    content = image[:, box.top : box.bottom, box.left : box.right]
    return resize(content, image.shape[-2:], "bilinear", align_corners)


def crops_to_images(images: Tensor, boxes: Sequence[Box], align_corners: bool) -> Tensor:
    return _stack(
        [crop_to_image(x, box, align_corners) for x, box in zip(images, boxes, strict=True)], images
    )


def paste_boxes(images: Tensor, boxes: Sequence[Box], offsets: Tensor) -> Tensor:
    """Each image with the content of its box at its offsets (u_y, u_x)."""
    height, width = images.shape[-2:]
    patched = []
    for image, box, (u_y, u_x) in zip(images, boxes, offsets.double().tolist(), strict=True):
        rows, columns = box.bottom - box.top, box.right - box.left
        y = math.floor(u_y * (height - rows + 1))
        x = math.floor(u_x * (width - columns + 1))
        result = image.clone()
        content = image[:, box.top : box.bottom, box.left : box.right]
        result[:, y : y + rows, x : x + columns] = content
        patched.append(result)
    return _stack(patched, images)


def _stack(results: list[Tensor], images: Tensor) -> Tensor:
    return torch.stack(results) if results else 0 * images


def attention_crop(
    images: Tensor,
    attention: Tensor,
    theta: Tensor,
    padding: float = 0.1,
    index: Tensor | None = None,
    align_corners: bool = False,
) -> Tensor:
    size = images.shape[-2:]
    boxes = attention_boxes(attention, theta, size, padding, index, align_corners)
    return crops_to_images(images, boxes, align_corners)


def attention_mixup(
    images: Tensor,
    attention: Tensor,
    theta: Tensor,
    padding: float = 0.1,
    weight: float = 0.4,
    index: Tensor | None = None,
    align_corners: bool = False,
) -> Tensor:
    crops = attention_crop(images, attention, theta, padding, index, align_corners)
    return (1.0 - weight) * images + weight * crops


def attention_patch(
    images: Tensor,
    attention: Tensor,
    theta: Tensor,
    offsets: Tensor,
    padding: float = 0.1,
    index: Tensor | None = None,
    align_corners: bool = False,
) -> Tensor:
    size = images.shape[-2:]
    boxes = attention_boxes(attention, theta, size, padding, index, align_corners)
    return paste_boxes(images, boxes, offsets)


def attention_dim(
    images: Tensor,
    attention: Tensor,
    theta: Tensor,
    floor: float = 0.001,
    index: Tensor | None = None,
    align_corners: bool = False,
) -> Tensor:
    masks = threshold_masks(attention, theta, images.shape[-2:], index, align_corners)
    factors = [torch.from_numpy(below.astype(np.float64)) + floor for _, below in masks]
    return torch.stack([image * f for image, f in zip(images, factors, strict=True)])


def attention_drop(
    images: Tensor,
    attention: Tensor,
    theta: Tensor,
    index: Tensor | None = None,
    align_corners: bool = False,
) -> Tensor:
    return attention_dim(images, attention, theta, 0.0, index, align_corners)


def attention_views(
    images: Tensor,
    attention: Tensor,
    index: Tensor,
    theta: Tensor,
    offsets: Tensor,
    padding: float = 0.1,
    weight: float = 0.4,
    floor: float = 0.001,
    align_corners: bool = False,
) -> Tensor:
    a, i, th = attention, index.cpu(), theta.cpu()
    mixed = attention_mixup(images, a, th[:, 0], padding, weight, i[:, 0], align_corners)
    dimmed = attention_dim(images, a, th[:, 1], floor, i[:, 1], align_corners)
    patched = attention_patch(images, a, th[:, 2], offsets, padding, i[:, 2], align_corners)
    return torch.stack([mixed, dimmed, patched])


def softmax(row: Tensor) -> Tensor:
    shifted = torch.exp(row - row.max().detach())
    return shifted / shifted.sum()


def soft_distance_loss(
    logits: Tensor,
    view_logits: Tensor | Sequence[Tensor],
    targets: Tensor,
    confidence: float = 0.7,
    smoothing: float = 0.01,
    class_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, cross entropy, distance) as float64 scalars."""
    batch, classes = logits.shape
    weights = torch.ones(classes, dtype=torch.float64) if class_weights is None else class_weights
    weighted, total_weight = logits.new_zeros(()), logits.new_zeros(())
    distance = logits.new_zeros(())
    for b in range(batch):
        target = int(targets[b])
        p = softmax(logits[b])
        top = logits[b].max().detach()
        log_sum = top + torch.log(torch.exp(logits[b] - top).sum())
        weighted = weighted + weights[target] * (log_sum - logits[b, target])
        total_weight = total_weight + weights[target]
        p = p.detach()
        if int(p.argmax()) != target or float(p.max()) < confidence:
            p = torch.full((classes,), smoothing, dtype=torch.float64)
            p[target] = 1.0 - classes * smoothing
        for view in view_logits:
            distance = distance + (p - softmax(view[b])).abs().sum() / (batch * classes)
    cross_entropy = weighted / total_weight
    return cross_entropy + distance, cross_entropy, distance
