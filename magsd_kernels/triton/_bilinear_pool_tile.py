"""Tiles of the bilinear attention pooling: P = A F^T of some maps and channels, and its root.

Products of half precision run on tensor cores, exact with float32 accumulation. Resized maps are
float32 and take three TF32 products. float32 follows torch's settings: TF32, or else plain
multiplications and additions.

SHAPE are maps, channels and pixels, known at compile time. `steps` are those of the features from
channel to channel and pixel to pixel, and of the attention from map to map; most kernels know them
too. `size` are height and width of the features and of the attention, `map_steps` the attention's
from row to row and pixel to pixel.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from magsd_kernels.triton._common import (
    accumulation,
    block,
    offset_type,
    pixel_steps,
    tile,
    with_rows,
)
from magsd_kernels.triton._resampling import bilinear_inputs, bilinear_scale, entry

_SMALLEST_NORM = 1e-12
_MOST_MAPS = 64  # of a tile


@triton.jit
def attention_tile(
    attention, m, p, size, map_steps, steps, SHAPE: tl.constexpr,
    RESIZE: tl.constexpr, KIND: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Maps m at pixels p of the features' size, which broadcast; 0 outside; of type KIND."""
    inside = (m < entry(SHAPE, 0)) & (p < entry(SHAPE, 2))
    corner = attention + m * steps[2]
    step_y, step_x = map_steps
    if RESIZE:
        height, width, low_height, low_width = size
        y, x = p // width, p % width
        scale_y = bilinear_scale(low_height, height, True, ACC)
        scale_x = bilinear_scale(low_width, width, True, ACC)
        top, bottom, down = bilinear_inputs(y, low_height, scale_y, True)
        left, right, across = bilinear_inputs(x, low_width, scale_x, True)
        a = tl.load(corner + (top * step_y + left * step_x), mask=inside, other=0.0).to(ACC)
        b = tl.load(corner + (top * step_y + right * step_x), mask=inside, other=0.0).to(ACC)
        c = tl.load(corner + (bottom * step_y + left * step_x), mask=inside, other=0.0).to(ACC)
        d = tl.load(corner + (bottom * step_y + right * step_x), mask=inside, other=0.0).to(ACC)
        upper = a * (1.0 - across) + b * across
        lower = c * (1.0 - across) + d * across
        value = upper * (1.0 - down) + lower * down
    else:
        value = tl.load(corner + p * step_x, mask=inside, other=0.0)
    return value.to(KIND)


@triton.jit
def feature_tile(features, p, c, steps, SHAPE: tl.constexpr, KIND: tl.constexpr):
    """Features at pixels p and channels c, which broadcast; 0 outside."""
    inside = (p < entry(SHAPE, 2)) & (c < entry(SHAPE, 1))
    at = p * steps[1] + c * steps[0]
    return tl.load(features + at, mask=inside, other=0.0).to(KIND)


@triton.jit
def average(
    features, attention, m, c, size, map_steps, steps, SHAPE: tl.constexpr,
    RESIZE: tl.constexpr, KIND: tl.constexpr, PRECISION: tl.constexpr,
    MAPS: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr, INDEX: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """(M, C) averages over the pixels of A F."""
    pixels: tl.constexpr = entry(SHAPE, 2)
    total = tl.zeros([MAPS, CHANNELS], ACC)
    for start in range(0, pixels, PIXELS):
        p = (start + tl.arange(0, PIXELS)).to(INDEX)
        a = attention_tile(
            attention, m[:, None], p[None, :], size, map_steps, steps, SHAPE, RESIZE, KIND, ACC
        )  # fmt: skip
        f = feature_tile(features, p[:, None], c[None, :], steps, SHAPE, KIND)
        total = tl.dot(a, f, total, input_precision=PRECISION, out_dtype=ACC)
    return total / tl.cast(pixels, ACC)


@triton.jit
def maximum(
    features, attention, m, c, size, map_steps, steps, SHAPE: tl.constexpr,
    RESIZE: tl.constexpr, MAPS: tl.constexpr, CHANNELS: tl.constexpr, INDEX: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """(M, C) maxima over the pixels of A F, and the first pixel of each. NaN is the largest."""
    best = tl.full([MAPS, CHANNELS], -float("inf"), ACC)
    first = tl.zeros([MAPS, CHANNELS], tl.int32)
    for pixel in range(0, entry(SHAPE, 2)):
        p = (pixel + tl.arange(0, 1)).to(INDEX)
        a = attention_tile(
            attention, m[:, None], p[None, :], size, map_steps, steps, SHAPE, RESIZE, ACC, ACC
        )  # fmt: skip
        f = feature_tile(features, p[:, None], c[None, :], steps, SHAPE, ACC)
        value = a * f
        larger = ((value > best) | (value != value)) & (best == best)
        best = tl.where(larger, value, best)
        first = tl.where(larger, pixel, first)
    return best, first


@triton.jit
def pooled_tile(
    features, attention, m, c, size, map_steps, steps, SHAPE: tl.constexpr,
    MAXIMUM: tl.constexpr, RESIZE: tl.constexpr, KIND: tl.constexpr, PRECISION: tl.constexpr,
    MAPS: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr, INDEX: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """P (M, C) and, for the maximum, the first maximal pixels."""
    if MAXIMUM:
        pooled, first = maximum(
            features, attention, m, c, size, map_steps, steps, SHAPE, RESIZE, MAPS, CHANNELS,
            INDEX, ACC,
        )  # fmt: skip
    else:
        pooled = average(
            features, attention, m, c, size, map_steps, steps, SHAPE,
            RESIZE, KIND, PRECISION, MAPS, CHANNELS, PIXELS, INDEX, ACC,
        )  # fmt: skip
        first = tl.zeros([MAPS, CHANNELS], tl.int32)
    return pooled, first


@triton.jit
def root_of(pooled, SIGNED_SQRT: tl.constexpr, EPS: tl.constexpr, ACC: tl.constexpr):
    """sign(P) sqrt(|P| + eps), or P."""
    if SIGNED_SQRT:
        root = tl.sqrt(tl.abs(pooled) + tl.full([], EPS, ACC))
        root = tl.where(pooled == 0, 0.0, tl.where(pooled < 0, -root, root))
    else:
        root = pooled
    return root


@triton.jit
def sum_of_parts(parts, count, PARTS: tl.constexpr):
    """The sum of `count` numbers, at most PARTS."""
    i = tl.arange(0, PARTS)
    return tl.sum(tl.load(parts + i, mask=i < count, other=0.0), 0)


@triton.jit
def norm_and_projection(
    norms, parts, b, tiles,
    NORMALIZE: tl.constexpr, SMALLEST: tl.constexpr, PARTS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """An image's divisor, and the gradient along its unit vector; 1 and 0 without a norm."""
    norm = tl.full([], 1.0, ACC)
    projection = tl.full([], 0.0, ACC)
    if NORMALIZE:
        norm = tl.load(norms + b)
        smallest = tl.full([], SMALLEST, ACC)
        projection = sum_of_parts(parts + b * tiles, tiles, PARTS)
        # Under the smallest norm the divisor is constant, and no gradient flows through it.
        projection = tl.where(norm < smallest, 0.0, projection)
        norm = tl.where(norm < smallest, smallest, norm)
    return norm, projection


@triton.jit
def gradient_of_pooled(
    grad, pooled, m, c, inside, norm, projection, SHAPE: tl.constexpr,
    NORMALIZE: tl.constexpr, SIGNED_SQRT: tl.constexpr, SCALE: tl.constexpr, EPS: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """W (M, C), the gradient of P, of one image."""
    at = m[:, None] * entry(SHAPE, 1) + c[None, :]
    upcast = tl.load(grad + at, mask=inside, other=0.0).to(ACC) * tl.full([], SCALE, ACC)
    root = root_of(pooled, SIGNED_SQRT, EPS, ACC)
    if NORMALIZE:
        upcast = (upcast - root / norm * projection) / norm
    if SIGNED_SQRT:
        upcast = tl.where(pooled == 0, 0.0, upcast / (2.0 * tl.abs(root)))
    return tl.where(inside, upcast, 0.0)


class Call:
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
        self.maps, self.channels, self.pixels = attention.shape[1], channels, height * width
        self.maximum = pool == "max"
        resize = attention.shape[2:] != features.shape[2:]
        self.attention = attention if resize else with_rows(attention)
        half = features.dtype in (torch.float16, torch.bfloat16)
        self.double = features.dtype == torch.float64  # It takes twice the registers.
        interpreted = triton.knobs.runtime.interpret
        allow_tf32 = allow_tf32 and not interpreted  # The interpreter has no TF32.
        #: Whether products run on tensor cores.
        self.matrix = half or allow_tf32
        #: Whether a float32 factor is split into two of bfloat16, the type of the other factor.
        self.split = features.dtype == torch.bfloat16 and not resize
        acc = accumulation(features.dtype)
        kinds = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
        kind = acc if resize or not half else kinds[features.dtype]
        if interpreted and kind == tl.bfloat16:
            kind = acc  # The interpreter's dot reads the bits of bfloat16 as integers.
        exact = "ieee" if torch.version.hip else "tf32x3"
        self.precision = "tf32" if allow_tf32 else (exact if half else "ieee")
        self.map_tile = block(max(self.maps, 16), _MOST_MAPS)
        self.map_tiles = triton.cdiv(self.maps, self.map_tile)
        feature_b, feature_c, feature_p = pixel_steps(self.features)
        attention_b, map_m, map_y, map_x = self.attention.stride()
        #: Sizes and steps by their names in a kernel.
        self.sizes = {
            "size": (height, width, *attention.shape[2:]),
            "batch_steps": (feature_b, attention_b),
            "map_steps": (map_y, map_x if resize else pixel_steps(self.attention)[2]),
            "steps": (feature_c, feature_p, map_m), "SHAPE": (self.maps, channels, self.pixels),
        }  # fmt: skip
        self.settings = {
            "SIGNED_SQRT": signed_sqrt, "SCALE": scale, "EPS": eps, "SMALLEST": _SMALLEST_NORM,
            "RESIZE": resize, "KIND": kind, "PRECISION": self.precision, "MAPS": self.map_tile,
            "INDEX": offset_type(self.features, self.attention, first=1), "ACC": acc,
        }  # fmt: skip

    def product_tile(self) -> dict[str, int]:
        """Channels and pixels of a tile of A F^T.

        Tensor cores take many pixels at once; without them a thread keeps its factors in registers.
        """
        channels = 32 if self.maximum and self.double else 64
        return {"CHANNELS": tile(channels), "PIXELS": tile(64 if self.matrix else 16)}

    def whole_image(self) -> bool:
        """Whether a tile of the backward holds all maps and pixels of an image."""
        most = 256 if self.split else 64
        return self.matrix and not self.maximum and self.map_tiles == 1 and self.pixels <= most

    def backward_tile(self) -> dict[str, int]:
        """Channels and pixels of a tile of the backward."""
        if self.whole_image():
            pixels = block(max(self.pixels, 16), 256)
            few = pixels <= 64 and not torch.version.hip  # AMD's scalar registers do not suffice.
            return {"CHANNELS": 64 if few else 32, "PIXELS": pixels}
        if self.maximum:  # Every tile of pixels reads all entries of P.
            return {"CHANNELS": tile(32), "PIXELS": 32 if self.double else 64}
        pixels = tile(32 if self.matrix else 16)
        return {"CHANNELS": tile(64 if self.matrix else 32), "PIXELS": pixels}

    def tiles(self, channels: int) -> tuple[int, int]:
        """Tiles of channels and of maps that hold P."""
        return triton.cdiv(self.channels, channels), self.map_tiles
