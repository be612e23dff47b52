"""A whole step of training, the one that the trainer takes, a CUDA graph holds, benchmarks time."""

from __future__ import annotations

import gc
import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from magsd.data import Batch
from magsd.distributed import ALONE, Team, synchronize_batchnorm
from magsd.models import Classifier
from magsd.models.backbone import draws
from magsd.runtime import Runtime
from magsd.training.metrics_log import StepSums
from magsd.training.optim import load_optimizer
from magsd.training.step import BatchShard, StepFunction, StepResult
from magsd_kernels import fuse_batch_norms
from magsd_kernels.norm_fusion import ungrouped_norms

# No buffers are given out before each forward; torch 2.14 renamed the argument.
_KEEP_BUFFERS: dict[str, Any] = {
    "forward_sync_buffers"
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    else "broadcast_buffers": False
}


class TrainStep:
    """Forward passes, loss, backward, clipping of gradients and the optimizer.

    model: where `runtime` puts it. optimizer: of its parameters; a fused one, so that in float16,
    too, a step reads nothing back and a CUDA graph can hold it. objective: forward passes and loss.
    clip_norm: largest norm of all gradients together. sums: where the losses are added up.
    team: processes that average their gradients; the first step gives the weights and buffers of
    the main process to all. sync_batchnorm: batch statistics are those of all of them; the model's
    batch norms are converted in place. fuse_norm: its batch norms run in one operation with what
    follows them, see `fuse_batch_norms`.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        objective: StepFunction,
        runtime: Runtime,
        *,
        clip_norm: float | None = None,
        sums: StepSums | None = None,
        team: Team = ALONE,
        sync_batchnorm: bool = False,
        fuse_norm: bool = False,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.objective = objective
        self.runtime = runtime
        self.clip_norm = clip_norm
        self.sums = sums
        self.team = team
        self.scaler = runtime.grad_scaler()
        if sync_batchnorm and team.size > 1:
            synchronize_batchnorm(model)
        if fuse_norm:
            fuse_batch_norms(model)
        #: Why views cannot pass as one batch of several groups, or None.
        self.ungrouped = why_not_grouped(model)
        if isinstance(model, Classifier):
            model.takes_groups = self.ungrouped is None
        self._data_parallel: DistributedDataParallel | None = None
        self._start_momentum()

    def __call__(
        self,
        images: Tensor,
        labels: Tensor,
        generator: torch.Generator | None,
        shard: BatchShard | None = None,
    ) -> StepResult:
        """One step over images (B, C, H, W) and labels (B,) int64.

        generator: of everything that the objective draws. shard: which part of the whole batch
        this is, where a team takes the step together. The losses carry no gradient any more.
        """
        with_model = self._connected() if self.team.size > 1 else None
        with self.runtime.autocast():
            images = self.runtime.images(images)
            result: StepResult = (
                self.objective(self.model, images, labels, generator, shard)
                if with_model is None
                else with_model(images, labels, generator, shard)
            )
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(result.loss).backward()
        if self.clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.sums is not None:
            # A shard's losses carry its factors; their mean over the processes is the batch's.
            weight = None if shard is None else shard.part.total / self.team.size
            self.sums.add(result, len(labels), weight)
        return result._replace(loss=result.loss.detach())

    def state_dict(self) -> dict[str, Any]:
        """State of the optimizer and of the scale of float16's losses."""
        return {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`, also of a state from another precision."""
        load_optimizer(self.optimizer, state["optimizer"])
        if self.scaler.is_enabled() and state.get("scaler"):
            self.scaler.load_state_dict(state["scaler"])
        self._start_momentum()

    def reset(self) -> None:
        """Forget a step that failed half way, as in a CUDA graph that could not be captured."""
        scale = self.scaler.state_dict()
        self.scaler = self.runtime.grad_scaler()
        if scale:
            self.scaler.load_state_dict(scale)
        self._data_parallel = None
        gc.collect()  # it stands in cycles, and would still listen for gradients

    def _connected(self) -> DistributedDataParallel:
        """The objective with gradients averaged over the team.

        Made at the first step, since the nodes that gather gradients belong to the stream on which
        they are made.
        """
        if self._data_parallel is None:
            self.team.broadcast_buffers(self.model)
            self._data_parallel = DistributedDataParallel(
                _ObjectiveOf(self.model, self.objective),
                gradient_as_bucket_view=True,
                # The same parameters take part in every step.
                static_graph=True,
                **_KEEP_BUFFERS,
            )
        return self._data_parallel

    def _start_momentum(self) -> None:
        """Let momentum be 0 before the first step where that step may be skipped.

        torch's fused SGD makes the buffers in its first step and leaves them unwritten where the
        scaled gradients overflow.
        """
        if not self.scaler.is_enabled():
            return
        for group in self.optimizer.param_groups:
            if group.get("momentum"):
                for parameter in group["params"]:
                    self.optimizer.state[parameter].setdefault(
                        "momentum_buffer", torch.zeros_like(parameter)
                    )


class _ObjectiveOf(nn.Module):
    """All forward passes of a step as one: DistributedDataParallel wants one per backward."""

    def __init__(self, model: nn.Module, objective: StepFunction) -> None:
        super().__init__()
        self.model = model
        self.objective = objective

    def forward(
        self,
        images: Tensor,
        labels: Tensor,
        generator: torch.Generator | None,
        shard: BatchShard | None,
    ) -> StepResult:
        return self.objective(self.model, images, labels, generator, shard)


def why_not_grouped(model: nn.Module) -> str | None:
    """Why several batches cannot pass a model as one within `norm_groups`, or None.

    As one they must give what they give one after the other, in training.
    """
    if draws(model):
        return "dropout or stochastic depth would be drawn otherwise"
    norms = ungrouped_norms(model)
    if norms:
        more = f" and {len(norms) - 1} more" if len(norms) > 1 else ""
        return f"the batch statistics of {norms[0]}{more} would be those of all views"
    # Such a model runs its parts again in the backward, outside of the groups.
    for name, module in model.named_modules():
        if any(getattr(module, key, False) for key in ("grad_checkpointing", "memory_efficient")):
            return f"{name} computes its activations again by itself"
    return None


def shard_of(
    batch: Batch, team: Team, class_weights: Tensor | None, labels: list[int] | None
) -> BatchShard:
    """What this process of a team has of a batch.

    class_weights: (K,) float64 on the host, of the cross entropy; None: all alike. labels: of the
    whole batch; None where they are not known here: then the processes add up what theirs weigh,
    which waits for the others but for no device.
    DistributedDataParallel divides the sum of gradients by the number of processes, and each
    process's own losses are means over its part; the factors undo both.
    """
    images, (first, total) = len(batch.indices), batch.part
    fraction = images / total
    if class_weights is not None:
        if labels is not None:
            each = class_weights[labels]
            here, whole = each[first : first + images].sum(), each.sum()
        else:
            here = class_weights[batch.host_labels].sum()
            whole = team.all_reduce(here.clone())
        fraction = float(here / whole) if whole else 0.0  # a batch may weigh nothing
    distance = team.size * images / total
    return BatchShard(batch.part, team.size * fraction, distance, team.all_reduce)
