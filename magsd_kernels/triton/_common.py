"""What every Triton module needs."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from magsd_kernels._layout import is_channels_last


def accumulation(dtype: torch.dtype) -> tl.dtype:
    """float64 for float64, float32 for the rest."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def tile(elements: int) -> int:
    """Elements of a tile on a GPU; more in Triton's interpreter, whose costs are by operation."""
    return 4 * elements if triton.knobs.runtime.interpret else elements


def block(size: int, most: int) -> int:
    """The smallest power of two that holds `size`, at most `most`."""
    return min(triton.next_power_of_2(max(size, 1)), most)


def pixel_steps(maps: torch.Tensor) -> tuple[int, int, int]:
    """Steps from image to image, map to map, pixel to pixel (counted row by row)."""
    return (maps.stride(0), maps.stride(1), maps.stride(3 if maps.shape[3] > 1 else 2))


def with_rows(maps: torch.Tensor) -> torch.Tensor:
    """The map itself where its pixels lie evenly, else a dense copy in its memory format."""
    _, _, height, width = maps.shape
    if height == 1 or width == 1 or maps.stride(2) == width * maps.stride(3):
        return maps
    last = is_channels_last(maps)
    return maps.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
