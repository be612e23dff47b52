"""Batch norms of modules: what the fused operations can replace, and groups of a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from magsd_kernels import _checks as check
from magsd_kernels._blocks import Block, OpenBlocks

_groups = OpenBlocks()


class norm_groups(Block):
    """Context manager: fused batch norms inside normalize each of `groups` parts of a batch alone.

    In training each part, of as many images as the others and in their order, has statistics of its
    own, and the running statistics are updated once a part: as if the parts were passed one by one.
    Concerns `BatchNormAct`, `MultiscaleAttention` and what `fuse_batch_norms` has changed, no other
    module. Holds for the current thread and nests. What runs after the block, as activation
    checkpointing does in the backward, must open it again.
    """

    def __init__(self, groups: int) -> None:
        check.count("norm_groups", "groups", groups)
        super().__init__(_groups, groups)


def current_groups() -> int:
    """The number of the innermost `norm_groups`, 1 outside of all."""
    return _groups.values[-1] if _groups.values else 1


class GroupAware:
    """Mark of modules that normalize by `norm_groups` themselves, with the norms inside them."""


class PlainNorm(GroupAware):
    """Mark of group-aware modules that compute what `nn.BatchNorm2d` computes."""


def regular(norm: Any) -> bool:
    """Whether a batch norm has what the operations take: parameters, statistics, a momentum."""
    return (
        norm.weight is not None
        and norm.bias is not None
        and norm.track_running_stats
        and norm.running_mean is not None
        and norm.momentum is not None
    )


def uses_batch(norm: Any) -> bool:
    """Whether a batch norm normalizes by the batch's statistics and not by the running ones."""
    return norm.training or getattr(norm, "running_mean", None) is None


def unhooked(module: Any) -> bool:
    """Whether calling a module runs its forward alone."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def fusible(norm: Any) -> bool:
    """Whether an operation does exactly what calling the batch norm would do."""
    return (
        (type(norm) is nn.BatchNorm2d or isinstance(norm, PlainNorm))
        and regular(norm)
        and unhooked(norm)
    )


def count_batches(norm: Any, groups: int) -> None:
    """Add what a call in training adds to the number of batches."""
    if norm.training and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(groups)


def each_group(
    norm: nn.Module, call: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, groups: int
) -> torch.Tensor:
    """`call`, which runs the batch norm, of each part of the batch in order, put together again."""
    if groups == 1 or not uses_batch(norm):
        return call(x)
    if x.shape[0] % groups:
        raise ValueError(f"groups must divide the batch of {x.shape[0]}, got {groups}")
    return torch.cat([call(part) for part in x.chunk(groups)])


def normalized(norm: nn.Module, x: torch.Tensor, groups: int) -> torch.Tensor:
    """norm(x) by the module itself, which need not know of groups."""
    if isinstance(norm, GroupAware) or not isinstance(norm, _BatchNorm):
        with norm_groups(groups):
            result: torch.Tensor = norm(x)
        return result
    return each_group(norm, norm, x, groups)
