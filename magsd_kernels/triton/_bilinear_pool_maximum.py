"""Bilinear attention pooling by maximum, backward.

Each entry of P has one pixel, its first maximal one, to which its gradient belongs: a program owns
a tile of channels and pixels and walks over the maps, so that nothing is added atomically.
"""

from __future__ import annotations

import triton
import triton.language as tl

from magsd_kernels.triton._bilinear_pool_tile import (
    attention_tile,
    feature_tile,
    gradient_of_pooled,
    norm_and_projection,
)
from magsd_kernels.triton._resampling import entry


@triton.jit
def maximum_backward_kernel(
    features, attention, grad, norms, parts, argmax, grad_features, shares, tiles,
    size: tl.constexpr, batch_steps, map_steps, to_steps, steps, SHAPE: tl.constexpr,
    NORMALIZE: tl.constexpr, SIGNED_SQRT: tl.constexpr, SCALE: tl.constexpr, EPS: tl.constexpr,
    SMALLEST: tl.constexpr, RESIZE: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
    PARTS: tl.constexpr, INDEX: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Gradient of a tile of features, and the share of its channels in the attention's."""
    maps: tl.constexpr = entry(SHAPE, 0)
    channels: tl.constexpr = entry(SHAPE, 1)
    pixels: tl.constexpr = entry(SHAPE, 2)
    b = tl.program_id(0).to(tl.int64)
    c = (tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)).to(INDEX)
    features += b * batch_steps[0]
    attention += b * batch_steps[1]
    grad += b * maps * channels
    argmax += b * maps * channels
    norm, projection = norm_and_projection(norms, parts, b, tiles, NORMALIZE, SMALLEST, PARTS, ACC)
    p = (tl.program_id(2) * PIXELS + tl.arange(0, PIXELS)).to(INDEX)
    total = tl.zeros([PIXELS, CHANNELS], ACC)
    f = feature_tile(features, p[:, None], c[None, :], steps, SHAPE, ACC)
    for map_index in range(0, maps):
        m = (map_index + tl.arange(0, 1)).to(INDEX)
        inside = (c < channels)[None, :]
        first = tl.load(argmax + m[:, None] * channels + c[None, :], mask=inside, other=0)
        # An index from outside is not followed.
        first = tl.minimum(tl.maximum(first, 0), pixels - 1).to(INDEX)
        pooled = attention_tile(
            attention, m[:, None], first, size, map_steps, steps, SHAPE, RESIZE, ACC, ACC
        ) * feature_tile(features, first, c[None, :], steps, SHAPE, ACC)
        w = gradient_of_pooled(
            grad, pooled, m, c, inside, norm, projection, SHAPE,
            NORMALIZE, SIGNED_SQRT, SCALE, EPS, ACC,
        )  # fmt: skip
        mine = tl.where(first == p[:, None], w, 0.0)
        if grad_features is not None:
            a = attention_tile(
                attention, m[None, :], p[:, None], size, map_steps, steps, SHAPE, RESIZE, ACC, ACC
            )
            total += tl.where(mine != 0, mine * a, 0.0)
        if shares is not None:
            part = tl.sum(tl.where(mine != 0, mine * f, 0.0), 1)
            to = shares + (b * tl.num_programs(1) + tl.program_id(1)) * maps * pixels
            tl.store(to + (map_index * pixels + p), part, mask=p < pixels)
    if grad_features is not None:
        to = grad_features + b * to_steps[0] + (p[:, None] * to_steps[2] + c[None, :] * to_steps[1])
        written = (p < pixels)[:, None] & (c < channels)[None, :]
        tl.store(to, total.to(grad_features.dtype.element_ty), mask=written)
