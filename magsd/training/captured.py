"""A training step recorded in a CUDA graph and replayed: one launch where there were thousands.

The first steps run as they are, on a stream of their own, so that libraries have chosen their
algorithms and the optimiser has its state; the next one is recorded, and every later one replayed.
Each is a real step of the training. A batch of another shape, as the last of an epoch may be, runs
as it is. Where recording fails the run goes on without, and says once why.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_STEPS_BEFORE = 3

Body = Callable[[Tensor, Tensor, torch.Generator], None]


class CapturedStep:
    """`body(images, labels, generator)` on a CUDA device, captured when its shapes have settled.

    The body must not wait for the device, and may depend on nothing that changes between steps
    but the device's memory: a learning rate, say, must be a tensor. report: takes the one line
    that says why there is no graph. pool: of memory that several steps share of which one runs at
    a time (torch.cuda.graph_pool_handle); None: of its own.
    """

    def __init__(
        self,
        body: Body,
        device: torch.device,
        report: Callable[[str], None],
        pool: Any = None,
    ) -> None:
        self._body = body
        self._report = report
        self._pool = pool
        self._stream = torch.cuda.Stream(device)
        self._generator = torch.Generator(device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._refused = False
        self._shape: torch.Size | None = None
        self._steps = 0

    def __call__(self, images: Tensor, labels: Tensor, seed: int) -> None:
        """One step; `seed` is that of everything drawn in it."""
        self._generator.manual_seed(seed)
        if self._graph is not None and images.shape == self._shape:
            self._images.copy_(images)
            self._labels.copy_(labels)
            self._graph.replay()
        elif self._graph is not None or self._refused:
            self._body(images, labels, self._generator)
        elif images.shape != self._shape or self._steps < _STEPS_BEFORE:
            self._steps = 1 if images.shape != self._shape else self._steps + 1
            self._shape = images.shape
            self._run_beside(images, labels)
        elif self._capture(images, labels):
            assert self._graph is not None
            self._graph.replay()
        else:
            self._generator = torch.Generator(images.device).manual_seed(seed)
            self._body(images, labels, self._generator)

    def _run_beside(self, images: Tensor, labels: Tensor) -> None:
        """On a stream of its own, as recording wants its first steps."""
        current = torch.cuda.current_stream(images.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            self._body(images, labels, self._generator)
        current.wait_stream(self._stream)

    def _capture(self, images: Tensor, labels: Tensor) -> bool:
        self._images, self._labels = images.clone(), labels.clone()
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self._generator)
        try:
            # Other threads, which bring the next images, may go on meanwhile.
            with torch.cuda.graph(
                graph, self._pool, self._stream, capture_error_mode="thread_local"
            ):
                self._body(self._images, self._labels, self._generator)
        except RuntimeError as error:
            self._refused = True
            torch.cuda.synchronize(images.device)
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            self._report(f"training without a CUDA graph: {reason}")
            return False
        self._graph = graph
        return True
