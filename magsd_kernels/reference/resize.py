"""Separable resizing and its adjoint, as matrices.

Adjoint products run in float64: they are small, and so they stay deterministic (no atomic
scatter) and exact where torch's settings allow TF32 or bfloat16 in float32 products.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def resize(
    maps: torch.Tensor, size: tuple[int, int], mode: str, align_corners: bool
) -> torch.Tensor:
    """Maps (B, M, h, w) -> (B, M, H, W). mode: area, bilinear (without antialiasing), nearest."""
    if mode == "area":
        return F.adaptive_avg_pool2d(maps, size)
    if mode == "nearest":
        return F.interpolate(maps, size, mode="nearest")
    return F.interpolate(maps, size, mode="bilinear", align_corners=align_corners)


def resize_adjoint(
    grad: torch.Tensor, size: tuple[int, int], mode: str, align_corners: bool
) -> torch.Tensor:
    """Gradient (B, M, h, w) of the input of size (h, w), given that of `resize`'s result."""
    rows = _matrix(size[0], grad.shape[-2], mode, align_corners, grad.device)
    columns = _matrix(size[1], grad.shape[-1], mode, align_corners, grad.device)
    return (rows @ grad.double() @ columns.T).to(grad.dtype)


def _matrix(
    size_in: int, size_out: int, mode: str, align_corners: bool, device: torch.device
) -> torch.Tensor:
    """(size_in, size_out) float64: what each input contributes to each output, by resizing I."""
    identity = torch.eye(size_in, dtype=torch.float64, device=device)[None, :, :, None]
    return resize(identity, (size_out, 1), mode, align_corners)[0, :, :, 0]
