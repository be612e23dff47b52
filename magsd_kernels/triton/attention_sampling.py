"""Draws attention maps with probability proportional to the root of their sum.

Reads every map once and writes B K indices: one launch, one program per image. Sums run in float64,
so that the order of adding does not decide a draw. The weights of all maps stay in registers, and
the inclusive cumulative sum is a scan over them. Nothing is tuned: an image has few values.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from magsd_kernels.triton._common import block, pixel_steps, with_rows

_TILE = 4096  # elements of the maps in flight


@triton.jit
def cumulative_weights(
    image, maps, pixels, step_m, step_p,
    EPS: tl.constexpr, MAPS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """Inclusive cumulative weights of an image's maps, divided by their last: (MAPS,) float64."""
    m = tl.arange(0, MAPS)
    sums = tl.zeros([MAPS], tl.float64)
    for start in range(0, pixels, PIXELS):
        p = start + tl.arange(0, PIXELS)
        values = tl.load(
            image + m[:, None] * step_m + p[None, :] * step_p,
            mask=(m[:, None] < maps) & (p[None, :] < pixels),
            other=0.0,
        )
        sums += tl.sum(values.to(tl.float64), 1)
    # The maximum of NaN and 0 is 0, so that NaN counts as 0, as a negative sum does. The sums are
    # used once: Triton does not compile for AMD what uses float64 sums of a loop twice.
    weights = tl.where(m < maps, tl.sqrt(tl.maximum(sums, 0.0) + EPS), 0.0)
    cumulative = tl.cumsum(weights, 0)
    return cumulative / tl.sum(tl.where(m == maps - 1, cumulative, 0.0), 0)


@triton.jit
def drawn_maps(cumulative, u, maps, MAPS: tl.constexpr):
    """The maps (N,) int64 that uniforms u (N,) draw."""
    m = tl.arange(0, MAPS)
    passed = (cumulative[None, :] <= u.to(tl.float64)[:, None]) & (m[None, :] < maps)
    return tl.minimum(tl.sum(passed.to(tl.int32), 1), maps - 1).to(tl.int64)


@triton.jit
def _sample_kernel(
    attention, uniforms, drawn, maps, pixels, draws, map_steps, uniform_steps,
    EPS: tl.constexpr, MAPS: tl.constexpr, PIXELS: tl.constexpr, DRAWS: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    step_b, step_m, step_p = map_steps
    cumulative = cumulative_weights(
        attention + b * step_b, maps, pixels, step_m, step_p, EPS, MAPS, PIXELS
    )
    for start in range(0, draws, DRAWS):
        k = start + tl.arange(0, DRAWS)
        at = uniforms + b * uniform_steps[0] + k * uniform_steps[1]
        u = tl.load(at, mask=k < draws, other=0.0)
        tl.store(drawn + b * draws + k, drawn_maps(cumulative, u, maps, MAPS), mask=k < draws)


def weighing_tile(attention: torch.Tensor) -> dict[str, int]:
    """How many maps and pixels of an image `cumulative_weights` takes at a time."""
    _, maps, height, width = attention.shape
    rows = triton.next_power_of_2(maps)
    return {"MAPS": rows, "PIXELS": block(height * width, max(_TILE // rows, 1))}


def sample_attention(attention: torch.Tensor, uniforms: torch.Tensor, eps: float) -> torch.Tensor:
    """(B, K) int64 draws from maps (B, M, h, w) by uniforms (B, K)."""
    batch, maps, height, width = attention.shape
    drawn = uniforms.new_empty(uniforms.shape, dtype=torch.int64)
    if drawn.numel() == 0:
        return drawn
    attention, cut = with_rows(attention), weighing_tile(attention)
    _sample_kernel[(batch,)](
        attention, uniforms, drawn, maps, height * width, uniforms.shape[1],
        pixel_steps(attention), uniforms.stride(),
        EPS=eps, DRAWS=block(uniforms.shape[1], max(_TILE // cut["MAPS"], 1)), **cut,
    )  # fmt: skip
    return drawn
