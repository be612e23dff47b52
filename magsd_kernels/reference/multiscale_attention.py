"""Multiscale attention: A = sum over scales of resample(relu(batch_norm(projection)))."""

from __future__ import annotations

import torch

from magsd_kernels._layout import accumulation_dtype, in_format_of
from magsd_kernels.reference.resize import resize, resize_adjoint

Tensors = list[torch.Tensor]


def resample_attention(
    maps: Tensors, size: list[int], mode: str, align_corners: bool
) -> torch.Tensor:
    """Sum of maps[i] (B, M, h_i, w_i) resampled to size -> (B, M, H, W)."""
    dtype = accumulation_dtype(maps[0].dtype)
    total = sum(resize(m.to(dtype), (size[0], size[1]), mode, align_corners) for m in maps)
    assert isinstance(total, torch.Tensor)
    return in_format_of(total.to(maps[0].dtype), maps[0])


def resample_attention_backward(
    grad: torch.Tensor, heights: list[int], widths: list[int], mode: str, align_corners: bool
) -> Tensors:
    """Gradients (B, M, heights[i], widths[i]) of the maps."""
    upcast = grad.to(accumulation_dtype(grad.dtype))
    return [
        in_format_of(resize_adjoint(upcast, (h, w), mode, align_corners).to(grad.dtype), grad)
        for h, w in zip(heights, widths, strict=True)
    ]


def multiscale_attention(
    projections: Tensors,
    weights: Tensors,
    biases: Tensors,
    running_means: Tensors,
    running_vars: Tensors,
    size: list[int],
    training: bool,
    momentum: float,
    eps: float,
    mode: str,
    align_corners: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attention (B, M, H, W), and the mean and 1 / standard deviation (scales, M) that it used.

    In training the running statistics are updated in place, as torch's batch norm does.
    """
    main = projections[0]
    dtype = accumulation_dtype(main.dtype)
    maps, means, rstds = [], [], []
    for x, weight, bias, running_mean, running_var in zip(
        projections, weights, biases, running_means, running_vars, strict=True
    ):
        if training and x.shape[0] > 0:
            mean_, var_ = running_mean.to(dtype), running_var.to(dtype)
            normal, mean, rstd = torch.native_batch_norm(
                x.to(dtype), weight.to(dtype), bias.to(dtype), mean_, var_, True, momentum, eps
            )
            if mean_ is not running_mean:
                running_mean.copy_(mean_)
                running_var.copy_(var_)
        else:
            mean, rstd = running_mean.to(dtype), (running_var.to(dtype) + eps).rsqrt()
            normal = _affine(x.to(dtype), mean, rstd, weight, bias)
        maps.append(normal.relu())
        means.append(mean)
        rstds.append(rstd)
    attention = resample_attention(maps, size, mode, align_corners).to(main.dtype)
    return in_format_of(attention, main), torch.stack(means), torch.stack(rstds)


def multiscale_attention_backward(
    grad: torch.Tensor,
    projections: Tensors,
    weights: Tensors,
    biases: Tensors,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    training: bool,
    mode: str,
    align_corners: bool,
) -> tuple[Tensors, Tensors, Tensors]:
    """Gradients of projections, weights and biases."""
    dtype = accumulation_dtype(projections[0].dtype)
    grad = grad.to(dtype)
    grads_x, grads_weight, grads_bias = [], [], []
    for scale, (x, weight, bias) in enumerate(zip(projections, weights, biases, strict=True)):
        resampled = resize_adjoint(grad, (x.shape[-2], x.shape[-1]), mode, align_corners)
        normal = _affine(x.to(dtype), mean[scale], rstd[scale], weight, bias)
        grad_normal = torch.where(normal > 0, resampled, 0)
        centered = (x.to(dtype) - _channel(mean[scale])) * _channel(rstd[scale])
        grad_bias = grad_normal.sum((0, 2, 3))
        grad_weight = (grad_normal * centered).sum((0, 2, 3))
        grad_x = grad_normal
        if training and x.shape[0] > 0:
            # Ioffe and Szegedy 2015: the batch's mean and variance depend on every element.
            count = x.shape[0] * x.shape[2] * x.shape[3]
            shift = _channel(grad_bias) + centered * _channel(grad_weight)
            grad_x = grad_normal - shift / count
        grad_x = grad_x * _channel(weight.to(dtype) * rstd[scale])
        grads_x.append(in_format_of(grad_x.to(x.dtype), x))
        grads_weight.append(grad_weight.to(weight.dtype))
        grads_bias.append(grad_bias.to(bias.dtype))
    return grads_x, grads_weight, grads_bias


def _channel(values: torch.Tensor) -> torch.Tensor:
    return values[:, None, None]


def _affine(
    x: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
) -> torch.Tensor:
    factor = weight.to(x.dtype) * rstd
    return x * _channel(factor) + _channel(bias.to(x.dtype) - mean * factor)
