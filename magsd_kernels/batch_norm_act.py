"""Batch norm, residual addition and activation in one operation, for several groups of a batch.

Source: Ioffe and Szegedy, "Batch Normalization", ICML 2015; He et al., "Deep Residual Learning",
CVPR 2016. Groups: a batch of several views is normalized as if each view were a batch of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from magsd_kernels import _checks as check
from magsd_kernels._layout import accumulation_dtype, dense, empty_like_format, is_channels_last
from magsd_kernels._norms import (
    GroupAware,
    count_batches,
    current_groups,
    fusible,
    normalized,
    unhooked,
)
from magsd_kernels.backends import select
from magsd_kernels.registry import define

_OPERATION = "batch_norm_act"
ACTS = ("relu", "silu", "none")


def batch_norm_act(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    running_mean: torch.Tensor,
    running_var: torch.Tensor,
    *,
    groups: int = 1,
    residual: torch.Tensor | None = None,
    act: str = "relu",
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
    backend: str | None = None,
) -> torch.Tensor:
    """act(batch_norm(x) + residual), each group of the batch normalized by itself.

    In training, rows g B to (g + 1) B - 1 of x (groups * B, C, H, W) are normalized by their own
    biased statistics, and the running statistics are updated once per group, in order, as
    `groups` calls of `torch.nn.functional.batch_norm` would do it. In evaluation the running
    statistics normalize.

    Args:
        x: (groups * B, C, H, W), floating.
        weight, bias, running_mean, running_var: (C,), of x's dtype or float32. The running
            statistics are updated in place in training, with the unbiased variance.
        groups: must divide the batch.
        residual: added before the activation; shape and dtype of x.
        act: "relu" (its gradient at 0 is 0), "silu" or "none".
        training: normalize by the batch's statistics instead of the running ones.
        momentum: weight of a group in the running statistics, 0..1.
        eps: added to the variance, above 0.
        backend: name of a backend, see `use_backend`.

    Returns:
        Shape, dtype and memory format of x; arithmetic in float32 (float64 for float64). Gradients
        go to x, weight, bias and residual.

    Raises:
        ValueError: also where groups does not divide the batch, and in training for a group with
            one value per channel.
    """
    op = "batch_norm_act"
    check.tensor(op, "x", x, check.IMAGES)
    batch, channels, height, width = x.shape
    parameters = (weight, bias, running_mean, running_var)
    shape, dtypes = (channels,), (x.dtype, torch.float32)
    if not check.all_fit(parameters, shape, dtypes, x):
        names = ("weight", "bias", "running_mean", "running_var")
        for name, value in zip(names, parameters, strict=True):
            check.tensor(op, name, value, shape, dtypes, x)
    if residual is not None:
        check.tensor(op, "residual", residual, x.shape, (x.dtype,), x)
    check.choice(op, "act", act, ACTS)
    check.flag(op, "training", training)
    check.number(op, "momentum", momentum, 0, 1)
    check.number(op, "eps", eps, 0)
    if eps == 0:
        raise ValueError(f"{op}: eps must be above 0, got {eps}")
    check.count(op, "groups", groups)
    if batch % groups:
        raise ValueError(f"{op}: groups must divide the batch of {batch}, got {groups}")
    if training and batch // groups * height * width == 1:
        raise ValueError(
            f"{op}: x must have more than one value per channel and group in training, "
            f"got shape {tuple(x.shape)} and groups={groups}"
        )
    backend = select(_OPERATION, backend, x)
    result: torch.Tensor = _forward(
        x, weight, bias, running_mean, running_var, residual, groups if training else 1, act,
        training, momentum, eps, backend,
    )[0]  # fmt: skip
    return result


class BatchNormAct(GroupAware, nn.Module):
    """Batch norm, addition of a residual, and activation: act(norm(x) + residual).

    Args:
        num_features: C.
        eps, momentum: of the batch norm.
        act: "relu", "silu" or "none".
        groups: how many parts of the batch are normalized by themselves; 1 leaves it to
            `norm_groups`.

    Shapes: forward takes x (groups * B, C, H, W), and a residual of x's shape or None; returns the
    shape of x.

    `norm` is a plain `nn.BatchNorm2d`. Whatever is put in its place, as by `SyncBatchNorm`
    conversion, runs unfused, and so do a norm with hooks and a residual of another dtype or shape,
    with the same meaning.
    """

    def __init__(
        self,
        num_features: int,
        *,
        eps: float = 1e-5,
        momentum: float = 0.1,
        act: str = "relu",
        groups: int = 1,
    ) -> None:
        super().__init__()
        check.choice("BatchNormAct", "act", act, ACTS)
        check.count("BatchNormAct", "groups", groups)
        self.act = act
        self.groups = groups
        self.norm = nn.BatchNorm2d(num_features, eps=eps, momentum=momentum)

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """x, and what is added before the activation -> the shape of x."""
        groups = self.groups if self.groups > 1 else current_groups()
        return norm_act(self.norm, x, self.act, residual, groups=groups)

    def extra_repr(self) -> str:
        """The settings that submodules do not show."""
        return f"act={self.act!r}, groups={self.groups}"


def norm_act(
    norm: nn.Module,
    x: torch.Tensor,
    act: nn.Module | str,
    residual: torch.Tensor | None = None,
    *,
    groups: int | None = None,
) -> torch.Tensor:
    """act(norm(x) + residual), in one operation where it does exactly what the modules do.

    groups: parts of the batch that are normalized alone; None: those of `norm_groups`.
    """
    groups = current_groups() if groups is None else groups
    name = act_name(act)
    fits = residual is None or (residual.shape == x.shape and residual.dtype == x.dtype)
    if fits and fusible(norm):
        result = fused(norm, x, name or "none", residual, groups)
        return result if name is not None else _activated(act, result)
    result = normalized(norm, x, groups)
    if residual is not None:
        result += residual  # as blocks do, in the dtype of x
    return _activated(act, result)


def fused(
    norm: Any, x: torch.Tensor, act: str, residual: torch.Tensor | None, groups: int
) -> torch.Tensor:
    """The operation with a batch norm's parameters, statistics and mode."""
    count_batches(norm, groups)
    return batch_norm_act(
        x,
        norm.weight,
        norm.bias,
        norm.running_mean,
        norm.running_var,
        groups=groups,
        residual=residual,
        act=act,
        training=norm.training,
        momentum=norm.momentum,
        eps=norm.eps,
    )


def act_name(act: Any) -> str | None:
    """What the operation calls an activation; None where it lacks it or calling it does more."""
    if isinstance(act, str):
        return act
    name = {nn.ReLU: "relu", nn.SiLU: "silu", nn.Identity: "none"}.get(type(act))
    return name if name is not None and unhooked(act) else None


def _activated(act: nn.Module | str, x: torch.Tensor) -> torch.Tensor:
    if isinstance(act, str):
        return {"relu": torch.relu, "silu": nn.functional.silu, "none": _unchanged}[act](x)
    result: torch.Tensor = act(x)
    return result


def _unchanged(x: torch.Tensor) -> torch.Tensor:
    return x


def _forward_fake(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    running_mean: torch.Tensor,
    running_var: torch.Tensor,
    residual: torch.Tensor | None,
    groups: int,
    *_: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dtype = accumulation_dtype(x.dtype)
    statistics = (groups, x.shape[1])
    return (
        empty_like_format(x),
        x.new_empty(statistics, dtype=dtype),
        x.new_empty(statistics, dtype=dtype),
    )


def _backward_fake(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor,
    kept: torch.Tensor | None, mean: torch.Tensor, rstd: torch.Tensor, act: str, training: bool,
    needs: Sequence[bool], backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    of_x, of_parameters, of_residual = needs
    count = x.shape[1] if of_parameters else 0
    return (
        empty_like_format(x) if of_x else x.new_empty(0),
        weight.new_empty(count),
        bias.new_empty(count),
        empty_like_format(x) if of_residual else x.new_empty(0),
    )


def _running_statistics(inputs: Any) -> list[torch.Tensor]:
    """What a call writes to."""
    return [inputs.running_mean, inputs.running_var] if inputs.training else []


def _keep(ctx: Any, inputs: Any, results: tuple[torch.Tensor, ...]) -> None:
    output, mean, rstd = results
    kept = None
    if inputs.residual is not None:
        # The next layer keeps the result anyway. silu cannot be inverted.
        kept = {"relu": output, "silu": inputs.residual, "none": None}[inputs.act]
        ctx.residual_last = is_channels_last(inputs.residual)
    ctx.save_for_backward(inputs.x, inputs.weight, inputs.bias, kept, mean, rstd)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.settings = {name: getattr(inputs, name) for name in ("act", "training", "backend")}


def _differentiate(ctx: Any, grad: torch.Tensor | None, *_: Any) -> dict[str, Any]:
    if grad is None:
        return {}
    of_residual = ctx.wanted["residual"]
    passes = ctx.settings["act"] == "none"  # the residual's gradient is the result's
    of_parameters = ctx.wanted["weight"] or ctx.wanted["bias"]
    needs = [ctx.wanted["x"], of_parameters, of_residual and not passes]
    grad_x, grad_weight, grad_bias, grad_residual = _backward(
        grad, *ctx.saved_tensors, **ctx.settings, needs=needs
    )
    if of_residual:
        grad_residual = dense(grad if passes else grad_residual, ctx.residual_last)
    return {
        "x": grad_x if ctx.wanted["x"] else None,
        "weight": grad_weight if of_parameters else None,
        "bias": grad_bias if of_parameters else None,
        "residual": grad_residual if of_residual else None,
    }


_forward = define(
    _OPERATION,
    "batch_norm_act(Tensor x, Tensor weight, Tensor bias, Tensor(a!) running_mean,"
    " Tensor(b!) running_var, Tensor? residual, SymInt groups, str act, bool training,"
    " float momentum, float eps, str backend) -> (Tensor, Tensor, Tensor)",
    _forward_fake,
    setup_context=_keep,
    backward=_differentiate,
    written=_running_statistics,
)
_backward = define(
    _OPERATION,
    "batch_norm_act_backward(Tensor grad, Tensor x, Tensor weight, Tensor bias, Tensor? kept,"
    " Tensor mean, Tensor rstd, str act, bool training, bool[] needs, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _backward_fake,
)
