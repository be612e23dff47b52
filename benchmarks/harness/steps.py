"""Who takes part in the comparison of whole training steps, and how each is run."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import published_step
from benchmarks.harness.device import Device
from benchmarks.harness.sizes import CLASSES, MAGSD, Draw
from benchmarks.harness.timing import Call
from benchmarks.published_step import PublishedNetwork
from magsd.config import Config, OptimConfig
from magsd.distributed import ALONE, Team
from magsd.methods import method
from magsd.models import ModelConfig, build_model
from magsd.runtime import Runtime
from magsd.training.captured import CapturedStep
from magsd.training.metrics_log import StepSums
from magsd.training.optim import build_optimizer
from magsd.training.train_step import TrainStep, why_not_grouped
from magsd_kernels import fuse_batch_norms

PUBLISHED, OURS, SEPARATE = "published", "ours", "separate"
KEPT = "published, memory kept"
FLOOR, COMPILED = "floor", "compiled floor"
FLOAT32, TF32, BFLOAT16 = "float32", "tf32", "bfloat16"
_PASSES = 4
_REPLAYED_AFTER = 5  # calls: three beside the graph, one that records, one that replays

#: images (B, C, H, W) float32, labels (B,) int64.
Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Member:
    """Someone's step: whose, in which arithmetic and memory format, replayed from a graph or not.

    Ours has fused batch norms and grouped views, "separate" neither. The floor is the backbone
    alone: four forward passes and a backward, without an optimizer. On a CPU all of them keep the
    memory that tensors free, but for the published step, which `KEPT` runs with it kept.
    """

    who: str
    arithmetic: str
    channels_last: bool = False
    captured: bool = False

    def __str__(self) -> str:
        layout = "channels_last" if self.channels_last else "NCHW"
        captured = ", captured" if self.captured else ""
        return f"{self.who}, {self.arithmetic}, {layout}{captured}"

    @property
    def floor(self) -> Member:
        """The bare backbone in the same arithmetic and memory format, captured if this is."""
        return replace(self, who=FLOOR)


#: What every other member is compared with.
BASELINE = Member(PUBLISHED, FLOAT32)


def members(device: str, compiled: bool = True) -> tuple[Member, ...]:
    """All that run on a device, the published step first, the floors last.

    compiled: also the floors of torch.compile.
    """
    settings = ((FLOAT32, True), (BFLOAT16, True))
    found = [BASELINE, Member(PUBLISHED, BFLOAT16)]
    found += [Member(KEPT, FLOAT32)] if device == "cpu" else []
    found.append(Member(OURS, FLOAT32))
    found += [Member(who, *setting) for who in (OURS, SEPARATE) for setting in settings]
    if device == "cuda":
        found += [Member(PUBLISHED, TF32), Member(OURS, TF32, channels_last=True)]
        for arithmetic in (FLOAT32, TF32, BFLOAT16):
            found.append(Member(OURS, arithmetic, channels_last=True, captured=True))
    floors = dict.fromkeys(member.floor for member in found)
    return (*found, *floors, *(Member(COMPILED, *setting) for setting in settings if compiled))


def groups(everyone: Sequence[Member], device: str) -> list[tuple[Member, ...]]:
    """Who is timed in turn with whom.

    On a CPU, whose pace changes, all of one arithmetic are timed together, beside the baseline. A
    GPU keeps its pace, and there each member holds memory, a captured one that of its whole step:
    each is timed with the baseline and its floor alone. Groups with the same floor follow one
    another.
    """
    if device == "cpu":
        arithmetics = dict.fromkeys(member.arithmetic for member in everyone)
        return [
            tuple(m for m in everyone if m == BASELINE or m.arithmetic == arithmetic)
            for arithmetic in arithmetics
        ]
    others = [m for m in everyone if m != BASELINE and m.who != FLOOR]
    others.sort(key=lambda member: everyone.index(member.floor))
    return [(BASELINE, member.floor, member) for member in others]


def networks(backbone: str, device: str) -> dict[str, nn.Module]:
    """By who takes part, untrained, with the same weights; ours as published but for these."""
    torch.manual_seed(0)
    separate = build_model(ModelConfig(backbone=backbone, pretrained=False), CLASSES).to(device)
    published = PublishedNetwork(backbone, CLASSES).to(device)
    published.load_state_dict(separate.state_dict())
    ours = copy.deepcopy(separate)
    fuse_batch_norms(ours)
    ours.takes_groups = why_not_grouped(ours) is None
    return {
        PUBLISHED: published,
        KEPT: published,
        OURS: ours,
        SEPARATE: separate,
        FLOOR: separate.backbone,
        COMPILED: separate.backbone,
    }


def draw_batch(device: Device, batch: int, side: int, seed: int) -> Batch:
    """Random images as smooth as photographs, and random labels."""
    sizes = replace(MAGSD, side=side)
    draw = Draw(sizes, FLOAT32, device.type, seed)
    return draw.normal(batch, *sizes.image), draw.integers(batch, 1, CLASSES)


class GraphPool:
    """Memory that CUDA graphs share of which one runs at a time.

    A graph of next to nothing stays in it: torch may not take the handle of a pool again that all
    graphs have left.
    """

    def __init__(self) -> None:
        self.handle = torch.cuda.graph_pool_handle()
        self._value = torch.zeros(1, device="cuda").add_(1)  # loads the kernel
        self._keeper = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._keeper, self.handle):
            self._value.add_(1)


class Contender:
    """A member with a copy of its network and an optimizer of its own, ready to be called.

    pool: handle of the memory in which captured members record their graphs.
    """

    def __init__(
        self,
        member: Member,
        models: Mapping[str, nn.Module],
        batches: Sequence[Batch],
        pool: Any = None,
    ) -> None:
        self.member = member
        self._batches = batches
        device = batches[0][0].device
        self._runtime = Runtime(device, member.arithmetic, member.channels_last)
        self.model = self._runtime.model(copy.deepcopy(models[member.who]))
        self._generator = torch.Generator(device).manual_seed(0)
        self._numbers = np.random.default_rng(0)
        self._seed = 0
        self._optimizer: torch.optim.Optimizer | None = None
        self._step: Callable[..., object] = self._floor
        if member.who in (PUBLISHED, KEPT):
            self._step = self._published
            self._optimizer = published_step.optimizer(self.model)
        elif member.who in (OURS, SEPARATE):
            fused = member.who == OURS
            step = train_step(self.model, self._runtime, ALONE, member.captured, fused)
            self._step, self._optimizer = step, step.optimizer
        self._settle()
        self._network: Callable[[Tensor], Sequence[Tensor]] = self.model
        if member.who == COMPILED:
            self._network = torch.compile(self.model, dynamic=False)
            self._call(batches[0])
        if member.captured:
            self._capture(device, pool)

    def calls(self) -> list[Call]:
        """What is timed, one call per batch."""
        return [partial(self._call, batch) for batch in self._batches]

    def resident_bytes(self) -> int:
        """Parameters, buffers, gradients and momentum."""
        held = [*self.model.parameters(), *self.model.buffers()]
        held += [p.grad for p in self.model.parameters() if p.grad is not None]
        if self._optimizer is not None:
            for state in self._optimizer.state.values():
                held += [value for value in state.values() if isinstance(value, Tensor)]
        return sum(x.nbytes for x in held)

    def _call(self, batch: Batch) -> None:
        self._seed += 1  # a captured step draws from a seed, all others from a generator
        with self._runtime:
            self._step(*batch, self._seed if self.member.captured else self._generator)

    def _settle(self) -> None:
        """Gradients and momentum as after a step, so that the first call holds what later ones do.

        The step moves the weights by their decay alone, about a millionth.
        """
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        if self._optimizer is not None:
            self._optimizer.step()

    def _capture(self, device: torch.device, pool: Any) -> None:
        """The trainer's own recording of the step; a refusal is an error here, not a slow step."""

        def refused(reason: str) -> None:
            raise RuntimeError(f"{self.member}: {reason}")

        self._step = CapturedStep(self._step, device, refused, pool)
        for _ in range(_REPLAYED_AFTER):
            self._call(self._batches[0])

    def _published(self, images: Tensor, labels: Tensor, *_: Any) -> None:
        assert self._optimizer is not None
        drawing = partial(published_step.draw, generator=self._numbers)
        with self._runtime.autocast():
            loss = published_step.published_step(self.model, images, labels, drawing)
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self._optimizer.step()

    def _floor(self, images: Tensor, *_: Any) -> None:
        with self._runtime.autocast():
            images = self._runtime.images(images)
            maps = [found for _ in range(_PASSES) for found in self._network(images)]
        self.model.zero_grad(set_to_none=True)
        torch.autograd.backward(maps, [torch.ones_like(found) for found in maps])


def train_step(
    model: nn.Module,
    runtime: Runtime,
    team: Team = ALONE,
    captured: bool = False,
    fused: bool = True,
) -> TrainStep:
    """The trainer's own step of MAG-SD with the published settings.

    captured: in a CUDA graph. fused: with fused batch norms and grouped views.
    """
    config, settings = Config(), OptimConfig()
    config.train.views = "grouped" if fused else "separate"
    return TrainStep(
        model,
        build_optimizer(model, settings, capturable=captured),
        method("magsd").objective(config, None),
        runtime,
        clip_norm=settings.clip_norm,
        sums=StepSums(runtime.device, team),
        team=team,
        fuse_norm=fused,
    )


@contextlib.contextmanager
def no_tf32() -> Iterator[None]:
    """Within the context a GPU multiplies float32 as such, also in convolutions.

    torch's own default lets these run in TF32.
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = (matmul.allow_tf32, cudnn.allow_tf32)
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before
