"""Multiscale attention: projections of several feature maps, normalized, resampled and summed.

Source: Li et al., "Multiscale Attention Guided Network for COVID-19 Diagnosis Using Chest X-ray
Images", IEEE JBHI 2021 (arXiv 2012.02278), the MA-Net.
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
    norm_groups,
    uses_batch,
)
from magsd_kernels.backends import select
from magsd_kernels.registry import define

_OPERATION = "multiscale_attention"
_MODES = ("area", "bilinear", "nearest")
_MOST_MAPS = 8
_PARAMETERS = ("weights", "biases", "running_means", "running_vars")

Tensors = Sequence[torch.Tensor]


def resample_attention(
    maps: Tensors,
    size: tuple[int, int] | None = None,
    *,
    mode: str = "area",
    align_corners: bool = False,
    backend: str | None = None,
) -> torch.Tensor:
    """Sum of attention maps resampled to one size.

    Args:
        maps: 1 to 8 tensors (B, M, h_i, w_i) of one floating dtype.
        size: (H, W) of the result; None means the size of the last map.
        mode: "area" (adaptive average pooling), "bilinear" (without antialiasing) or "nearest".
        align_corners: as in `torch.nn.functional.interpolate`; concerns bilinear only.
        backend: name of a backend, see `use_backend`.

    Returns:
        (B, M, H, W), dtype and memory format of maps[0]. Gradients go to every map.
    """
    op = "resample_attention"
    _check_maps(op, "maps", maps)
    height, width = _output_size(op, size, maps)
    _check_mode(op, mode, align_corners)
    backend = select(_OPERATION, backend, maps[0])
    result: torch.Tensor = _resample(list(maps), [height, width], mode, align_corners, backend)
    return result


def multiscale_attention(
    projections: Tensors,
    weights: Tensors,
    biases: Tensors,
    running_means: Tensors,
    running_vars: Tensors,
    size: tuple[int, int] | None = None,
    *,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-3,
    mode: str = "area",
    align_corners: bool = False,
    backend: str | None = None,
) -> torch.Tensor:
    """Sum over scales of resample(relu(batch_norm(projection))).

    Args:
        projections: 1 to 8 tensors (B, M, h_i, w_i) of one floating dtype.
        weights, biases: batch norm's parameters, (M,) a scale; the projections' dtype or float32.
        running_means, running_vars: (M,) a scale, likewise; in training they are updated in
            place, with the unbiased variance, as by `torch.nn.functional.batch_norm`.
        size, mode, align_corners, backend: as for `resample_attention`.
        training: normalize by the batch's statistics instead of the running ones.
        momentum: weight of the batch in the running statistics, 0..1.
        eps: added to the variance, above 0.

    Returns:
        (B, M, H, W), dtype and memory format of projections[0]. Gradients go to projections,
        weights and biases.

    Raises:
        ValueError: also for a scale with one value per channel in training.
    """
    op = "multiscale_attention"
    _check_maps(op, "projections", projections)
    main = projections[0]
    lists = (weights, biases, running_means, running_vars)
    shape, dtypes = (main.shape[1],), (main.dtype, torch.float32)
    for name, values in zip(_PARAMETERS, lists, strict=True):
        check.sequence(op, name, values, len(projections))
    if not check.all_fit([x for values in lists for x in values], shape, dtypes, main):
        for name, values in zip(_PARAMETERS, lists, strict=True):
            check.tensors(op, name, values, shape, dtypes, main)
    height, width = _output_size(op, size, projections)
    _check_mode(op, mode, align_corners)
    check.flag(op, "training", training)
    check.number(op, "momentum", momentum, 0, 1)
    check.number(op, "eps", eps, 0)
    if eps == 0:
        raise ValueError(f"{op}: eps must be above 0, got {eps}")
    if training:
        for i, x in enumerate(projections):
            if x.numel() == shape[0]:
                raise ValueError(
                    f"{op}: projections[{i}] must have more than one value per channel in "
                    f"training, got shape {tuple(x.shape)}"
                )
    backend = select(_OPERATION, backend, main)
    attention: torch.Tensor = _multiscale(
        list(projections), list(weights), list(biases), list(running_means), list(running_vars),
        [height, width], training, momentum, eps, mode, align_corners, backend,
    )[0]  # fmt: skip
    return attention


class MultiscaleAttention(GroupAware, nn.Module):
    """1x1 convolution without bias and batch norm per scale, ReLU, resample, sum.

    Args:
        in_channels: channels of each feature map, one entry per scale (1 to 8).
        num_maps: M, the attention maps.
        size: (H, W) of the result; None means the size of the last feature map.
        mode: resampling, see `resample_attention`.
        eps, momentum: of the batch norms.

    Shapes: forward takes one (B, in_channels[i], h_i, w_i) per scale, returns (B, M, H, W).

    The batch norms are submodules. One that is not a plain `nn.BatchNorm2d` with running
    statistics and parameters (after `SyncBatchNorm` conversion, say), or that has hooks or
    another mode than the layer, runs unfused, with the same meaning. Within `norm_groups` each part
    of the batch is normalized by itself.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        num_maps: int = 32,
        *,
        size: tuple[int, int] | None = None,
        mode: str = "area",
        eps: float = 1e-3,
        momentum: float = 0.1,
    ) -> None:
        super().__init__()
        if not 1 <= len(in_channels) <= _MOST_MAPS:
            raise ValueError(
                f"MultiscaleAttention: in_channels must have 1 to {_MOST_MAPS} entries, "
                f"got {len(in_channels)}"
            )
        check.choice("MultiscaleAttention", "mode", mode, _MODES)
        self.num_maps = num_maps
        self.size = size
        self.mode = mode
        self.projections = nn.ModuleList(
            nn.Conv2d(channels, num_maps, 1, bias=False) for channels in in_channels
        )
        self.norms = nn.ModuleList(
            nn.BatchNorm2d(num_maps, eps=eps, momentum=momentum) for _ in in_channels
        )

    def forward(self, features: Tensors, size: tuple[int, int] | None = None) -> torch.Tensor:
        """One feature map per scale -> attention (B, M, H, W); `size` replaces the layer's own."""
        size = self.size if size is None else size
        check.sequence("MultiscaleAttention", "features", features, len(self.projections))
        projections = [project(x) for project, x in zip(self.projections, features, strict=True)]
        groups = current_groups()
        if groups == 1 or not any(uses_batch(norm) for norm in self.norms):
            return self._attention(projections, size)
        parts = zip(*(_parts(x, groups) for x in projections), strict=True)
        with norm_groups(1):
            return torch.cat([self._attention(part, size) for part in parts])

    def _attention(self, projections: Tensors, size: tuple[int, int] | None) -> torch.Tensor:
        """Of one group of the batch."""
        norms: list[Any] = list(self.norms)
        if not all(_fusible(norm, norms[0]) for norm in norms):
            maps = [torch.relu(norm(x)) for norm, x in zip(norms, projections, strict=True)]
            return resample_attention(maps, size, mode=self.mode)
        for norm in norms:
            count_batches(norm, 1)
        return multiscale_attention(
            projections,
            [norm.weight for norm in norms],
            [norm.bias for norm in norms],
            [norm.running_mean for norm in norms],
            [norm.running_var for norm in norms],
            size,
            training=norms[0].training,
            momentum=norms[0].momentum,
            eps=norms[0].eps,
            mode=self.mode,
        )

    def extra_repr(self) -> str:
        """The settings that submodules do not show."""
        return f"num_maps={self.num_maps}, size={self.size}, mode={self.mode!r}"


def _fusible(norm: Any, first: Any) -> bool:
    """Whether the op does exactly what calling the batch norm, one of several, would do."""
    return fusible(norm) and all(
        getattr(norm, name) == getattr(first, name) for name in ("training", "momentum", "eps")
    )


def _parts(x: torch.Tensor, groups: int) -> tuple[torch.Tensor, ...]:
    if x.shape[0] % groups:
        raise ValueError(
            f"MultiscaleAttention: groups must divide the batch of {x.shape[0]}, got {groups}"
        )
    return x.chunk(groups)


def _check_maps(op: str, name: str, maps: Any) -> None:
    check.sequence(op, name, maps)
    if not 1 <= len(maps) <= _MOST_MAPS:
        raise ValueError(f"{op}: {name} must have 1 to {_MOST_MAPS} entries, got {len(maps)}")
    main = maps[0]
    check.tensor(op, f"{name}[0]", main, check.IMAGES)
    if len(maps) > 1:
        shape = (*main.shape[:2], *check.IMAGES[2:])
        check.tensors(op, name, maps[1:], shape, (main.dtype,), main, first=1)


def _check_mode(op: str, mode: Any, align_corners: Any) -> None:
    check.choice(op, "mode", mode, _MODES)
    check.flag(op, "align_corners", align_corners)


def _output_size(op: str, size: Any, maps: Tensors) -> tuple[int, int]:
    if size is None:
        return maps[-1].shape[2], maps[-1].shape[3]
    return check.size(op, size)


def _fake_result(main: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    batch, channels = main.shape[:2]
    if is_channels_last(main):
        return main.new_empty((batch, *size, channels)).movedim(-1, -3)
    return main.new_empty((batch, channels, *size))


def _resample_fake(
    maps: Tensors, size: Sequence[int], mode: str, align_corners: bool, backend: str
) -> torch.Tensor:
    return _fake_result(maps[0], size)


def _resample_backward_fake(
    grad: torch.Tensor,
    heights: Sequence[int],
    widths: Sequence[int],
    mode: str,
    align_corners: bool,
    backend: str,
) -> list[torch.Tensor]:
    return [_fake_result(grad, size) for size in zip(heights, widths, strict=True)]


def _multiscale_fake(
    projections: Tensors, weights: Tensors, biases: Tensors, running_means: Tensors,
    running_vars: Tensors, size: Sequence[int], *_: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    main = projections[0]
    statistics = (len(projections), main.shape[1])
    dtype = accumulation_dtype(main.dtype)
    return (
        _fake_result(main, size),
        main.new_empty(statistics, dtype=dtype),
        main.new_empty(statistics, dtype=dtype),
    )


def _multiscale_backward_fake(
    grad: torch.Tensor, projections: Tensors, weights: Tensors, biases: Tensors, *_: Any
) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    return (
        [empty_like_format(x) for x in projections],
        [torch.empty_like(weight) for weight in weights],
        [torch.empty_like(bias) for bias in biases],
    )


def _running_statistics(inputs: Any) -> list[torch.Tensor]:
    """What a call writes to."""
    return [*inputs.running_means, *inputs.running_vars] if inputs.training else []


def _keep_resample(ctx: Any, inputs: Any, output: torch.Tensor) -> None:
    ctx.settings = {
        "heights": [m.shape[2] for m in inputs.maps],
        "widths": [m.shape[3] for m in inputs.maps],
        "resampling": inputs.resampling,
        "align_corners": inputs.align_corners,
        "backend": inputs.backend,
    }
    ctx.channels_last = [is_channels_last(m) for m in inputs.maps]


def _differentiate_resample(ctx: Any, grad: torch.Tensor) -> dict[str, Any]:
    grads = _resample_backward(grad, **ctx.settings)
    return {"maps": [dense(g, last) for g, last in zip(grads, ctx.channels_last, strict=True)]}


def _keep_multiscale(ctx: Any, inputs: Any, output: tuple[torch.Tensor, ...]) -> None:
    _, mean, rstd = output
    ctx.save_for_backward(mean, rstd, *inputs.projections, *inputs.weights, *inputs.biases)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    names = ("training", "resampling", "align_corners", "backend")
    ctx.settings = {name: getattr(inputs, name) for name in names}


def _differentiate_multiscale(ctx: Any, grad: torch.Tensor | None, *_: Any) -> dict[str, Any]:
    if grad is None:
        return {}
    mean, rstd, *tensors = ctx.saved_tensors
    scales = len(tensors) // 3
    projections, weights, biases = (tensors[i : i + scales] for i in range(0, len(tensors), scales))
    grads = _multiscale_backward(grad, projections, weights, biases, mean, rstd, **ctx.settings)
    return dict(zip(("projections", "weights", "biases"), grads, strict=True))


_resample = define(
    _OPERATION,
    "resample_attention(Tensor[] maps, SymInt[] size, str resampling, bool align_corners,"
    " str backend) -> Tensor",
    _resample_fake,
    setup_context=_keep_resample,
    backward=_differentiate_resample,
)
_resample_backward = define(
    _OPERATION,
    "resample_attention_backward(Tensor grad, SymInt[] heights, SymInt[] widths, str resampling,"
    " bool align_corners, str backend) -> Tensor[]",
    _resample_backward_fake,
)
# `resampling`: torch's functionalization of mutable operators keeps the name `mode` to itself.
_multiscale = define(
    _OPERATION,
    "multiscale_attention(Tensor[] projections, Tensor[] weights, Tensor[] biases,"
    " Tensor(a!)[] running_means, Tensor(b!)[] running_vars, SymInt[] size, bool training,"
    " float momentum, float eps, str resampling, bool align_corners, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    _multiscale_fake,
    setup_context=_keep_multiscale,
    backward=_differentiate_multiscale,
    written=_running_statistics,
)
_multiscale_backward = define(
    _OPERATION,
    "multiscale_attention_backward(Tensor grad, Tensor[] projections, Tensor[] weights,"
    " Tensor[] biases, Tensor mean, Tensor rstd, bool training, str resampling, bool align_corners,"
    " str backend) -> (Tensor[], Tensor[], Tensor[])",
    _multiscale_backward_fake,
)
