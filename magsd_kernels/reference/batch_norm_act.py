"""Batch norm of several groups of a batch: y = act(batch_norm(x) + residual)."""

from __future__ import annotations

import torch

from magsd_kernels._layout import accumulation_dtype, in_format_of

Tensor = torch.Tensor


def batch_norm_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    residual: Tensor | None,
    groups: int,
    act: str,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Result like x, and the mean and 1 / standard deviation (groups, C) that it used.

    In training the running statistics are updated in place, group by group.
    """
    dtype = accumulation_dtype(x.dtype)
    means, rstds = [], []
    for group in _groups(x.to(dtype), groups):
        if training and group.shape[0] > 0:
            variance, mean = torch.var_mean(group, (0, 2, 3), correction=0)
            values = group[:, 0].numel()
            for running, now in (
                (running_mean, mean),
                (running_var, variance * values / (values - 1)),
            ):
                running.copy_((1 - momentum) * running.to(dtype) + momentum * now)
        else:
            mean, variance = running_mean.to(dtype), running_var.to(dtype)
        means.append(mean)
        rstds.append((variance + eps).rsqrt())
    mean, rstd = torch.stack(means), torch.stack(rstds)
    sums = _sums(x, weight, bias, residual, mean, rstd)
    result = {"relu": torch.relu, "silu": torch.nn.functional.silu, "none": lambda y: y}[act](sums)
    return in_format_of(result.to(x.dtype), x), mean, rstd


def batch_norm_act_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    kept: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    act: str,
    training: bool,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias and residual; `needs`: of x, of weight and bias, of residual.

    One that is not needed is empty. kept: with a residual the result for relu and the residual for
    silu, else None.
    """
    dtype = accumulation_dtype(x.dtype)
    groups = mean.shape[0]
    grad = grad.to(dtype)
    if act == "relu":
        # Not `sums > 0`: as torch's relu, a NaN lets the gradient pass.
        sums = _sums(x, weight, bias, None, mean, rstd) if kept is None else kept
        grad = grad.masked_fill(sums <= 0, 0)
    elif act == "silu":
        sums = _sums(x, weight, bias, kept, mean, rstd)
        sigmoid = sums.sigmoid()
        grad = grad * sigmoid * (1 + sums * (1 - sigmoid))
    of_x, of_parameters, of_residual = needs
    grads_x, grad_weight, grad_bias = [], torch.zeros_like(mean[0]), torch.zeros_like(mean[0])
    for i, (g, group) in enumerate(zip(_groups(grad, groups), _groups(x, groups), strict=True)):
        centered = (group.to(dtype) - _channel(mean[i])) * _channel(rstd[i])
        sum_grad, sum_product = g.sum((0, 2, 3)), (g * centered).sum((0, 2, 3))
        grad_bias += sum_grad
        grad_weight += sum_product
        if training and group.shape[0] > 0:
            # Ioffe and Szegedy 2015: the batch's mean and variance depend on every element.
            shift = _channel(sum_grad) + centered * _channel(sum_product)
            g = g - shift / group[:, 0].numel()
        grads_x.append(g * _channel(weight.to(dtype) * rstd[i]))
    empty = x.new_empty(0)
    return (
        in_format_of(torch.cat(grads_x).to(x.dtype), x) if of_x else empty,
        grad_weight.to(weight.dtype) if of_parameters else weight.new_empty(0),
        grad_bias.to(bias.dtype) if of_parameters else bias.new_empty(0),
        in_format_of(grad.to(x.dtype), x) if of_residual else empty,
    )


def _groups(x: Tensor, groups: int) -> list[Tensor]:
    return list(x.unflatten(0, (groups, x.shape[0] // groups)))


def _channel(values: Tensor) -> Tensor:
    return values[:, None, None]


def _sums(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, mean: Tensor, rstd: Tensor
) -> Tensor:
    """batch_norm(x) + residual, before the activation, in the accumulation dtype."""
    normal = torch.cat(
        [
            (group.to(mean.dtype) - _channel(mean[i])) * _channel(weight.to(mean.dtype) * rstd[i])
            + _channel(bias.to(mean.dtype))
            for i, group in enumerate(_groups(x, mean.shape[0]))
        ]
    )
    return normal if residual is None else normal + residual.to(mean.dtype)
