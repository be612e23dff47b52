"""Bilinear attention pooling (Hu et al., arXiv 1901.09891, section 3.1)."""

from __future__ import annotations

import torch

from magsd_kernels._layout import accumulation_dtype, in_format_of
from magsd_kernels.reference.resize import resize, resize_adjoint

_SMALLEST_NORM = 1e-12


def bilinear_attention_pool(
    features: torch.Tensor,
    attention: torch.Tensor,
    pool: str,
    signed_sqrt: bool,
    normalize: bool,
    scale: float,
    eps: float,
    allow_tf32: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pooled matrix (B, M*C); its norm before normalization (B,) or empty; argmax or empty.

    The argmax (B, M, C) int32 names the first maximal pixel and exists for pool "max" only.
    `allow_tf32` is there for backends that do not see torch's settings, which hold here anyway.
    """
    flat, maps = _flatten(features, attention)
    matrix, argmax = _pool(flat, maps, pool)
    if signed_sqrt:
        matrix = matrix.sign() * (matrix.abs() + eps).sqrt()
    norm = matrix.new_empty(0)
    if normalize:
        norm = torch.linalg.vector_norm(matrix, dim=(1, 2))
        matrix = matrix / norm.clamp(min=_SMALLEST_NORM)[:, None, None]
    return (scale * matrix).flatten(1).to(features.dtype), norm, argmax


def bilinear_attention_pool_backward(
    grad: torch.Tensor,
    features: torch.Tensor,
    attention: torch.Tensor,
    output: torch.Tensor,
    norm: torch.Tensor,
    argmax: torch.Tensor,
    pool: str,
    signed_sqrt: bool,
    normalize: bool,
    scale: float,
    eps: float,
    allow_tf32: bool,
    needs: list[bool],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of features and attention; an empty tensor for one that is not needed.

    `output` is there for backends that read the matrix back from it; here it is computed again.
    """
    flat, maps = _flatten(features, attention)
    pooled = _pool(flat, maps, pool, argmax)[0]
    upcast = scale * grad.to(flat.dtype).view_as(pooled)
    if normalize:
        root = pooled.sign() * (pooled.abs() + eps).sqrt() if signed_sqrt else pooled
        divisor = norm.clamp(min=_SMALLEST_NORM)[:, None, None]
        unit = root / divisor
        projection = (upcast * unit).sum((1, 2), keepdim=True)
        # Under the smallest norm the divisor is constant, and no gradient flows through it.
        projection = torch.where(norm[:, None, None] >= _SMALLEST_NORM, projection, 0)
        upcast = (upcast - unit * projection) / divisor
    if signed_sqrt:
        upcast = torch.where(pooled == 0, 0, upcast / (2 * (pooled.abs() + eps).sqrt()))
    if pool == "avg":
        grad_flat, grad_maps = _average_backward(upcast, flat, maps, needs)
    else:
        grad_flat, grad_maps = _maximum_backward(upcast, flat, maps, argmax)
    if needs[0]:
        grad_features = in_format_of(grad_flat.view(features.shape).to(features.dtype), features)
    else:
        grad_features = features.new_empty(0)
    if not needs[1]:
        return grad_features, attention.new_empty(0)
    grad_attention = grad_maps.view(*attention.shape[:2], *features.shape[2:])
    if attention.shape[2:] != features.shape[2:]:
        height, width = attention.shape[2:]
        grad_attention = resize_adjoint(grad_attention, (height, width), "bilinear", True)
    return grad_features, in_format_of(grad_attention.to(attention.dtype), attention)


def _flatten(features: torch.Tensor, attention: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Features (B, C, HW) and attention (B, M, HW) in the accumulation dtype."""
    dtype = accumulation_dtype(features.dtype)
    height, width = features.shape[2:]
    attention = attention.to(dtype)
    if attention.shape[2:] != (height, width):
        attention = resize(attention, (height, width), "bilinear", True)
    return features.to(dtype).flatten(2), attention.flatten(2)


def _pool(
    flat: torch.Tensor, maps: torch.Tensor, pool: str, argmax: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, M, C) average or maximum over the pixels of A F, and the argmax (empty for average)."""
    if pool == "avg":
        pooled = maps @ flat.transpose(1, 2) / flat.shape[2]
        return pooled, flat.new_empty(0, dtype=torch.int32)
    rows, indices = [], []
    # One map at a time: (B, M, C, HW) at once would not fit in memory.
    for m in range(maps.shape[1]):
        products = maps[:, m : m + 1] * flat
        first = products.argmax(2) if argmax is None else argmax[:, m].long()
        rows.append(products.gather(2, first[:, :, None])[:, :, 0])
        indices.append(first.int())
    return torch.stack(rows, 1), torch.stack(indices, 1)


def _average_backward(
    grad: torch.Tensor, flat: torch.Tensor, maps: torch.Tensor, needs: list[bool]
) -> tuple[torch.Tensor, torch.Tensor]:
    grad = grad / flat.shape[2]
    nothing = flat.new_empty(0)
    return (
        grad.transpose(1, 2) @ maps if needs[0] else nothing,
        grad @ flat if needs[1] else nothing,
    )


def _maximum_backward(
    grad: torch.Tensor, flat: torch.Tensor, maps: torch.Tensor, argmax: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    pixels = torch.arange(flat.shape[2], device=flat.device, dtype=argmax.dtype)
    grad_flat, grad_maps = torch.zeros_like(flat), []
    for m in range(maps.shape[1]):
        chosen = (argmax[:, m, :, None] == pixels) * grad[:, m, :, None]
        grad_flat += chosen * maps[:, m : m + 1]
        grad_maps.append((chosen * flat).sum(1))
    return grad_flat, torch.stack(grad_maps, 1)
