"""When a step is captured, replayed, or run as it is. The graph itself needs a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from magsd.config import Config
from magsd.training.captured import CapturedStep


class Body:
    """Notes its calls; while a graph is recorded it only keeps what it was called with."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, list[float], int]] = []
        self.how = "eager"
        self.recorded: tuple[Tensor, Tensor, torch.Generator] | None = None
        self.error: RuntimeError | None = None

    def __call__(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> None:
        if self.how == "recording":
            if self.error is not None:
                raise self.error
            self.recorded = (images, labels, generator)
        else:
            self.calls.append((self.how, images.tolist(), generator.initial_seed()))


class Graph:
    """In place of torch.cuda.CUDAGraph: a replay calls the body with what was recorded."""

    body: Body

    def register_generator_state(self, generator: torch.Generator) -> None:
        self.generator = generator

    def replay(self) -> None:
        assert self.body.recorded is not None
        assert self.body.recorded[2] is self.generator
        self.body.how = "replayed"
        self.body(*self.body.recorded)
        self.body.how = "eager"


class Stream:
    def __init__(self, device: torch.device | None = None) -> None:
        self.waited = 0

    def wait_stream(self, other: Stream) -> None:
        self.waited += 1


@pytest.fixture
def body(monkeypatch: pytest.MonkeyPatch) -> Body:
    made = Body()

    @contextlib.contextmanager
    def recording(graph: Graph, **_: object) -> Iterator[None]:
        made.how = "recording"
        try:
            yield
        finally:
            made.how = "eager"

    monkeypatch.setattr(Graph, "body", made, raising=False)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", recording)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    return made


def images(value: float, size: int = 2) -> Tensor:
    return torch.full((size,), value)


def test_every_call_is_one_step_with_its_own_images_and_seed(body: Body) -> None:
    step = CapturedStep(body, torch.device("cpu"), pytest.fail)
    for number in range(6):
        step(images(number), images(number), seed=100 + number)
    assert [call[1] for call in body.calls] == [[n, n] for n in range(6)]
    assert [call[2] for call in body.calls] == [100 + n for n in range(6)]
    assert [call[0] for call in body.calls] == ["eager"] * 3 + ["replayed"] * 3


def test_another_shape_runs_as_it_is_and_the_graph_stays(body: Body) -> None:
    step = CapturedStep(body, torch.device("cpu"), pytest.fail)
    for number in range(4):
        step(images(number), images(number), seed=number)
    step(images(4, size=1), images(4, size=1), seed=4)
    step(images(5), images(5), seed=5)
    assert [call[0] for call in body.calls[3:]] == ["replayed", "eager", "replayed"]
    assert [call[1] for call in body.calls[3:]] == [[3, 3], [4], [5, 5]]


def test_shapes_that_do_not_settle_are_not_captured(body: Body) -> None:
    step = CapturedStep(body, torch.device("cpu"), pytest.fail)
    for number in range(8):
        step(images(number, size=1 + number % 2), images(number), seed=number)
    assert {call[0] for call in body.calls} == {"eager"}


def test_a_failed_recording_is_said_once_and_loses_no_step(body: Body) -> None:
    said: list[str] = []
    body.error = RuntimeError("operation not permitted when stream is capturing\nmore")
    step = CapturedStep(body, torch.device("cpu"), said.append)
    for number in range(6):
        step(images(number), images(number), seed=number)
    assert [call[1] for call in body.calls] == [[n, n] for n in range(6)]
    assert [call[2] for call in body.calls] == list(range(6))
    assert said == [
        "training without a CUDA graph: operation not permitted when stream is capturing"
    ]


def test_capture_is_the_default() -> None:
    assert Config().train.cuda_graph
