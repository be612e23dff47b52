"""Bilinear attention pooling: P = A F^T over the pixels, its signed square root and norm.

The norm couples all entries of an image, so the forward runs the product twice: the first launch
keeps only sums of squares by tiles, the second scales and writes. The features are read twice (the
second time partly from the L2 cache) and no wide matrix is stored; without the norm one launch
does.

Backward, where W is the gradient of P: partial sums along the unit vector; then a program per image
and tile of channels computes W again and from it dF = A^T W of its channels and its share of
dA = W F^T; then the shares are added in order and resized back. Three launches.

Products of half precision run on tensor cores, exact with float32 accumulation; where W, which is
float32, is a factor, it is split into three TF32 products. float32 follows torch's settings.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from magsd_kernels._layout import accumulation_dtype, empty_like_format
from magsd_kernels.triton._common import accumulation, block, pixel_steps, with_rows
from magsd_kernels.triton._guide import sample_at, step_of
from magsd_kernels.triton._resampling import first_output, most_outputs, share

_CHANNELS = 64  # of a tile
_PIXELS = 32
_MAPS = 64  # the most of a tile
_SMALLEST_NORM = 1e-12


@triton.jit
def _attention_tile(
    attention, m, p, maps, pixels, width, height, low_height, low_width,
    step_m, step_y, step_x, RESIZE: tl.constexpr, KIND: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Maps m (M, 1) at pixels p (1, P) of the features' size, 0 outside; of type KIND."""
    inside = (m < maps) & (p < pixels)
    y, x = p // width, p % width
    if not RESIZE:
        at = attention + m * step_m + y * step_y + x * step_x
        return tl.load(at, mask=inside, other=0.0).to(KIND)
    top, bottom, down = sample_at(y, low_height, step_of(low_height, height, True, ACC), True)
    left, right, across = sample_at(x, low_width, step_of(low_width, width, True, ACC), True)
    corner = attention + m * step_m
    a = tl.load(corner + top * step_y + left * step_x, mask=inside, other=0.0).to(ACC)
    b = tl.load(corner + top * step_y + right * step_x, mask=inside, other=0.0).to(ACC)
    c = tl.load(corner + bottom * step_y + left * step_x, mask=inside, other=0.0).to(ACC)
    d = tl.load(corner + bottom * step_y + right * step_x, mask=inside, other=0.0).to(ACC)
    upper = a * (1.0 - across) + b * across
    lower = c * (1.0 - across) + d * across
    return (upper * (1.0 - down) + lower * down).to(KIND)


@triton.jit
def _feature_tile(features, p, c, pixels, channels, step_c, step_p, KIND: tl.constexpr):
    """Features at pixels p and channels c, which broadcast against each other; 0 outside."""
    inside = (p < pixels) & (c < channels)
    at = features + p * step_p + c.to(tl.int64) * step_c
    return tl.load(at, mask=inside, other=0.0).to(KIND)


@triton.jit
def _average(
    features, attention, m, c, maps, channels, pixels, width, height, low_height, low_width,
    step_c, step_p, step_m, step_y, step_x,
    RESIZE: tl.constexpr, KIND: tl.constexpr, PRECISION: tl.constexpr,
    MAPS: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """(M, C) averages over the pixels of A F."""
    total = tl.zeros([MAPS, CHANNELS], ACC)
    for start in range(0, pixels, PIXELS):
        p = start + tl.arange(0, PIXELS)
        a = _attention_tile(
            attention, m[:, None], p[None, :], maps, pixels, width, height, low_height, low_width,
            step_m, step_y, step_x, RESIZE, KIND, ACC,
        )  # fmt: skip
        f = _feature_tile(features, p[:, None], c[None, :], pixels, channels, step_c, step_p, KIND)
        total = tl.dot(a, f, total, input_precision=PRECISION, out_dtype=ACC)
    return total / tl.cast(pixels, ACC)


@triton.jit
def _maximum(
    features, attention, m, c, maps, channels, pixels, width, height, low_height, low_width,
    step_c, step_p, step_m, step_y, step_x,
    RESIZE: tl.constexpr, MAPS: tl.constexpr, CHANNELS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """(M, C) maxima over the pixels of A F, and the first pixel of each. NaN is the largest."""
    best = tl.full([MAPS, CHANNELS], -float("inf"), ACC)
    first = tl.zeros([MAPS, CHANNELS], tl.int32)
    for pixel in range(0, pixels):
        p = pixel + tl.arange(0, 1)
        a = _attention_tile(
            attention, m[:, None], p[None, :], maps, pixels, width, height, low_height, low_width,
            step_m, step_y, step_x, RESIZE, ACC, ACC,
        )  # fmt: skip
        f = _feature_tile(features, p[:, None], c[None, :], pixels, channels, step_c, step_p, ACC)
        value = a * f
        larger = ((value > best) | (value != value)) & (best == best)
        best = tl.where(larger, value, best)
        first = tl.where(larger, pixel, first)
    return best, first


@triton.jit
def _pooled(
    features, attention, m, c, maps, channels, pixels, width, height, low_height, low_width,
    step_c, step_p, step_m, step_y, step_x,
    MAXIMUM: tl.constexpr, RESIZE: tl.constexpr, KIND: tl.constexpr, PRECISION: tl.constexpr,
    MAPS: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """P (M, C) and, for the maximum, the first maximal pixels."""
    if MAXIMUM:
        return _maximum(
            features, attention, m, c, maps, channels, pixels, width, height, low_height,
            low_width, step_c, step_p, step_m, step_y, step_x, RESIZE, MAPS, CHANNELS, ACC,
        )  # fmt: skip
    average = _average(
        features, attention, m, c, maps, channels, pixels, width, height, low_height, low_width,
        step_c, step_p, step_m, step_y, step_x,
        RESIZE, KIND, PRECISION, MAPS, CHANNELS, PIXELS, ACC,
    )  # fmt: skip
    return average, tl.zeros([MAPS, CHANNELS], tl.int32)


@triton.jit
def _root(pooled, SIGNED_SQRT: tl.constexpr, EPS: tl.constexpr, ACC: tl.constexpr):
    """sign(P) sqrt(|P| + eps), or P."""
    if not SIGNED_SQRT:
        return pooled
    root = tl.sqrt(tl.abs(pooled) + tl.full([], EPS, ACC))
    return tl.where(pooled == 0, 0.0, tl.where(pooled < 0, -root, root))


@triton.jit
def _sum_of_parts(parts, count, PARTS: tl.constexpr):
    i = tl.arange(0, PARTS)
    return tl.sum(tl.load(parts + i, mask=i < count, other=0.0), 0)


@triton.jit
def _forward_kernel(
    features, attention, output, norm, argmax, parts,
    maps, channels, pixels, width, height, low_height, low_width,
    feature_b, step_c, step_p, attention_b, step_m, step_y, step_x,
    STAGE: tl.constexpr, MAXIMUM: tl.constexpr, SIGNED_SQRT: tl.constexpr,
    SCALE: tl.constexpr, EPS: tl.constexpr, SMALLEST: tl.constexpr,
    RESIZE: tl.constexpr, KIND: tl.constexpr, PRECISION: tl.constexpr,
    MAPS: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr, PARTS: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """STAGE "norm" writes a tile's sum of squares to `parts`; "write" and "plain" the output."""
    b = tl.program_id(0).to(tl.int64)
    m = tl.program_id(2) * MAPS + tl.arange(0, MAPS)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    pooled, first = _pooled(
        features + b * feature_b, attention + b * attention_b, m, c, maps, channels, pixels,
        width, height, low_height, low_width, step_c, step_p, step_m, step_y, step_x,
        MAXIMUM, RESIZE, KIND, PRECISION, MAPS, CHANNELS, PIXELS, ACC,
    )  # fmt: skip
    inside = (m < maps)[:, None] & (c < channels)[None, :]
    root = tl.where(inside, _root(pooled, SIGNED_SQRT, EPS, ACC), 0.0)
    tiles = tl.num_programs(1) * tl.num_programs(2)
    if STAGE == "norm":
        tile = tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)
        tl.store(parts + b * tiles + tile, tl.sum(tl.sum(root * root, 1), 0))
    else:
        factor = tl.full([], SCALE, ACC)
        if STAGE == "write":
            length = tl.sqrt(_sum_of_parts(parts + b * tiles, tiles, PARTS))
            if (tl.program_id(1) == 0) & (tl.program_id(2) == 0):
                tl.store(norm + b, length)
            smallest = tl.full([], SMALLEST, ACC)
            factor = factor / tl.where(length < smallest, smallest, length)
        at = (b * maps + m[:, None]) * channels + c[None, :]
        tl.store(output + at, (root * factor).to(output.dtype.element_ty), mask=inside)
        if MAXIMUM:
            tl.store(argmax + at, first, mask=inside)


@triton.jit
def _weights(
    grad, root, pooled, norm, parts, b, m, c, maps, channels, tiles, inside,
    NORMALIZE: tl.constexpr, SIGNED_SQRT: tl.constexpr, SCALE: tl.constexpr, EPS: tl.constexpr,
    SMALLEST: tl.constexpr, PARTS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """W, the gradient of P."""
    at = (b * maps + m[:, None]) * channels + c[None, :]
    wide = tl.load(grad + at, mask=inside, other=0.0).to(ACC) * tl.full([], SCALE, ACC)
    if NORMALIZE:
        length = tl.load(norm + b)
        smallest = tl.full([], SMALLEST, ACC)
        along = _sum_of_parts(parts + b * tiles, tiles, PARTS)
        # Under the smallest norm the divisor is constant, and no gradient flows through it.
        along = tl.where(length < smallest, 0.0, along)
        length = tl.where(length < smallest, smallest, length)
        wide = (wide - root / length * along) / length
    if SIGNED_SQRT:
        slope = 2.0 * tl.sqrt(tl.abs(pooled) + tl.full([], EPS, ACC))
        wide = tl.where(pooled == 0, 0.0, wide / slope)
    return tl.where(inside, wide, 0.0)


@triton.jit
def _along_kernel(
    features, attention, grad, norm, parts,
    maps, channels, pixels, width, height, low_height, low_width,
    feature_b, step_c, step_p, attention_b, step_m, step_y, step_x,
    MAXIMUM: tl.constexpr, SIGNED_SQRT: tl.constexpr, SCALE: tl.constexpr, EPS: tl.constexpr,
    SMALLEST: tl.constexpr, RESIZE: tl.constexpr, KIND: tl.constexpr, PRECISION: tl.constexpr,
    MAPS: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A tile's share of the sum of (scale grad) * (P / ||P||)."""
    b = tl.program_id(0).to(tl.int64)
    m = tl.program_id(2) * MAPS + tl.arange(0, MAPS)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    pooled, _ = _pooled(
        features + b * feature_b, attention + b * attention_b, m, c, maps, channels, pixels,
        width, height, low_height, low_width, step_c, step_p, step_m, step_y, step_x,
        MAXIMUM, RESIZE, KIND, PRECISION, MAPS, CHANNELS, PIXELS, ACC,
    )  # fmt: skip
    inside = (m < maps)[:, None] & (c < channels)[None, :]
    root = tl.where(inside, _root(pooled, SIGNED_SQRT, EPS, ACC), 0.0)
    at = (b * maps + m[:, None]) * channels + c[None, :]
    wide = tl.load(grad + at, mask=inside, other=0.0).to(ACC) * tl.full([], SCALE, ACC)
    length = tl.load(norm + b)
    smallest = tl.full([], SMALLEST, ACC)
    unit = root / tl.where(length < smallest, smallest, length)
    tile = tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)
    tiles = tl.num_programs(1) * tl.num_programs(2)
    tl.store(parts + b * tiles + tile, tl.sum(tl.sum(wide * unit, 1), 0))


@triton.jit
def _average_backward_kernel(
    features, attention, grad, norm, parts, grad_features, shares,
    maps, channels, pixels, width, height, low_height, low_width,
    feature_b, step_c, step_p, attention_b, step_m, step_y, step_x, to_b, to_c, to_p, tiles,
    NORMALIZE: tl.constexpr, SIGNED_SQRT: tl.constexpr, SCALE: tl.constexpr, EPS: tl.constexpr,
    SMALLEST: tl.constexpr, RESIZE: tl.constexpr, KIND: tl.constexpr, PRECISION: tl.constexpr,
    WIDE_PRECISION: tl.constexpr, ONE_TILE: tl.constexpr, MAPS: tl.constexpr,
    CHANNELS: tl.constexpr, PIXELS: tl.constexpr, PARTS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Gradient of the features of a tile of channels, and its share of the attention's."""
    b = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    features += b * feature_b
    attention += b * attention_b
    count = tl.cast(pixels, ACC)
    for m_start in range(0, maps, MAPS):
        m = m_start + tl.arange(0, MAPS)
        inside = (m < maps)[:, None] & (c < channels)[None, :]
        pooled = _average(
            features, attention, m, c, maps, channels, pixels, width, height, low_height,
            low_width, step_c, step_p, step_m, step_y, step_x,
            RESIZE, KIND, PRECISION, MAPS, CHANNELS, PIXELS, ACC,
        )  # fmt: skip
        w = _weights(
            grad, _root(pooled, SIGNED_SQRT, EPS, ACC), pooled, norm, parts, b, m, c, maps,
            channels, tiles, inside, NORMALIZE, SIGNED_SQRT, SCALE, EPS, SMALLEST, PARTS, ACC,
        ) / count  # fmt: skip
        for start in range(0, pixels, PIXELS):
            p = start + tl.arange(0, PIXELS)
            if grad_features is not None:
                a = _attention_tile(
                    attention, m[None, :], p[:, None], maps, pixels, width, height, low_height,
                    low_width, step_m, step_y, step_x, RESIZE, ACC, ACC,
                )  # fmt: skip
                part = tl.dot(a, w, input_precision=WIDE_PRECISION, out_dtype=ACC)
                to = grad_features + b * to_b + p[:, None] * to_p + c[None, :].to(tl.int64) * to_c
                written = (p < pixels)[:, None] & (c < channels)[None, :]
                if not ONE_TILE:
                    # More maps than a tile holds: the sum grows in float32 scratch.
                    part += tl.load(to, mask=written & (m_start > 0), other=0.0).to(ACC)
                tl.store(to, part.to(grad_features.dtype.element_ty), mask=written)
            if shares is not None:
                f = _feature_tile(
                    features, p[None, :], c[:, None], pixels, channels, step_c, step_p, ACC
                )
                part = tl.dot(w, f, input_precision=WIDE_PRECISION, out_dtype=ACC)
                tile = b * tl.num_programs(1) + tl.program_id(1)
                to = shares + (tile * maps + m[:, None]) * pixels + p[None, :]
                tl.store(to, part, mask=(m < maps)[:, None] & (p < pixels)[None, :])
        if not ONE_TILE:
            tl.debug_barrier()  # What other threads of the program have stored is read next.


@triton.jit
def _maximum_backward_kernel(
    features, attention, grad, norm, parts, argmax, grad_features, shares,
    maps, channels, pixels, width, height, low_height, low_width,
    feature_b, step_c, step_p, attention_b, step_m, step_y, step_x, to_b, to_c, to_p, tiles,
    NORMALIZE: tl.constexpr, SIGNED_SQRT: tl.constexpr, SCALE: tl.constexpr, EPS: tl.constexpr,
    SMALLEST: tl.constexpr, RESIZE: tl.constexpr,
    CHANNELS: tl.constexpr, PIXELS: tl.constexpr, PARTS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The same for the maximum: each entry's gradient belongs to its first maximal pixel."""
    b = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    features += b * feature_b
    attention += b * attention_b
    for start in range(0, pixels, PIXELS):
        p = start + tl.arange(0, PIXELS)
        total = tl.zeros([PIXELS, CHANNELS], ACC)
        f = _feature_tile(features, p[:, None], c[None, :], pixels, channels, step_c, step_p, ACC)
        for map_index in range(0, maps):
            m = map_index + tl.arange(0, 1)
            inside = (m < maps)[:, None] & (c < channels)[None, :]
            at = (b * maps + m[:, None]) * channels + c[None, :]
            first = tl.load(argmax + at, mask=inside, other=0)
            # An index from outside is not followed.
            first = tl.minimum(tl.maximum(first, 0), pixels - 1)
            pooled = _attention_tile(
                attention, m[:, None], first, maps, pixels, width, height, low_height, low_width,
                step_m, step_y, step_x, RESIZE, ACC, ACC,
            ) * _feature_tile(
                features, first, c[None, :], pixels, channels, step_c, step_p, ACC
            )  # fmt: skip
            w = _weights(
                grad, _root(pooled, SIGNED_SQRT, EPS, ACC), pooled, norm, parts, b, m, c, maps,
                channels, tiles, inside, NORMALIZE, SIGNED_SQRT, SCALE, EPS, SMALLEST, PARTS, ACC,
            )  # fmt: skip
            mine = tl.where(first == p[:, None], w, 0.0)
            if grad_features is not None:
                a = _attention_tile(
                    attention, m[None, :], p[:, None], maps, pixels, width, height, low_height,
                    low_width, step_m, step_y, step_x, RESIZE, ACC, ACC,
                )  # fmt: skip
                total += tl.where(mine != 0, mine * a, 0.0)
            if shares is not None:
                part = tl.sum(tl.where(mine != 0, mine * f, 0.0), 1)
                tile = b * tl.num_programs(1) + tl.program_id(1)
                to = shares + (tile * maps + map_index) * pixels + p
                tl.store(to, part, mask=p < pixels)
        if grad_features is not None:
            to = grad_features + b * to_b + p[:, None] * to_p + c[None, :].to(tl.int64) * to_c
            written = (p < pixels)[:, None] & (c < channels)[None, :]
            tl.store(to, total.to(grad_features.dtype.element_ty), mask=written)


@triton.jit
def _attention_gradient_kernel(
    shares, grad_attention, maps, tiles, height, width, low_height, low_width,
    to_b, to_m, to_y, to_x, OUTPUTS_Y: tl.constexpr, OUTPUTS_X: tl.constexpr,
    RESIZE: tl.constexpr, PIXELS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Adds up the shares of the tiles in their order, resized back."""
    b = tl.program_id(0).to(tl.int64)
    m = tl.program_id(1)
    q = tl.program_id(2) * PIXELS + tl.arange(0, PIXELS)
    inside = q < low_height * low_width
    y, x = q // low_width, q % low_width
    total = tl.zeros([PIXELS], ACC)
    first_y, first_x = y, x
    if RESIZE:
        first_y = first_output(y, low_height, height, "bilinear", True)
        first_x = first_output(x, low_width, width, "bilinear", True)
    for k in range(OUTPUTS_Y * OUTPUTS_X):
        o_y = first_y + k // OUTPUTS_X
        o_x = first_x + k % OUTPUTS_X
        read = inside & (o_y < height) & (o_x < width)
        part = tl.full([PIXELS], 1.0, ACC)
        if RESIZE:
            part = share(o_y, y, low_height, height, "bilinear", True, ACC)
            part *= share(o_x, x, low_width, width, "bilinear", True, ACC)
            read = read & (part != 0)
        for tile in range(0, tiles):
            at = ((b * tiles + tile) * maps + m) * height * width + o_y * width + o_x
            total += part * tl.load(shares + at, mask=read, other=0.0)
    to = grad_attention + b * to_b + m * to_m + y * to_y + x * to_x
    tl.store(to, total.to(grad_attention.dtype.element_ty), mask=inside)


class _Call:
    """Sizes, steps and settings that the kernels of one call share."""

    def __init__(
        self,
        features: torch.Tensor,
        attention: torch.Tensor,
        pool: str,
        signed_sqrt: bool,
        scale: float,
        eps: float,
        allow_tf32: bool,
    ) -> None:
        _, channels, height, width = features.shape
        self.features = with_rows(features)
        self.attention = attention
        self.maps = attention.shape[1]
        self.channels = channels
        self.maximum = pool == "max"
        resize = attention.shape[2:] != features.shape[2:]
        half = features.dtype in (torch.float16, torch.bfloat16)
        exact = "ieee" if torch.version.hip else "tf32x3"
        self.map_tile = block(max(self.maps, 16), _MAPS)
        self.tiles = (triton.cdiv(channels, _CHANNELS), triton.cdiv(self.maps, self.map_tile))
        self.sizes = (
            self.maps, channels, height * width, width, height, *attention.shape[2:],
            *pixel_steps(self.features), *attention.stride(),
        )  # fmt: skip
        acc = accumulation(features.dtype)
        self.kernel = {
            "SIGNED_SQRT": signed_sqrt, "SCALE": scale, "EPS": eps, "SMALLEST": _SMALLEST_NORM,
            "RESIZE": resize, "CHANNELS": _CHANNELS, "PIXELS": _PIXELS, "ACC": acc,
        }  # fmt: skip
        # Resized maps are float32, which tensor cores take in three TF32 products.
        kinds = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
        kind = acc if resize or not half else kinds[features.dtype]
        if triton.knobs.runtime.interpret and kind == tl.bfloat16:
            kind = acc  # The interpreter's dot reads the bits of bfloat16 as integers.
        precision = "tf32" if allow_tf32 else (exact if half else "ieee")
        self.product = {"KIND": kind, "PRECISION": precision, "MAPS": self.map_tile}
        self.wide_precision = "tf32" if allow_tf32 else (exact if half else "ieee")

    @property
    def parts(self) -> int:
        return self.tiles[0] * self.tiles[1]


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
    """Pooled matrix (B, M*C); its norm before normalisation (B,) or empty; argmax or empty.

    The argmax (B, M, C) int32 names the first maximal pixel and exists for pool "max" only.
    """
    call = _Call(features, attention, pool, signed_sqrt, scale, eps, allow_tf32)
    batch, dtype = features.shape[0], accumulation_dtype(features.dtype)
    output = features.new_empty((batch, call.maps * call.channels))
    norm = features.new_empty((batch if normalize else 0,), dtype=dtype)
    shape = (batch, call.maps, call.channels) if call.maximum else (0,)
    argmax = features.new_empty(shape, dtype=torch.int32)
    if batch == 0:
        return output, norm, argmax
    parts = features.new_empty((batch, call.parts) if normalize else (0,), dtype=dtype)
    for stage in ("norm", "write") if normalize else ("plain",):
        _forward_kernel[(batch, *call.tiles)](
            call.features, attention, output, norm, argmax, parts, *call.sizes,
            STAGE=stage, MAXIMUM=call.maximum, PARTS=triton.next_power_of_2(call.parts),
            **call.product, **call.kernel,
        )  # fmt: skip
    return output, norm, argmax


def bilinear_attention_pool_backward(
    grad: torch.Tensor,
    features: torch.Tensor,
    attention: torch.Tensor,
    output: torch.Tensor,
    norm: torch.Tensor,
    argmax: torch.Tensor,
    pool: str,
    signed_sqrt: bool,
    normalize: bool,
    scale: float,
    eps: float,
    allow_tf32: bool,
    needs: list[bool],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of features and attention; an empty tensor for one that is not needed."""
    call = _Call(features, attention, pool, signed_sqrt, scale, eps, allow_tf32)
    batch, dtype = features.shape[0], accumulation_dtype(features.dtype)
    grad_features = empty_like_format(features) if needs[0] else features.new_empty(0)
    grad_attention = empty_like_format(attention) if needs[1] else attention.new_empty(0)
    if batch == 0 or not any(needs):
        return grad_features, grad_attention
    grad = grad.contiguous()
    parts = features.new_empty((batch, call.parts) if normalize else (0,), dtype=dtype)
    if normalize:
        _along_kernel[(batch, *call.tiles)](
            call.features, attention, grad, norm, parts, *call.sizes,
            MAXIMUM=call.maximum, **call.product, **call.kernel,
        )  # fmt: skip
    pixels = features.shape[2] * features.shape[3]
    count = call.tiles[0]
    shares = features.new_empty((batch, count, call.maps, pixels), dtype=dtype)
    one_tile = call.tiles[1] == 1
    # With more maps than one tile holds, the gradient of the features grows in the wide dtype.
    to = grad_features if one_tile or call.maximum or not needs[0] else grad_features.to(dtype)
    common = {"NORMALIZE": normalize, "PARTS": triton.next_power_of_2(call.parts)}
    targets = (to if needs[0] else None, shares if needs[1] else None)
    steps = (*(pixel_steps(to) if needs[0] else (0, 0, 0)), call.parts)
    if call.maximum:
        _maximum_backward_kernel[(batch, count)](
            call.features, attention, grad, norm, parts, argmax.contiguous(), *targets,
            *call.sizes, *steps, **common, **call.kernel,
        )  # fmt: skip
    else:
        _average_backward_kernel[(batch, count)](
            call.features, attention, grad, norm, parts, *targets, *call.sizes, *steps,
            WIDE_PRECISION=call.wide_precision, ONE_TILE=one_tile,
            **common, **call.product, **call.kernel,
        )  # fmt: skip
    if to is not grad_features:
        grad_features.copy_(to)
    if needs[1]:
        _attention_gradient(shares, grad_attention, features, call)
    return grad_features, grad_attention


def _attention_gradient(
    shares: torch.Tensor, grad_attention: torch.Tensor, features: torch.Tensor, call: _Call
) -> None:
    batch, maps, low_height, low_width = grad_attention.shape
    height, width = features.shape[2:]
    resize = (low_height, low_width) != (height, width)
    pixels = block(low_height * low_width, 256)
    outputs = [
        most_outputs(low, size, "bilinear", True) if resize else 1
        for low, size in ((low_height, height), (low_width, width))
    ]
    _attention_gradient_kernel[(batch, maps, triton.cdiv(low_height * low_width, pixels))](
        shares, grad_attention, maps, shares.shape[1], height, width, low_height, low_width,
        *grad_attention.stride(), OUTPUTS_Y=outputs[0], OUTPUTS_X=outputs[1], RESIZE=resize,
        PIXELS=pixels, ACC=accumulation(features.dtype),
    )  # fmt: skip
