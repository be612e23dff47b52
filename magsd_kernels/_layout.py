"""Memory format and accumulation dtype, the same for every backend and for the fakes."""

from __future__ import annotations

import torch


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for the rest."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def is_channels_last(images: torch.Tensor) -> bool:
    """Whether the channels of a (B, C, H, W) tensor lie side by side, slices included.

    A tensor with one channel or one pixel is in both formats and counts as contiguous.
    """
    if images.is_contiguous():
        return False
    _, channels, height, width = images.shape
    _, step_c, step_h, step_w = images.stride()
    return (
        channels > 1
        and step_c == 1
        and (width == 1 or step_w >= channels)
        and (height == 1 or step_h >= step_w)
    )


def empty_like_format(images: torch.Tensor, *leading: int) -> torch.Tensor:
    """Uninitialized (*leading, B, C, H, W) tensor, dense, in the memory format of `images`."""
    batch, channels, height, width = images.shape
    if is_channels_last(images):
        return images.new_empty((*leading, batch, height, width, channels)).movedim(-1, -3)
    return images.new_empty((*leading, batch, channels, height, width))


def in_format_of(result: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """`result` (..., B, C, H, W), dense in the memory format of `images`."""
    if is_channels_last(images):
        return result.movedim(-3, -1).contiguous().movedim(-1, -3)
    return result.contiguous()


def dense(images: torch.Tensor, channels_last: bool) -> torch.Tensor:
    """(B, C, H, W) images as they are where they are dense in that memory format, else a copy."""
    return images.contiguous(
        memory_format=torch.channels_last if channels_last else torch.contiguous_format
    )
