"""Drawing attention maps for the guided views.

Source: the released code of MAG-SD (arXiv 2012.02278); the number of maps and the draws are free.
"""

from __future__ import annotations

from typing import Any

import torch

from magsd_kernels import _checks as check
from magsd_kernels.backends import select
from magsd_kernels.registry import define

_OPERATION = "attention_sampling"
EPS = 1e-12


def sample_attention(
    attention: torch.Tensor,
    uniforms: torch.Tensor,
    *,
    eps: float = EPS,
    backend: str | None = None,
) -> torch.Tensor:
    """Draw K maps per image with replacement, p[m] proportional to sqrt(sum of map m + eps).

    With c the inclusive cumulative sum of p divided by its last entry, the index is the number
    of c[m] <= u, at most M - 1. A negative or NaN sum counts as 0.

    Args:
        attention: (B, M, h, w), floating.
        uniforms: (B, K) float32 in [0, 1).
        eps: at least 0.
        backend: name of a backend, see `use_backend`.

    Returns:
        (B, K) int64 in 0..M-1, without gradient.
    """
    op = "sample_attention"
    check.tensor(op, "attention", attention, check.IMAGES)
    check.tensor(op, "uniforms", uniforms, (attention.shape[0], None), (torch.float32,), attention)
    check.number(op, "eps", eps, 0)
    backend = select(_OPERATION, backend, attention)
    index: torch.Tensor = _sample(attention.detach(), uniforms, eps, backend)
    return index


def _sample_fake(attention: torch.Tensor, uniforms: torch.Tensor, *_: Any) -> torch.Tensor:
    return uniforms.new_empty(uniforms.shape, dtype=torch.int64)


_sample = define(
    _OPERATION,
    "sample_attention(Tensor attention, Tensor uniforms, float eps, str backend) -> Tensor",
    _sample_fake,
)
