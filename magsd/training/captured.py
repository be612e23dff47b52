"""A training step recorded in a CUDA graph and replayed: one launch where there were thousands.

The first steps run as they are, on a stream of their own, so that libraries have chosen their
algorithms and the optimizer has its state; the next one is recorded, and every later one replayed.
Each is a real step of the training. A batch of another shape, as the last of an epoch may be, runs
as it is. Where recording fails the run continues without a graph and prints the reason once.

Processes that train together record the exchange of gradients with the rest (NCCL). What one of
them launches in a graph the others must, too: so they decide by the whole batch, which all know,
and agree on whether the recording went well.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from magsd.data import Part
from magsd.training.distributed import ALONE, Team

#: Device types on which a step can be recorded.
RECORDED_ON = frozenset(("cuda",))

_STEPS_BEFORE = 3
# DistributedDataParallel times its first ten steps and every hundredth with events, and reads them
# in the step after, which no graph can hold.
_JOINED_STEPS_BEFORE = 11
_TIMED_EVERY = 100

Body = Callable[[Tensor, Tensor, torch.Generator], None]


class CapturedStep:
    """`body(images, labels, generator)` on a CUDA device, captured when its shapes have settled.

    The body must not wait for the device, and may depend on nothing that changes between steps
    but the device's memory: a learning rate, say, must be a tensor. report: takes the one line
    that says why there is no graph. pool: of memory that several steps share of which one runs at
    a time (torch.cuda.graph_pool_handle); None: of its own. team: who takes the step together;
    what joins them is made `beside`. begin_again: called where recording failed, which may have
    left that half way.
    """

    def __init__(
        self,
        body: Body,
        device: torch.device,
        report: Callable[[str], None],
        pool: Any = None,
        *,
        team: Team = ALONE,
        begin_again: Callable[[], None] = lambda: None,
    ) -> None:
        self._body = body
        self._device = device
        self._report = report
        self._pool = pool
        self._team = team
        self._begin_again = begin_again
        self._stream = torch.cuda.Stream(device)
        self._generator = torch.Generator(device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._refused = False
        self._form: tuple[torch.Size, Part | None] | None = None
        self._steps = 0
        self._runs = 0

    def __call__(self, images: Tensor, labels: Tensor, seed: int, part: Part | None = None) -> None:
        """One step; `seed` is that of everything drawn in it.

        part: which images of the whole batch these are, where others have the rest.
        """
        form = (images.shape, part)
        self._generator.manual_seed(seed)
        if self._refused:
            self._body(images, labels, self._generator)
        elif self._graph is not None:
            if form == self._form:
                self._images.copy_(images)
                self._labels.copy_(labels)
                self._graph.replay()
            else:
                self._run_beside(images, labels)
        elif form != self._form or not self._is_warm():
            self._steps = 1 if form != self._form else self._steps + 1
            self._form = form
            self._run_beside(images, labels)
        elif self._capture(images, labels):
            assert self._graph is not None
            self._graph.replay()
        else:
            self._generator = torch.Generator(images.device).manual_seed(seed)
            self._body(images, labels, self._generator)

    @contextlib.contextmanager
    def beside(self) -> Iterator[None]:
        """Work on the stream on which the step is recorded, after what the current one has to do.

        The nodes that gather gradients belong to the stream on which they were made.
        """
        if self._refused:
            yield
            return
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            yield
        current.wait_stream(self._stream)

    def _is_warm(self) -> bool:
        if self._team.size == 1:
            return self._steps >= _STEPS_BEFORE
        timed = {self._runs % _TIMED_EVERY, (self._runs + 1) % _TIMED_EVERY}
        return (
            self._steps >= _STEPS_BEFORE and self._runs >= _JOINED_STEPS_BEFORE and 0 not in timed
        )

    def _run_beside(self, images: Tensor, labels: Tensor) -> None:
        with self.beside():
            self._body(images, labels, self._generator)
        self._runs += 1

    def _capture(self, images: Tensor, labels: Tensor) -> bool:
        self._images, self._labels = images.clone(), labels.clone()
        graph = torch.cuda.CUDAGraph()
        _register(graph, self._generator)
        reason = None
        try:
            # Other threads, which bring the next images or watch over NCCL, may go on meanwhile.
            with torch.cuda.graph(
                graph, self._pool, self._stream, capture_error_mode="thread_local"
            ):
                self._body(self._images, self._labels, self._generator)
        except RuntimeError as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if self._team.all_reduce_max(int(reason is not None)):
            self._refused = True
            torch.cuda.synchronize(self._device)
            reason = reason or "another process could not record its step"
            self._report(f"training without a CUDA graph: {reason}")
            self._begin_again()
            return False
        self._graph = graph
        return True


def _register(graph: torch.cuda.CUDAGraph, generator: torch.Generator) -> None:
    """Let a graph draw anew from a generator in each replay; newer torch does so by itself."""
    register = getattr(graph, "register_generator_state", None)
    if register is not None:
        with warnings.catch_warnings():  # torch 2.14: deprecated, and does nothing
            warnings.filterwarnings("ignore", message=r".*register_generator_state")
            register(generator)
