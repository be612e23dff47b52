"""Bilinear attention pooling: one pooled feature vector per attention map.

Source: Hu et al., "See Better Before Looking Closer" (WS-DAN, arXiv 1901.09891), section 3.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from magsd_kernels import _checks as check
from magsd_kernels._layout import accumulation_dtype, empty_like_format
from magsd_kernels.backends import select
from magsd_kernels.registry import define

_OPERATION = "bilinear_pool"
_POOLS = ("avg", "max")


def bilinear_attention_pool(
    features: torch.Tensor,
    attention: torch.Tensor,
    *,
    pool: str = "avg",
    signed_sqrt: bool = True,
    normalize: bool = True,
    scale: float = 1.0,
    eps: float = 1e-12,
    backend: str | None = None,
) -> torch.Tensor:
    """Pool features under every attention map.

    P = mean over pixels of A F ("avg") or its maximum ("max", gradient to the first maximal
    pixel); then, if asked, P <- sign(P) sqrt(|P| + eps) (derivative 0 where P = 0) and
    P <- P / max(||P||_2, 1e-12) over maps and channels together; then P <- scale P.

    Args:
        features: (B, C, H, W), floating.
        attention: (B, M, h, w) of the same dtype; resized bilinearly with align_corners=True
            where (h, w) differs from (H, W).
        pool: "avg" or "max".
        signed_sqrt, normalize: whether to take the signed square root, to normalize.
        scale: factor of the result; the published classifiers take 100.
        eps: added under the square root, at least 0.
        backend: name of a backend, see `use_backend`.

    float32 products on a GPU run in TF32 where `torch.backends.cuda.matmul.fp32_precision` says
    so, as torch's own do.

    Returns:
        (B, M*C), entry m*C + c; dtype of features. Gradients go to both inputs.
    """
    op = "bilinear_attention_pool"
    check.tensor(op, "features", features, check.IMAGES)
    maps = (features.shape[0], *check.IMAGES[1:])
    check.tensor(op, "attention", attention, maps, (features.dtype,), features)
    check.choice(op, "pool", pool, _POOLS)
    check.flag(op, "signed_sqrt", signed_sqrt)
    check.flag(op, "normalize", normalize)
    check.number(op, "scale", scale)
    check.number(op, "eps", eps, 0)
    backend = select(_OPERATION, backend, features)
    # The reference's products follow torch's settings by themselves; CPUs have no TF32.
    allow_tf32 = (
        features.dtype == torch.float32
        and backend not in ("reference", "cpu")
        and _torch_allows_tf32()
    )
    pooled: torch.Tensor = _pool(
        features, attention, pool, signed_sqrt, normalize, scale, eps, allow_tf32, backend
    )[0]
    return pooled


def _torch_allows_tf32() -> bool:
    return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")


# torch.compile cannot look inside the settings. It traces again where they change, because its
# guard of torch's global state holds this one.
_torch_allows_tf32._dynamo_marked_constant = True  # type: ignore[attr-defined]


class BilinearAttentionPool(nn.Module):
    """`bilinear_attention_pool` as a layer; the arguments are those of the function.

    Shapes: forward takes features (B, C, H, W) and attention (B, M, h, w), returns (B, M*C).
    """

    def __init__(
        self,
        *,
        pool: str = "avg",
        signed_sqrt: bool = True,
        normalize: bool = True,
        scale: float = 1.0,
        eps: float = 1e-12,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        check.choice("BilinearAttentionPool", "pool", pool, _POOLS)
        self.pool = pool
        self.signed_sqrt = signed_sqrt
        self.normalize = normalize
        self.scale = scale
        self.eps = eps
        self.backend = backend

    def forward(self, features: torch.Tensor, attention: torch.Tensor) -> torch.Tensor:
        """Features (B, C, H, W), attention (B, M, h, w) -> (B, M*C)."""
        return bilinear_attention_pool(
            features,
            attention,
            pool=self.pool,
            signed_sqrt=self.signed_sqrt,
            normalize=self.normalize,
            scale=self.scale,
            eps=self.eps,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        """The settings."""
        return (
            f"pool={self.pool!r}, signed_sqrt={self.signed_sqrt}, normalize={self.normalize}, "
            f"scale={self.scale}, eps={self.eps}"
        )


def _pool_fake(
    features: torch.Tensor,
    attention: torch.Tensor,
    pool: str,
    signed_sqrt: bool,
    normalize: bool,
    *_: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, channels = features.shape[:2]
    maps = attention.shape[1]
    matrix = (batch, maps, channels)
    return (
        features.new_empty((batch, maps * channels)),
        features.new_empty(
            (batch,) if normalize else (0,), dtype=accumulation_dtype(features.dtype)
        ),
        features.new_empty(matrix if pool == "max" else (0,), dtype=torch.int32),
    )


def _pool_backward_fake(
    grad: torch.Tensor, features: torch.Tensor, attention: torch.Tensor, output: torch.Tensor,
    norm: torch.Tensor, argmax: torch.Tensor, pool: str, signed_sqrt: bool, normalize: bool,
    scale: float, eps: float, allow_tf32: bool, needs: Sequence[bool], backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    of_features, of_attention = needs
    return (
        empty_like_format(features) if of_features else features.new_empty(0),
        empty_like_format(attention) if of_attention else attention.new_empty(0),
    )


def _keep_pool(ctx: Any, inputs: Any, output: tuple[torch.Tensor, ...]) -> None:
    pooled, norm, argmax = output
    ctx.save_for_backward(inputs.features, inputs.attention, pooled, norm, argmax)
    ctx.mark_non_differentiable(norm, argmax)
    ctx.set_materialize_grads(False)
    names = ("pool", "signed_sqrt", "normalize", "scale", "eps", "allow_tf32", "backend")
    ctx.settings = {name: getattr(inputs, name) for name in names}


def _differentiate_pool(ctx: Any, grad: torch.Tensor | None, *_: Any) -> dict[str, Any]:
    if grad is None:
        return {}
    of_features, of_attention = ctx.wanted["features"], ctx.wanted["attention"]
    grad_features, grad_attention = _pool_backward(
        grad, *ctx.saved_tensors, **ctx.settings, needs=[of_features, of_attention]
    )
    return {
        "features": grad_features if of_features else None,
        "attention": grad_attention if of_attention else None,
    }


_pool = define(
    _OPERATION,
    "bilinear_attention_pool(Tensor features, Tensor attention, str pool, bool signed_sqrt,"
    " bool normalize, float scale, float eps, bool allow_tf32, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    _pool_fake,
    setup_context=_keep_pool,
    backward=_differentiate_pool,
)
_pool_backward = define(
    _OPERATION,
    "bilinear_attention_pool_backward(Tensor grad, Tensor features, Tensor attention,"
    " Tensor output, Tensor norm, Tensor argmax, str pool, bool signed_sqrt, bool normalize,"
    " float scale, float eps, bool allow_tf32, bool[] needs, str backend) -> (Tensor, Tensor)",
    _pool_backward_fake,
)
