"""Bilinear attention pooling, backward. With W the gradient of P: dF = A^T W, dA = W F^T.

Must read the features and the gradient and write dF. Three launches:

- sums along the unit vector P / ||P||, by tiles, for which P is made again;
- W and from it dF and a share of dA. Where tensor cores take all maps and pixels of an image in one
  tile, a program walks over channels, reads them once and keeps its share of dA in registers. Else
  a program owns a tile of channels and walks over the pixels twice;
- the shares, added in a fixed order and resized back.

W is float32. Where it meets bfloat16 it is split into two bfloat16 numbers that hold 16 of its 24
bits, more than the result keeps; else products of half precision take three TF32 products.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from magsd_kernels._layout import accumulation_dtype, empty_like_format
from magsd_kernels.triton._bilinear_pool_maximum import maximum_backward_kernel
from magsd_kernels.triton._bilinear_pool_tile import (
    Call,
    attention_tile,
    average,
    feature_tile,
    gradient_of_pooled,
    norm_and_projection,
    pooled_tile,
    root_of,
)
from magsd_kernels.triton._common import (
    accumulation,
    block,
    pixel_steps,
    tile,
    tunable,
    with_warps,
)
from magsd_kernels.triton._resampling import entry, first_output, most_outputs, weight_of

_ENOUGH_PROGRAMS = 1024  # to fill a GPU several times over
_GRADIENT_TILE = tile(512)  # elements of a program that adds up the shares of the attention
_CONFIGS = with_warps(8, 4)
# By 16 warps, 14 x 14 pixels spill. Fewer stages leave a multiprocessor room for more programs.
_IMAGE_CONFIGS = [
    *with_warps(8, STAGES=3),
    *with_warps(8, STAGES=2),
    *with_warps(8, STAGES=1, registers=255),
]
_KEY = ["SHAPE", "steps", "RESIZE", "KIND", "PRECISION"]


@tunable(_CONFIGS, [*_KEY, "MAXIMUM"])
@triton.jit
def _along_kernel(
    features, attention, grad, norms, parts, size, batch_steps, map_steps,
    steps: tl.constexpr, SHAPE: tl.constexpr,
    MAXIMUM: tl.constexpr, SIGNED_SQRT: tl.constexpr, SCALE: tl.constexpr, EPS: tl.constexpr,
    SMALLEST: tl.constexpr, RESIZE: tl.constexpr, KIND: tl.constexpr, PRECISION: tl.constexpr,
    MAPS: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr, INDEX: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """A tile's share of the sum of (scale grad) * (P / ||P||)."""
    maps: tl.constexpr = entry(SHAPE, 0)
    channels: tl.constexpr = entry(SHAPE, 1)
    b = tl.program_id(0).to(tl.int64)
    m = (tl.program_id(2) * MAPS + tl.arange(0, MAPS)).to(INDEX)
    c = (tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)).to(INDEX)
    pooled, _ = pooled_tile(
        features + b * batch_steps[0], attention + b * batch_steps[1], m, c, size, map_steps,
        steps, SHAPE,
        MAXIMUM, RESIZE, KIND, PRECISION, MAPS, CHANNELS, PIXELS, INDEX, ACC,
    )  # fmt: skip
    inside = (m < maps)[:, None] & (c < channels)[None, :]
    root = tl.where(inside, root_of(pooled, SIGNED_SQRT, EPS, ACC), 0.0)
    at = m[:, None] * channels + c[None, :]
    upcast = tl.load(grad + b * maps * channels + at, mask=inside, other=0.0).to(ACC)
    upcast *= tl.full([], SCALE, ACC)
    norm = tl.load(norms + b)
    smallest = tl.full([], SMALLEST, ACC)
    unit = root / tl.where(norm < smallest, smallest, norm)
    tile = tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)
    tiles = tl.num_programs(1) * tl.num_programs(2)
    tl.store(parts + b * tiles + tile, tl.sum(tl.sum(upcast * unit, 1), 0))


@triton.jit
def _halves(value, KIND: tl.constexpr):
    """Two bfloat16 numbers, of type KIND, whose sum is nearly `value`."""
    high = value.to(tl.bfloat16)
    low = (value - high.to(value.dtype)).to(tl.bfloat16)
    return high.to(KIND), low.to(KIND)


@triton.jit
def _times_w(
    exact, w, total, SPLIT: tl.constexpr, KIND: tl.constexpr, PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Adds exact w to the total; `exact` is of type KIND."""
    if SPLIT:
        high, low = _halves(w, KIND)
        total = tl.dot(exact, low, total, out_dtype=ACC)
        total = tl.dot(exact, high, total, out_dtype=ACC)
    else:
        total = tl.dot(exact.to(ACC), w, total, input_precision=PRECISION, out_dtype=ACC)
    return total


@triton.jit
def _w_times(
    w, exact, total, SPLIT: tl.constexpr, KIND: tl.constexpr, PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Adds w exact to the total; `exact` is of type KIND."""
    if SPLIT:
        high, low = _halves(w, KIND)
        total = tl.dot(low, exact, total, out_dtype=ACC)
        total = tl.dot(high, exact, total, out_dtype=ACC)
    else:
        total = tl.dot(w, exact.to(ACC), total, input_precision=PRECISION, out_dtype=ACC)
    return total


@tunable(_IMAGE_CONFIGS, _KEY)
@triton.jit
def _image_backward_kernel(
    features, attention, grad, norms, parts, grad_features, shares, tiles, span,
    size, batch_steps, map_steps, to_b, steps: tl.constexpr,
    SHAPE: tl.constexpr, TO_STEPS: tl.constexpr,
    NORMALIZE: tl.constexpr, SIGNED_SQRT: tl.constexpr, SCALE: tl.constexpr, EPS: tl.constexpr,
    SMALLEST: tl.constexpr, RESIZE: tl.constexpr, KIND: tl.constexpr, PRECISION: tl.constexpr,
    SPLIT: tl.constexpr, MAPS: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
    PARTS: tl.constexpr, STAGES: tl.constexpr, INDEX: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """All maps and pixels of an image in one tile, and `span` channels."""
    maps: tl.constexpr = entry(SHAPE, 0)
    channels: tl.constexpr = entry(SHAPE, 1)
    pixels: tl.constexpr = entry(SHAPE, 2)
    b = tl.program_id(0).to(tl.int64)
    m, p = tl.arange(0, MAPS).to(INDEX), tl.arange(0, PIXELS).to(INDEX)
    features += b * batch_steps[0]
    grad += b * maps * channels
    count = tl.cast(pixels, ACC)
    norm, projection = norm_and_projection(norms, parts, b, tiles, NORMALIZE, SMALLEST, PARTS, ACC)
    a = attention_tile(
        attention + b * batch_steps[1], m[:, None], p[None, :], size, map_steps, steps, SHAPE,
        RESIZE, KIND, ACC,
    )  # fmt: skip
    of_attention = tl.zeros([MAPS, PIXELS], ACC)
    first = tl.program_id(1) * span
    end = tl.minimum(first + span, channels)
    for start in tl.range(first, end, CHANNELS, num_stages=STAGES):
        c = (start + tl.arange(0, CHANNELS)).to(INDEX)
        f = feature_tile(features, p[:, None], c[None, :], steps, SHAPE, KIND)
        pooled = tl.zeros([MAPS, CHANNELS], ACC)
        pooled = tl.dot(a, f, pooled, input_precision=PRECISION, out_dtype=ACC) / count
        inside = (m < maps)[:, None] & (c < channels)[None, :]
        w = gradient_of_pooled(
            grad, pooled, m, c, inside, norm, projection, SHAPE,
            NORMALIZE, SIGNED_SQRT, SCALE, EPS, ACC,
        ) / count  # fmt: skip
        if grad_features is not None:
            part = tl.zeros([PIXELS, CHANNELS], ACC)
            part = _times_w(tl.trans(a), w, part, SPLIT, KIND, PRECISION, ACC)
            at = p[:, None] * entry(TO_STEPS, 1) + c[None, :] * entry(TO_STEPS, 0)
            to = grad_features + b * to_b + at
            written = (p < pixels)[:, None] & (c < channels)[None, :]
            tl.store(to, part.to(grad_features.dtype.element_ty), mask=written)
        if shares is not None:
            of_attention = _w_times(w, tl.trans(f), of_attention, SPLIT, KIND, PRECISION, ACC)
    if shares is not None:
        to = shares + (b * tl.num_programs(1) + tl.program_id(1)) * maps * pixels
        written = (m < maps)[:, None] & (p < pixels)[None, :]
        tl.store(to + (m[:, None] * pixels + p[None, :]), of_attention, mask=written)


@tunable(with_warps(8), _KEY)
@triton.jit
def _average_backward_kernel(
    features, attention, grad, norms, parts, grad_features, shares, tiles,
    size, batch_steps, map_steps, to_b, steps: tl.constexpr,
    SHAPE: tl.constexpr, TO_STEPS: tl.constexpr,
    NORMALIZE: tl.constexpr, SIGNED_SQRT: tl.constexpr, SCALE: tl.constexpr, EPS: tl.constexpr,
    SMALLEST: tl.constexpr, RESIZE: tl.constexpr, KIND: tl.constexpr, PRECISION: tl.constexpr,
    SPLIT: tl.constexpr, ONE_TILE: tl.constexpr, MAPS: tl.constexpr, CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr, PARTS: tl.constexpr, INDEX: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Gradient of the features of a tile of channels, and its share of the attention's."""
    maps: tl.constexpr = entry(SHAPE, 0)
    channels: tl.constexpr = entry(SHAPE, 1)
    pixels: tl.constexpr = entry(SHAPE, 2)
    b = tl.program_id(0).to(tl.int64)
    c = (tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)).to(INDEX)
    features += b * batch_steps[0]
    attention += b * batch_steps[1]
    grad += b * maps * channels
    count = tl.cast(pixels, ACC)
    norm, projection = norm_and_projection(norms, parts, b, tiles, NORMALIZE, SMALLEST, PARTS, ACC)
    for m_start in range(0, maps, MAPS):
        m = (m_start + tl.arange(0, MAPS)).to(INDEX)
        inside = (m < maps)[:, None] & (c < channels)[None, :]
        pooled = average(
            features, attention, m, c, size, map_steps, steps, SHAPE,
            RESIZE, KIND, PRECISION, MAPS, CHANNELS, PIXELS, INDEX, ACC,
        )  # fmt: skip
        w = gradient_of_pooled(
            grad, pooled, m, c, inside, norm, projection, SHAPE,
            NORMALIZE, SIGNED_SQRT, SCALE, EPS, ACC,
        ) / count  # fmt: skip
        for start in range(0, pixels, PIXELS):
            p = (start + tl.arange(0, PIXELS)).to(INDEX)
            if grad_features is not None:
                a = attention_tile(
                    attention, m[None, :], p[:, None], size, map_steps, steps, SHAPE,
                    RESIZE, KIND, ACC,
                )  # fmt: skip
                part = tl.zeros([PIXELS, CHANNELS], ACC)
                part = _times_w(a, w, part, SPLIT, KIND, PRECISION, ACC)
                at = p[:, None] * entry(TO_STEPS, 1) + c[None, :] * entry(TO_STEPS, 0)
                to = grad_features + b * to_b + at
                written = (p < pixels)[:, None] & (c < channels)[None, :]
                if not ONE_TILE:
                    # More maps than a tile holds: the sum grows in float32 scratch.
                    part += tl.load(to, mask=written & (m_start > 0), other=0.0).to(ACC)
                tl.store(to, part.to(grad_features.dtype.element_ty), mask=written)
            if shares is not None:
                f = feature_tile(features, p[:, None], c[None, :], steps, SHAPE, KIND)
                part = tl.zeros([MAPS, PIXELS], ACC)
                part = _w_times(w, tl.trans(f), part, SPLIT, KIND, PRECISION, ACC)
                to = shares + (b * tl.num_programs(1) + tl.program_id(1)) * maps * pixels
                written = (m < maps)[:, None] & (p < pixels)[None, :]
                tl.store(to + (m[:, None] * pixels + p[None, :]), part, mask=written)
        if not ONE_TILE:
            tl.debug_barrier()  # What other threads of the program have stored is read next.


@triton.jit
def _attention_gradient_kernel(
    shares, grad_attention, maps, tiles, size, to_steps,
    OUTPUTS_Y: tl.constexpr, OUTPUTS_X: tl.constexpr,
    RESIZE: tl.constexpr, MAPS: tl.constexpr, PIXELS: tl.constexpr,
    INDEX: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Adds up the shares of the tiles in their order, resized back, for some maps and pixels."""
    b = tl.program_id(0).to(tl.int64)
    height, width, low_height, low_width = size
    m = tl.program_id(1) * MAPS + tl.arange(0, MAPS)[:, None]
    q = tl.program_id(2) * PIXELS + tl.arange(0, PIXELS)[None, :]
    inside = (q < low_height * low_width) & (m < maps)
    y, x = q // low_width, q % low_width
    shares += b * tiles * maps * height * width
    row = m.to(INDEX) * height * width
    total = tl.zeros([MAPS, PIXELS], ACC)
    if RESIZE:
        first_y = first_output(y, low_height, height, "bilinear", 2, True)
        first_x = first_output(x, low_width, width, "bilinear", 2, True)
    else:
        first_y, first_x = y, x
    for k in range(OUTPUTS_Y * OUTPUTS_X):
        o_y = first_y + k // OUTPUTS_X
        o_x = first_x + k % OUTPUTS_X
        read = inside & (o_y < height) & (o_x < width)
        part = tl.full([1, PIXELS], 1.0, ACC)
        if RESIZE:
            part = weight_of(o_y, y, low_height, height, "bilinear", 2, True, ACC)
            part *= weight_of(o_x, x, low_width, width, "bilinear", 2, True, ACC)
            read = read & (part != 0)
        for i in tl.range(tiles, loop_unroll_factor=4):
            at = shares + tl.cast(i, tl.int64) * maps * height * width
            total += part * tl.load(at + (row + o_y * width + o_x), mask=read, other=0.0)
    to = grad_attention + b * to_steps[0]
    to += m.to(INDEX) * to_steps[1] + y.to(INDEX) * to_steps[2] + x.to(INDEX) * to_steps[3]
    tl.store(to, total.to(grad_attention.dtype.element_ty), mask=inside)


def _along(call: Call, grad: torch.Tensor, norm: torch.Tensor, normalize: bool) -> torch.Tensor:
    """Sums along the unit vector (B, tiles), or without a norm nothing."""
    batch, dtype = grad.shape[0], accumulation_dtype(grad.dtype)
    tile = call.product_tile()
    tiles = call.tiles(tile["CHANNELS"])
    shape = (batch, tiles[0] * tiles[1] if normalize else 0)
    parts = grad.new_empty(shape, dtype=dtype)
    if normalize:
        _along_kernel[(batch, *tiles)](
            call.features, call.attention, grad, norm, parts, **call.sizes,
            MAXIMUM=call.maximum, **call.settings, **tile,
        )  # fmt: skip
    return parts


def _spans(call: Call, batch: int, tile: int) -> int:
    """Channels of a program that walks over them: few programs an image where images are many."""
    tiles = triton.cdiv(call.channels, tile)
    return tile * min(max(batch * tiles // _ENOUGH_PROGRAMS, 1), tiles)


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
    call = Call(features, attention, pool, signed_sqrt, scale, eps, allow_tf32)
    grad_features = empty_like_format(features) if needs[0] else features.new_empty(0)
    grad_attention = empty_like_format(attention) if needs[1] else attention.new_empty(0)
    batch = features.shape[0]
    if batch == 0 or not any(needs):
        return grad_features, grad_attention
    grad, argmax = grad.contiguous(), argmax.contiguous()
    parts = _along(call, grad, norm, normalize)
    one_tile = call.map_tiles == 1
    dtype = accumulation_dtype(features.dtype)
    # With more maps than one tile holds, the gradient of the features grows in that dtype.
    to = grad_features if one_tile or call.maximum or not needs[0] else grad_features.to(dtype)
    tile = call.backward_tile()
    whole = call.whole_image()
    span = _spans(call, batch, tile["CHANNELS"]) if whole else tile["CHANNELS"]
    count = triton.cdiv(call.channels, span)
    shares = features.new_empty((batch, count, call.maps, call.pixels), dtype=dtype)
    inputs = (call.features, call.attention, grad, norm, parts)
    targets = (to if needs[0] else None, shares if needs[1] else None)
    to_steps = pixel_steps(to) if needs[0] else (0, 0, 0)
    tiles = parts.shape[1]
    settings = {
        "NORMALIZE": normalize, "PARTS": triton.next_power_of_2(max(tiles, 1)),
        **call.sizes, **call.settings, **tile,
    }  # fmt: skip
    if call.maximum:
        for name in ("KIND", "PRECISION", "MAPS"):
            del settings[name]
        grid = (batch, count, triton.cdiv(call.pixels, tile["PIXELS"]))
        maximum_backward_kernel[grid](
            *inputs, argmax, *targets, tiles, to_steps=to_steps, **settings
        )
    elif whole:
        _image_backward_kernel[(batch, count)](
            *inputs, *targets, tiles, span, to_b=to_steps[0], TO_STEPS=to_steps[1:],
            SPLIT=call.split, **settings,
        )  # fmt: skip
    else:
        _average_backward_kernel[(batch, count)](
            *inputs, *targets, tiles, to_b=to_steps[0], TO_STEPS=to_steps[1:],
            SPLIT=call.split, ONE_TILE=one_tile, **settings,
        )  # fmt: skip
    if to is not grad_features:
        grad_features.copy_(to)
    if needs[1]:
        _attention_gradient(shares, grad_attention, call)
    return grad_features, grad_attention


def _attention_gradient(shares: torch.Tensor, grad_attention: torch.Tensor, call: Call) -> None:
    batch, maps, low_height, low_width = grad_attention.shape
    height, width = call.features.shape[2:]
    resize = (low_height, low_width) != (height, width)
    most = _GRADIENT_TILE // (2 if call.double else 1)
    pixels = block(low_height * low_width, most)
    together = block(maps, most // pixels)
    outputs = [
        most_outputs(low, size, "bilinear", True) if resize else 1
        for low, size in ((low_height, height), (low_width, width))
    ]
    grid = (batch, triton.cdiv(maps, together), triton.cdiv(low_height * low_width, pixels))
    _attention_gradient_kernel[grid](
        shares, grad_attention, maps, shares.shape[1], (height, width, low_height, low_width),
        grad_attention.stride(), OUTPUTS_Y=outputs[0], OUTPUTS_X=outputs[1], RESIZE=resize,
        MAPS=together, PIXELS=pixels, INDEX=call.settings["INDEX"],
        ACC=accumulation(call.features.dtype),
    )  # fmt: skip
