"""What every Triton module needs."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


def accumulation(dtype: torch.dtype) -> tl.dtype:
    """float64 for float64, float32 for the rest."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def block(size: int, most: int) -> int:
    """The smallest power of two that holds `size`, at most `most`."""
    return min(triton.next_power_of_2(max(size, 1)), most)
