"""Drawing attention maps with probability proportional to the root of their sum."""

from __future__ import annotations

import torch


def sample_attention(attention: torch.Tensor, uniforms: torch.Tensor, eps: float) -> torch.Tensor:
    """Attention (B, M, h, w), uniforms (B, K) -> (B, K) int64 in 0..M-1.

    Sums run in float64, so that backends that add in another order draw the same maps.
    """
    sums = attention.double().sum((2, 3))
    # A comparison with NaN is false, so that NaN counts as 0, as a negative sum does.
    weights = (torch.where(sums > 0, sums, 0) + eps).sqrt()
    cumulative = weights.cumsum(1)
    cumulative = cumulative / cumulative[:, -1:]
    below = cumulative[:, None, :] <= uniforms[:, :, None].double()
    return below.sum(2).clamp(max=attention.shape[1] - 1)
