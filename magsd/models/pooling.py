"""Bilinear attention pooling as the classifiers use it: attention finer than the features, and a
choice of regularizer.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from magsd_kernels import bilinear_attention_pool


class AttentionPool(nn.Module):
    """Features (B, C, H, W) under attention (B, M, h, w) -> (B, M*C).

    pool: "avg" or "max" over the pixels. length: of the pooled vector, where it is normalized.
    dropout: None normalizes; else the vector is not normalized, and its entries are dropped with
    this probability in training.

    Features coarser than the attention are pooled as if they had been upsampled to it, bilinearly
    with align_corners=False, so that nothing of a fine attention map is lost.
    """

    def __init__(
        self, *, pool: str = "avg", length: float = 1.0, dropout: float | None = None
    ) -> None:
        super().__init__()
        if pool not in ("avg", "max"):
            raise ValueError(f"pool: expected avg or max, got {pool!r}")
        self.pool = pool
        normalize = dropout is None
        # Without normalization the signed square roots have about the length that the published
        # classifier sees, so that they need no factor.
        self.settings: dict[str, Any] = {
            "pool": pool,
            "normalize": normalize,
            "scale": length if normalize else 1.0,
        }
        self.dropout = nn.Identity() if dropout is None else nn.Dropout(dropout)

    def forward(self, features: Tensor, attention: Tensor) -> Tensor:
        """The pooled vector, entry m*C + c."""
        size, fine = features.shape[2:], attention.shape[2:]
        if fine[0] > size[0] or fine[1] > size[1]:
            if self.pool == "avg":
                attention = pooled_onto(attention, (int(size[0]), int(size[1])))
            else:
                features = F.interpolate(features, fine, mode="bilinear", align_corners=False)
        pooled: Tensor = self.dropout(bilinear_attention_pool(features, attention, **self.settings))
        return pooled

    def extra_repr(self) -> str:
        """The settings."""
        return ", ".join(f"{key}={value!r}" for key, value in self.settings.items())


def pooled_onto(attention: Tensor, size: tuple[int, int]) -> Tensor:
    """The coarse map (B, M, *size) that pools coarse features as `attention` (B, M, h, w) pools
    the same features upsampled to h x w.

    With U the upsampling, mean over the fine pixels of A U(F) is mean over the coarse ones of
    n/N U^T(A) F, N and n the numbers of fine and coarse pixels: so the large operand stays small.
    U is one matrix for the rows and one for the columns.
    """
    fine = attention.shape[2:]
    factor = size[0] * size[1] / (fine[0] * fine[1])
    with torch.autocast(attention.device.type, enabled=False):
        rows = _upsampling(size[0], int(fine[0]), attention.device)
        columns = _upsampling(size[1], int(fine[1]), attention.device)
        coarse = rows.T @ attention.float() @ columns * factor
    return coarse.to(attention.dtype)


def _upsampling(coarse: int, fine: int, device: torch.device) -> Tensor:
    """(fine, coarse) float32: bilinear interpolation of one axis, align_corners=False."""
    unit = torch.eye(coarse, device=device)[None]
    return F.interpolate(unit, fine, mode="linear", align_corners=False)[0].T
