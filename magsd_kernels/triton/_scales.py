"""How the maps of all scales are cut and resampled: what the kernels of both directions share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from magsd_kernels._layout import is_channels_last
from magsd_kernels.triton._common import block, pixel_steps
from magsd_kernels.triton._resampling import kernel_mode, most_inputs, most_outputs

_PROGRAMS = 512  # about as many parts: several for each multiprocessor, whatever GPU it is
_MOST_MAPS = 64  # maps of a tile
COMBINED = 32  # parts that are combined at once

Tensors = list[torch.Tensor]


@dataclass(frozen=True)
class Tile:
    """Pixels and maps of a tile of about `elements`, and into how many chunks the maps fall."""

    pixels: int
    maps: int
    chunks: int


def tile_of(maps: int, elements: int, dtype: torch.dtype) -> Tile:
    """Whole rows of maps where they fit; float64 takes twice the registers, and half the tile."""
    row = block(maps, _MOST_MAPS)
    elements //= 2 if dtype == torch.float64 else 1
    return Tile(max(elements // row, 1), row, triton.cdiv(maps, row))


@dataclass(frozen=True)
class Partition:
    """The pixels of scale i, cut into counts[i] parts of lengths[i] pixels or fewer."""

    counts: tuple[int, ...]
    lengths: tuple[int, ...]


def partition(maps: Tensors, pixels: int, loads: tuple[int, ...] | None = None) -> Partition:
    """Parts of about as many loads each. loads: of a pixel of each scale, by default 1.

    They are of whole tiles of `pixels`, so that every part begins where 16-byte accesses can.
    """
    totals = [m.shape[0] * m.shape[2] * m.shape[3] for m in maps]
    loads = loads or (1,) * len(maps)
    work = sum(triton.cdiv(n, pixels) * one for n, one in zip(totals, loads, strict=True))
    most = triton.cdiv(work, _PROGRAMS)
    lengths = tuple(max(most // one, 1) * pixels for one in loads)
    counts = tuple(triton.cdiv(n, length) for n, length in zip(totals, lengths, strict=True))
    return Partition(counts, lengths)


@triton.jit
def parts_in(batch, pixels, length, INDEX: tl.constexpr):
    """How many parts a scale has."""
    return tl.cdiv(tl.cast(batch, INDEX) * pixels, length).to(tl.int32)


def parameter_steps(
    parameters: tuple[Tensors | None, ...], scales: int
) -> tuple[tuple[int, ...], ...]:
    """Steps of each scale's parameters from map to map; 0 of those that are not there."""
    return tuple(
        tuple(0 if values is None else values[i].stride(0) for values in parameters)
        for i in range(scales)
    )


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
    """Uninitialized (B, M, *size) in the memory format of `first`."""
    batch, channels = first.shape[:2]
    if is_channels_last(first):
        return first.new_empty((batch, *size, channels)).movedim(-1, -3)
    return first.new_empty((batch, channels, *size))
