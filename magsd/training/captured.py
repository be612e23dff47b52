"""A training step captured in a CUDA graph and replayed: one launch where there were thousands.

The first steps run eagerly, on a stream of their own, so that libraries have chosen their
algorithms and the optimizer has its state; the next one is captured, and every later one replayed.
Each is a real step of the training. A batch of another shape, as the last of an epoch may be, runs
eagerly. Where capture fails the run continues without a graph and prints the reason once.

Processes that train together capture the exchange of gradients with the rest (NCCL). What one of
them launches in a graph the others must, too: so they decide by the whole batch, which all know,
and agree on whether the capture went well.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from magsd.data import Part
from magsd.distributed import ALONE, Team
from magsd.training.step import BatchShard

#: Device types on which a step can be captured.
CAPTURE_DEVICES = frozenset(("cuda",))

_STEPS_BEFORE = 3
# DistributedDataParallel times its first ten steps and every hundredth with events, and reads them
# in the step after, which no graph can hold.
_TEAM_STEPS_BEFORE = 11
_TIMED_EVERY = 100

R = TypeVar("R")


class CapturedStep(Generic[R]):
    """`step(images, labels, generator, shard)` on a CUDA device, captured when its shapes settle.

    The step must not wait for the device, and may depend on nothing that changes between calls
    but the device's memory: a learning rate, say, must be a tensor. What it returns lies in the
    same memory at every replay. warn: takes the one line that says why there is no graph. pool: of
    memory that several steps share of which one runs at a time (torch.cuda.graph_pool_handle);
    None: of its own. team: processes that take the step together. reset: called where capture
    failed, which may have left the step half way.
    """

    def __init__(
        self,
        step: Callable[[Tensor, Tensor, torch.Generator, BatchShard | None], R],
        device: torch.device,
        warn: Callable[[str], None],
        pool: Any = None,
        *,
        team: Team = ALONE,
        reset: Callable[[], None] = lambda: None,
    ) -> None:
        self._step = step
        self._device = device
        self._warn = warn
        self._pool = pool
        self._team = team
        self._reset = reset
        self._stream = torch.cuda.Stream(device)
        self._generator = torch.Generator(device)
        self._factor = torch.ones((), device=device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._result: R
        self._failed = False
        self._form: tuple[torch.Size, Part | None] | None = None
        self._settled = 0
        self._eager_steps = 0

    @property
    def captured(self) -> bool:
        """True once there is a graph to replay."""
        return self._graph is not None

    def __call__(
        self, images: Tensor, labels: Tensor, seed: int, shard: BatchShard | None = None
    ) -> R:
        """One step; `seed` is that of everything drawn in it.

        shard: which images of the whole batch these are, where others have the rest.
        """
        form = (images.shape, None if shard is None else shard.part)
        shard = self._with_factor_on_device(shard)
        self._generator.manual_seed(seed)
        if self._failed:
            return self._step(images, labels, self._generator, shard)
        if self._graph is not None:
            if form != self._form:
                return self._run_eagerly(images, labels, shard)
            self._images.copy_(images)
            self._labels.copy_(labels)
            self._graph.replay()
            return self._result
        if form != self._form or not self._is_warm():
            self._settled = 1 if form != self._form else self._settled + 1
            self._form = form
            return self._run_eagerly(images, labels, shard)
        graph = self._capture(images, labels, shard)
        if graph is not None:
            self._graph = graph
            graph.replay()
            return self._result
        self._generator = torch.Generator(images.device).manual_seed(seed)
        return self._step(images, labels, self._generator, shard)

    def _with_factor_on_device(self, shard: BatchShard | None) -> BatchShard | None:
        """The shard, what changes in it from step to step where a replay reads it."""
        if shard is None:
            return None
        self._factor.fill_(shard.cross_entropy)
        return shard._replace(cross_entropy=self._factor)

    @contextlib.contextmanager
    def _on_capture_stream(self) -> Iterator[None]:
        """Work on the stream on which the step is captured, after what the current one has to do.

        The nodes that gather gradients belong to the stream on which they were made.
        """
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            yield
        current.wait_stream(self._stream)

    def _is_warm(self) -> bool:
        if self._team.size == 1:
            return self._settled >= _STEPS_BEFORE
        run = self._eager_steps
        timed = {run % _TIMED_EVERY, (run + 1) % _TIMED_EVERY}
        return self._settled >= _STEPS_BEFORE and run >= _TEAM_STEPS_BEFORE and 0 not in timed

    def _run_eagerly(self, images: Tensor, labels: Tensor, shard: BatchShard | None) -> R:
        with self._on_capture_stream():
            result = self._step(images, labels, self._generator, shard)
        self._eager_steps += 1
        return result

    def _capture(
        self, images: Tensor, labels: Tensor, shard: BatchShard | None
    ) -> torch.cuda.CUDAGraph | None:
        """The graph of a step, or None where one of the processes cannot capture its own."""
        self._images, self._labels = images.clone(), labels.clone()
        graph = torch.cuda.CUDAGraph()
        _register(graph, self._generator)
        reason = None
        default = _default_generator(self._device)
        before = None if default is None else default.clone_state()
        try:
            # Other threads, which bring the next images or watch over NCCL, may go on meanwhile.
            with torch.cuda.graph(
                graph, self._pool, self._stream, capture_error_mode="thread_local"
            ):
                self._result = self._step(self._images, self._labels, self._generator, shard)
        except RuntimeError as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if not self._team.all_reduce_max(int(reason is not None)):
            return graph
        self._failed = True
        torch.cuda.synchronize(self._device)
        if default is not None and before is not None:
            # A capture that fails leaves its state as one that captures still.
            default.graphsafe_set_state(before)
        reason = reason or "another process could not capture its step"
        self._warn(f"training without a CUDA graph: {reason}")
        self._reset()
        return None


def _register(graph: torch.cuda.CUDAGraph, generator: torch.Generator) -> None:
    """Let a graph draw anew from a generator in each replay; newer torch does so by itself."""
    register = getattr(graph, "register_generator_state", None)
    if register is not None:
        with warnings.catch_warnings():  # torch 2.14: deprecated, and does nothing
            warnings.filterwarnings("ignore", message=r".*register_generator_state")
            register(generator)


def _default_generator(device: torch.device) -> torch.Generator | None:
    """The one from which dropout draws on a GPU; None before CUDA is in use."""
    generators = torch.cuda.default_generators
    if not generators:
        return None
    index = torch.cuda.current_device() if device.index is None else device.index
    return generators[index]
