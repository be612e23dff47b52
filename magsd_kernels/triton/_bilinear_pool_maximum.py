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
    length_and_along,
    weights_of,
)


@triton.jit
def maximum_backward_kernel(
    features, attention, grad, norm, parts, argmax, grad_features, shares,
    maps: tl.constexpr, channels: tl.constexpr, pixels: tl.constexpr, width: tl.constexpr,
    height: tl.constexpr, low_height: tl.constexpr, low_width: tl.constexpr,
    feature_b, step_c, step_p, attention_b, step_m, step_y, step_x, to_b, to_c, to_p, tiles,
    NORMALIZE: tl.constexpr, SIGNED_SQRT: tl.constexpr, SCALE: tl.constexpr, EPS: tl.constexpr,
    SMALLEST: tl.constexpr, RESIZE: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
    PARTS: tl.constexpr, INDEX: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Gradient of a tile of features, and the share of its channels in the attention's."""
    b = tl.program_id(0).to(tl.int64)
    c = (tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)).to(INDEX)
    features += b * feature_b
    attention += b * attention_b
    grad += b * maps * channels
    argmax += b * maps * channels
    length, along = length_and_along(norm, parts, b, tiles, NORMALIZE, SMALLEST, PARTS, ACC)
    p = (tl.program_id(2) * PIXELS + tl.arange(0, PIXELS)).to(INDEX)
    total = tl.zeros([PIXELS, CHANNELS], ACC)
    f = feature_tile(features, p[:, None], c[None, :], pixels, channels, step_c, step_p, ACC)
    for map_index in range(0, maps):
        m = (map_index + tl.arange(0, 1)).to(INDEX)
        inside = (c < channels)[None, :]
        first = tl.load(argmax + m[:, None] * channels + c[None, :], mask=inside, other=0)
        # An index from outside is not followed.
        first = tl.minimum(tl.maximum(first, 0), pixels - 1).to(INDEX)
        pooled = attention_tile(
            attention, m[:, None], first, maps, pixels, width, height, low_height, low_width,
            step_m, step_y, step_x, RESIZE, ACC, ACC,
        ) * feature_tile(
            features, first, c[None, :], pixels, channels, step_c, step_p, ACC
        )  # fmt: skip
        w = weights_of(
            grad, pooled, m, c, channels, inside, length, along,
            NORMALIZE, SIGNED_SQRT, SCALE, EPS, ACC,
        )  # fmt: skip
        mine = tl.where(first == p[:, None], w, 0.0)
        if grad_features is not None:
            a = attention_tile(
                attention, m[None, :], p[:, None], maps, pixels, width, height, low_height,
                low_width, step_m, step_y, step_x, RESIZE, ACC, ACC,
            )  # fmt: skip
            total += tl.where(mine != 0, mine * a, 0.0)
        if shares is not None:
            part = tl.sum(tl.where(mine != 0, mine * f, 0.0), 1)
            to = shares + (b * tl.num_programs(1) + tl.program_id(1)) * maps * pixels
            tl.store(to + (map_index * pixels + p), part, mask=p < pixels)
    if grad_features is not None:
        to = grad_features + b * to_b + (p[:, None] * to_p + c[None, :] * to_c)
        written = (p < pixels)[:, None] & (c < channels)[None, :]
        tl.store(to, total.to(grad_features.dtype.element_ty), mask=written)
