"""When a step is captured, replayed, or run as it is. The graph itself needs a GPU."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from magsd.config import Config
from magsd.data import Part
from magsd.data.run_data import open_images, plain_loader
from magsd.distributed import Team
from magsd.models import build_model
from magsd.runtime import Runtime
from magsd.training import trainer as trainer_module
from magsd.training.captured import CapturedStep
from magsd.training.run_folder import RunFolder
from magsd.training.step import BatchShard


class Body:
    """Notes its calls; while a graph is recorded it only keeps what it was called with."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, list[float], int]] = []
        self.how = "eager"
        self.factors: list[float] = []
        self.recorded: tuple[Tensor, Tensor, torch.Generator, BatchShard | None] | None = None
        self.error: RuntimeError | None = None

    def __call__(
        self,
        images: Tensor,
        labels: Tensor,
        generator: torch.Generator,
        shard: BatchShard | None = None,
    ) -> Tensor:
        if self.how == "recording":
            if self.error is not None:
                raise self.error
            self.recorded = (images, labels, generator, shard)
        else:
            self.calls.append((self.how, images.tolist(), generator.initial_seed()))
            if shard is not None:
                self.factors.append(float(shard.cross_entropy))
        return images


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
    def recording(graph: Graph, *_: object, **__: object) -> Iterator[None]:
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


def shard(first: int, total: int, cross_entropy: float = 1.0) -> BatchShard:
    return BatchShard(Part(first, total), cross_entropy, 1.0)


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


class Others(Team):
    """Together with another process, whose recording goes well or not."""

    def __init__(self, failed: bool = False) -> None:
        super().__init__(0, 2)
        object.__setattr__(self, "failed", failed)

    def all_reduce_max(self, number: int) -> int:
        return max(number, int(self.failed))  # type: ignore[attr-defined]


@pytest.mark.parametrize(("others", "first"), [(0, 11), (5, 11), (96, 101), (200, 203)])
def test_what_processes_do_together_is_captured_where_no_event_is_read(
    others: int, first: int, body: Body
) -> None:
    """Of DistributedDataParallel, which times its first ten calls and every hundredth."""
    step = CapturedStep(body, torch.device("cpu"), pytest.fail, team=Others())
    for number in range(others):
        step(images(number, size=1), images(number), number, shard(0, number))
    for number in range(others, others + 15):
        step(images(number), images(number), number, shard(0, 4))
    replayed = [number for number, call in enumerate(body.calls) if call[0] == "replayed"]
    assert replayed == list(range(first, others + 15))


def test_another_whole_batch_runs_as_it_is_even_where_the_part_is_no_other(body: Body) -> None:
    step = CapturedStep(body, torch.device("cpu"), pytest.fail, team=Others())
    for number in range(12):
        step(images(number), images(number), number, shard(0, 5))
    step(images(12), images(12), 12, shard(0, 4))
    step(images(13), images(13), 13, shard(0, 5))
    assert [call[0] for call in body.calls[-3:]] == ["replayed", "eager", "replayed"]
    assert [call[1] for call in body.calls[-3:]] == [[11, 11], [12, 12], [13, 13]]


def test_every_batch_has_its_own_factor_also_where_it_is_replayed(body: Body) -> None:
    step = CapturedStep(body, torch.device("cpu"), pytest.fail, team=Others())
    for number in range(14):
        result = step(images(number), images(number), number, shard(0, 5, float(number)))
        assert result.tolist() == [number, number]
    assert [call[0] for call in body.calls[-3:]] == ["replayed"] * 3
    assert body.factors == list(map(float, range(14)))


class Default:
    """In place of torch's own generator of a GPU: a capture that fails leaves it capturing."""

    def __init__(self, state: str) -> None:
        self.state = state

    def clone_state(self) -> Default:
        return Default(self.state)

    def graphsafe_set_state(self, other: Default) -> None:
        self.state = other.state


@pytest.mark.parametrize("fails", [False, True])
def test_a_failed_capture_leaves_the_default_generator_as_it_was(
    fails: bool, body: Body, monkeypatch: pytest.MonkeyPatch
) -> None:
    default = Default("free")
    monkeypatch.setattr(torch.cuda, "default_generators", (default,))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    body.error = RuntimeError("full") if fails else None
    step = CapturedStep(body, torch.device("cpu"), lambda _: None)
    before = torch.cuda.graph

    @contextlib.contextmanager
    def captured(*arguments: object, **settings: object) -> Iterator[None]:
        default.state = "capturing"
        with before(*arguments, **settings):
            yield
        default.state = "captured"

    monkeypatch.setattr(torch.cuda, "graph", captured)
    for number in range(4):
        step(images(number), images(number), number)
    assert default.state == ("free" if fails else "captured")


@pytest.mark.parametrize("mine", [False, True])
def test_processes_agree_on_a_failed_recording(mine: bool, body: Body) -> None:
    said: list[str] = []
    again: list[int] = []
    body.error = RuntimeError("full") if mine else None
    step = CapturedStep(
        body,
        torch.device("cpu"),
        said.append,
        team=Others(failed=not mine),
        reset=lambda: again.append(len(body.calls)),
    )
    for number in range(14):
        step(images(number), images(number), number, shard(0, 4))
    assert [call[1] for call in body.calls] == [[n, n] for n in range(14)]
    assert {call[0] for call in body.calls} == {"eager"}
    assert again == [11]
    reason = "full" if mine else "another process could not capture its step"
    assert said == [f"training without a CUDA graph: {reason}"]


@pytest.mark.parametrize("torch_has", ["it", "it, deprecated", "none"])
def test_a_graph_learns_of_the_generator_where_torch_asks_for_it(
    torch_has: str, body: Body, monkeypatch: pytest.MonkeyPatch
) -> None:
    register = Graph.register_generator_state

    def deprecated(graph: Graph, generator: torch.Generator) -> None:
        warnings.warn("CUDAGraph.register_generator_state() is deprecated", stacklevel=1)
        register(graph, generator)

    class Without:
        replay = Graph.replay
        body = Graph.body

        @property
        def generator(self) -> object:
            assert self.body.recorded is not None
            return self.body.recorded[2]

    if torch_has == "it, deprecated":
        monkeypatch.setattr(Graph, "register_generator_state", deprecated)
    elif torch_has == "none":
        monkeypatch.setattr(torch.cuda, "CUDAGraph", Without)
    step = CapturedStep(body, torch.device("cpu"), pytest.fail)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for number in range(5):
            step(images(number), images(number), seed=number)
    assert [call[0] for call in body.calls[3:]] == ["replayed"] * 2


RECOMPUTED = "training without a CUDA graph: train.recompute=true draws dropout or stochastic depth"


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        (["recompute=true", "backbone_args={output_stride: 16, drop_path_rate: 0.2}"], RECOMPUTED),
        (["recompute=true", "backbone_args={output_stride: 16, drop_block_rate: 0.2}"], RECOMPUTED),
        (["recompute=true"], None),
        (["backbone_args={output_stride: 16, drop_path_rate: 0.2}"], None),
        (["recompute=true", "model=magsd-dropout"], None),
    ],
)
def test_a_step_that_draws_again_is_not_recorded(
    settings: list[str],
    why: str | None,
    body: Body,
    small_config: Callable[..., Config],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Which is said before the first step."""
    monkeypatch.setattr(trainer_module, "CAPTURE_DEVICES", frozenset(("cpu",)))
    config = small_config(*settings, "views=separate")
    classes, cache = open_images(config, config.data.source)
    loader = plain_loader(config, cache, list(range(8)), classes)
    model, said = build_model(config.model, len(classes)), []
    folder, runtime = RunFolder(tmp_path), Runtime.from_config(config.train)
    made = trainer_module.Trainer(config, model, loader, loader, folder, runtime, said.append)
    assert (made.captured_step is None) == (why is not None)
    assert len(said) == (why is not None)
    assert why is None or said[0].startswith(why)


def test_capture_is_the_default() -> None:
    assert Config().train.cuda_graph
