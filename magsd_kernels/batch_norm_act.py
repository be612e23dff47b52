"""Batch norm, residual addition and activation in one operation, for several groups of a batch.

Source: Ioffe and Szegedy, "Batch Normalization", ICML 2015; He et al., "Deep Residual Learning",
CVPR 2016. Groups: a batch of several views is normalized as if each view were a batch of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from magsd_kernels import _checks as check
from magsd_kernels._layout import accumulation_dtype, dense, empty_like_format, is_channels_last
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
