"""How the maps of all scales are cut and resampled: what the kernels of both directions share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from magsd_kernels._layout import is_channels_last
from magsd_kernels.triton._common import block, pixel_steps
from magsd_kernels.triton._resampling import kernel_mode, most_inputs, most_outputs

_MOST_PARTS = 64
_MOST_MAPS = 64  # maps of a tile

Tensors = list[torch.Tensor]


@dataclass(frozen=True)
class Tile:
    """Pixels and maps of a tile of about `elements`, and into how many chunks the maps fall."""

    pixels: int
    maps: int
    chunks: int


def tile_of(maps: int, elements: int, dtype: torch.dtype) -> Tile:
    """Whole rows of maps where they fit; float64 takes twice the registers, and half the tile."""
    wide = block(maps, _MOST_MAPS)
    elements //= 2 if dtype == torch.float64 else 1
    return Tile(max(elements // wide, 1), wide, triton.cdiv(maps, wide))


@dataclass(frozen=True)
class Parts:
    """The pixels of each scale, cut into `count` parts of lengths[scale] pixels or fewer."""

    count: int
    lengths: tuple[int, ...]


def parts_of(maps: Tensors, pixels: int) -> Parts:
    """Parts of whole tiles, so that every part begins where 16-byte accesses can."""
    totals = [m.shape[0] * m.shape[2] * m.shape[3] for m in maps]
    count = block(triton.cdiv(max(totals), pixels), _MOST_PARTS)
    return Parts(count, tuple(triton.cdiv(triton.cdiv(n, count), pixels) * pixels for n in totals))


def sizes_of(maps: Tensors) -> tuple[tuple[object, ...], ...]:
    """Heights, widths and steps of the scales."""
    return (
        tuple(m.shape[2] for m in maps),
        tuple(m.shape[3] for m in maps),
        tuple(pixel_steps(m) for m in maps),
    )


def resampling(
    maps: Tensors, size: tuple[int, int], mode: str, align_corners: bool
) -> dict[str, object]:
    """Settings of the resampling of `maps` to `size`, by their names in a kernel."""
    sizes = [(m.shape[2], m.shape[3]) for m in maps]
    return {
        "MODES": tuple(kernel_mode(low, size, mode) for low in sizes),
        "ALIGN": align_corners,
        "TAPS": tuple(
            tuple(most_inputs(a, b, mode) for a, b in zip(low, size, strict=True)) for low in sizes
        ),
        "OUTPUTS": tuple(
            tuple(most_outputs(a, b, mode, align_corners) for a, b in zip(low, size, strict=True))
            for low in sizes
        ),
    }


def empty_like_first(first: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Uninitialised (B, M, *size) in the memory format of `first`."""
    batch, channels = first.shape[:2]
    if is_channels_last(first):
        return first.new_empty((batch, *size, channels)).movedim(-1, -3)
    return first.new_empty((batch, channels, *size))
