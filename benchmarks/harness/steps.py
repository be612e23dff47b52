"""Who takes part in the comparison of whole training steps, and how each is run."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import published_step
from benchmarks.harness.device import Device
from benchmarks.harness.sizes import CLASSES, Draw
from benchmarks.harness.sizes import MAGSD as SIZES
from benchmarks.published_step import PublishedNetwork
from magsd.config import Config, OptimConfig
from magsd.distributed import ALONE, Team
from magsd.methods import method
from magsd.models import MAGSD, ModelConfig, build_model
from magsd.runtime import Runtime
from magsd.training.metrics_log import StepSums
from magsd.training.optim import build_optimizer
from magsd.training.train_step import TrainStep

PUBLISHED, OURS, FLOOR = "published", "ours", "floor"
FLOAT32, TF32, BFLOAT16 = "float32", "tf32", "bfloat16"
_PASSES = 4
_CAPTURED = "magsd.training.captured"
_REPLAYED_AFTER = 5  # calls: three beside the graph, one that records, one that replays

#: images (B, C, H, W) float32, labels (B,) int64.
Batch = tuple[Tensor, Tensor]
Call = Callable[[], None]


@dataclass(frozen=True)
class Member:
    """Someone's step: whose, in which arithmetic and memory format, replayed from a graph or not.

    The floor is the backbone alone: four forward passes and a backward, without an optimizer.
    """

    who: str
    arithmetic: str
    channels_last: bool = False
    captured: bool = False

    def __str__(self) -> str:
        layout = "channels_last" if self.channels_last else "NCHW"
        captured = ", captured" if self.captured else ""
        return f"{self.who}, {self.arithmetic}, {layout}{captured}"


#: What every other member is compared with.
BASELINE = Member(PUBLISHED, FLOAT32)


def members(device: str) -> tuple[Member, ...]:
    """All that run on a device, the published step first."""
    everywhere = (
        BASELINE,
        Member(PUBLISHED, BFLOAT16),
        Member(OURS, FLOAT32),
        Member(OURS, FLOAT32, channels_last=True),
        Member(OURS, BFLOAT16, channels_last=True),
        Member(FLOOR, FLOAT32),
        Member(FLOOR, BFLOAT16, channels_last=True),
    )
    if device != "cuda":
        return everywhere
    tf32 = (
        Member(PUBLISHED, TF32),
        Member(OURS, TF32, channels_last=True),
        Member(FLOOR, TF32, channels_last=True),
    )
    if find_spec(_CAPTURED) is None:
        return everywhere + tf32
    replayed = tuple(
        Member(who, arithmetic, channels_last=True, captured=True)
        for who in (OURS, FLOOR)
        for arithmetic in (FLOAT32, TF32, BFLOAT16)
    )
    return everywhere + tf32 + replayed


def floor_of(member: Member, among: Sequence[Member]) -> Member:
    """The bare backbone in the member's arithmetic, captured if the member is."""
    wanted = (FLOOR, member.arithmetic, member.captured)
    (found,) = (other for other in among if (other.who, other.arithmetic, other.captured) == wanted)
    return found


def groups(everyone: Sequence[Member], device: str) -> dict[tuple[Member, ...], list[Member]]:
    """Who is timed in turn with whom, and for whom that gives the figures.

    On a CPU, whose pace changes, all are timed together. A GPU keeps its pace, and there each
    member holds memory, a captured one that of its whole step: each is timed with the baseline and
    its floor alone. A member is in one group, or in several that follow one another.
    """
    if device == "cpu":
        return {tuple(everyone): list(everyone)}
    found: dict[tuple[Member, ...], list[Member]] = {}
    for floor in dict.fromkeys(floor_of(member, everyone) for member in everyone):
        for member in everyone:
            if floor_of(member, everyone) == floor:
                group = tuple(dict.fromkeys((BASELINE, floor, member)))
                found.setdefault(group, []).append(member)
    return found


def network(backbone: str, classes: int, device: str) -> MAGSD:
    """Ours, untrained, as published but for the weights, from which all members start."""
    torch.manual_seed(0)
    model = build_model(ModelConfig(backbone=backbone, pretrained=False), classes)
    assert isinstance(model, MAGSD)
    return model.to(device)


def published_network(model: MAGSD, backbone: str) -> PublishedNetwork:
    """The published one with the same weights, on the same device."""
    device = model.head.weight.device
    found = PublishedNetwork(backbone, model.num_classes, in_channels=model.in_channels)
    found.load_ours(model.state_dict())
    return found.to(device)


def draw_batch(device: Device, batch: int, side: int, seed: int) -> Batch:
    """Random images as smooth as photographs, and random labels."""
    sizes = replace(SIZES, side=side)
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
    """A member with a model and an optimizer of its own, ready to be called.

    pool: handle of the memory in which captured members record their graphs.
    """

    def __init__(
        self,
        member: Member,
        model: MAGSD,
        backbone: str,
        batches: Sequence[Batch],
        pool: Any = None,
    ) -> None:
        self.member = member
        self._batches = batches
        device = batches[0][0].device
        self._runtime = Runtime(device, member.arithmetic, member.channels_last)
        self._generator = torch.Generator(device).manual_seed(0)
        self._numbers = np.random.default_rng(0)
        self._seed = 0
        self._optimizer: torch.optim.Optimizer | None = None
        self._body: Callable[..., object]
        if member.who == FLOOR:
            self._model: nn.Module = self._runtime.model(copy.deepcopy(model.backbone))
            self._body = self._floor
        elif member.who == PUBLISHED:
            self._model = self._runtime.model(published_network(model, backbone))
            self._optimizer = published_step.optimizer(self._model)
            self._body = self._published
        else:
            self._model = self._runtime.model(copy.deepcopy(model))
            step = train_step(self._model, self._runtime, captured=member.captured)
            self._body, self._optimizer = step, step.optimizer
        self._settle()
        self._captured = self._capture(device, pool) if member.captured else None

    def calls(self) -> list[Call]:
        """What is timed, one call per batch."""
        return [partial(self._call, batch) for batch in self._batches]

    def resident_bytes(self) -> int:
        """Parameters, buffers, gradients and momentum."""
        held = [*self._model.parameters(), *self._model.buffers()]
        held += [p.grad for p in self._model.parameters() if p.grad is not None]
        if self._optimizer is not None:
            for state in self._optimizer.state.values():
                held += [value for value in state.values() if isinstance(value, Tensor)]
        return sum(x.nbytes for x in held)

    def _call(self, batch: Batch) -> None:
        with no_tf32(), self._runtime:
            if self._captured is None:
                self._body(*batch, self._generator)
            else:
                self._seed += 1
                self._captured(*batch, self._seed)

    def _settle(self) -> None:
        """Gradients and momentum as after a step, so that the first call holds what later ones do.

        The step moves the weights by their decay alone, about a millionth.
        """
        for parameter in self._model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        if self._optimizer is not None:
            self._optimizer.step()

    def _capture(self, device: torch.device, pool: Any) -> Callable[[Tensor, Tensor, int], object]:
        """The trainer's own recording of the step; a refusal is an error here, not a slow step."""
        from magsd.training.captured import CapturedStep

        def refused(reason: str) -> None:
            raise RuntimeError(f"{self.member}: {reason}")

        step = CapturedStep(self._body, device, refused, pool)
        with no_tf32(), self._runtime:
            for seed in range(_REPLAYED_AFTER):
                step(*self._batches[0], seed)
        return step

    def _published(self, images: Tensor, labels: Tensor, *_: Any) -> None:
        assert self._optimizer is not None
        drawing = partial(published_step.draw, generator=self._numbers)
        with self._runtime.autocast():
            loss = published_step.published_step(self._model, images, labels, drawing)
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self._optimizer.step()

    def _floor(self, images: Tensor, *_: Any) -> None:
        with self._runtime.autocast():
            images = self._runtime.images(images)
            maps = [found for _ in range(_PASSES) for found in self._model(images)]
        self._model.zero_grad(set_to_none=True)
        torch.autograd.backward(maps, [torch.ones_like(found) for found in maps])


def train_step(
    model: nn.Module, runtime: Runtime, team: Team = ALONE, *, captured: bool = False
) -> TrainStep:
    """The trainer's own step of MAG-SD with the published settings; captured: in a CUDA graph."""
    settings = OptimConfig()
    return TrainStep(
        model,
        build_optimizer(model, settings, capturable=captured),
        method("magsd").objective(Config(), None),
        runtime,
        clip_norm=settings.clip_norm,
        sums=StepSums(runtime.device, team),
        team=team,
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
