"""Bilinear attention pooling: P = A F^T over the pixels, its signed square root and norm.

The norm couples all entries of an image, so that the forward runs the product twice: the first
launch keeps only sums of squares by tiles, the second scales and writes, and begins with the images
that the first has read last, which the second-level cache still holds. At B = 256, C = 2048, M = 32
and 7 x 7 pixels in bfloat16 that reads the features twice (2 x 51 MB, less what the cache spares)
and writes P once (34 MB): 137 MB at the most. Roots that are stored and scaled later would move
51 + 3 x 34 = 153 MB in bfloat16, rounded twice, and 51 + 2 x 67 + 34 = 219 MB in float32. With
more than twice as many pixels as that they would move less, at batches that outgrow the cache.
Without the norm one launch does.

The backward is in `_bilinear_pool_backward.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from magsd_kernels._layout import accumulation_dtype
from magsd_kernels.triton._bilinear_pool_backward import bilinear_attention_pool_backward
from magsd_kernels.triton._bilinear_pool_tile import Call, pooled_tile, root_of, sum_of_parts
from magsd_kernels.triton._common import tunable, with_warps
from magsd_kernels.triton._resampling import entry

__all__ = ["bilinear_attention_pool", "bilinear_attention_pool_backward"]

_CONFIGS = [*with_warps(8), *with_warps(16, registers=128)]
_KEY = ["SHAPE", "steps", "STAGE", "MAXIMUM", "RESIZE", "KIND", "PRECISION"]


@tunable(_CONFIGS, _KEY)
@triton.jit
def _forward_kernel(
    features, attention, output, norms, argmax, parts, size, batch_steps, map_steps,
    steps: tl.constexpr, SHAPE: tl.constexpr,
    STAGE: tl.constexpr, MAXIMUM: tl.constexpr, SIGNED_SQRT: tl.constexpr,
    SCALE: tl.constexpr, EPS: tl.constexpr, SMALLEST: tl.constexpr,
    RESIZE: tl.constexpr, KIND: tl.constexpr, PRECISION: tl.constexpr,
    MAPS: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr, PARTS: tl.constexpr,
    INDEX: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """STAGE "norm" writes a tile's sum of squares to `parts`; "write" and "plain" the output."""
    maps: tl.constexpr = entry(SHAPE, 0)
    channels: tl.constexpr = entry(SHAPE, 1)
    across = tl.cdiv(channels, CHANNELS)  # tiles of channels
    b, tile_c, tile_m = tl.program_id(0) // across, tl.program_id(0) % across, tl.program_id(1)
    if STAGE == "write":
        b = tl.num_programs(0) // across - 1 - b
    b = b.to(tl.int64)
    m = (tile_m * MAPS + tl.arange(0, MAPS)).to(INDEX)
    c = (tile_c * CHANNELS + tl.arange(0, CHANNELS)).to(INDEX)
    pooled, first = pooled_tile(
        features + b * batch_steps[0], attention + b * batch_steps[1], m, c, size, map_steps,
        steps, SHAPE,
        MAXIMUM, RESIZE, KIND, PRECISION, MAPS, CHANNELS, PIXELS, INDEX, ACC,
    )  # fmt: skip
    inside = (m < maps)[:, None] & (c < channels)[None, :]
    root = tl.where(inside, root_of(pooled, SIGNED_SQRT, EPS, ACC), 0.0)
    tiles = across * tl.num_programs(1)
    if STAGE == "norm":
        tl.store(parts + b * tiles + tile_m * across + tile_c, tl.sum(tl.sum(root * root, 1), 0))
    else:
        factor = tl.full([], SCALE, ACC)
        if STAGE == "write":
            norm = tl.sqrt(sum_of_parts(parts + b * tiles, tiles, PARTS))
            if (tile_c == 0) & (tile_m == 0):
                tl.store(norms + b, norm)
            smallest = tl.full([], SMALLEST, ACC)
            factor = factor / tl.where(norm < smallest, smallest, norm)
        image = b * maps * channels
        at = m[:, None] * channels + c[None, :]
        tl.store(output + image + at, (root * factor).to(output.dtype.element_ty), mask=inside)
        if MAXIMUM:
            tl.store(argmax + image + at, first, mask=inside)


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
    """
    call = Call(features, attention, pool, signed_sqrt, scale, eps, allow_tf32)
    batch, dtype = features.shape[0], accumulation_dtype(features.dtype)
    output = features.new_empty((batch, call.maps * call.channels))
    norm = features.new_empty((batch if normalize else 0,), dtype=dtype)
    shape = (batch, call.maps, call.channels) if call.maximum else (0,)
    argmax = features.new_empty(shape, dtype=torch.int32)
    if batch == 0:
        return output, norm, argmax
    tile = call.product_tile()
    tiles = call.tiles(tile["CHANNELS"])
    count = tiles[0] * tiles[1]
    parts = features.new_empty((batch, count) if normalize else (0,), dtype=dtype)
    for stage in ("norm", "write") if normalize else ("plain",):
        _forward_kernel[(batch * tiles[0], tiles[1])](
            call.features, call.attention, output, norm, argmax, parts, **call.sizes,
            STAGE=stage, MAXIMUM=call.maximum, PARTS=triton.next_power_of_2(count),
            **call.settings, **tile,
        )  # fmt: skip
    return output, norm, argmax
