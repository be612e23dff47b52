"""Two processes record their steps together, or neither does. The graph itself needs a GPU."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from magsd.config import Config, load_config
from magsd.data import Batch, split_by_patient
from magsd.data.run_data import open_images, plain_loader, training_loader
from magsd.distributed import Team, team_of
from magsd.models import build_model
from magsd.runtime import Runtime
from magsd.training import trainer as trainer_module
from magsd.training.metrics_log import MetricsLog
from magsd.training.progress import TrainingProgress
from magsd.training.run_folder import RunFolder
from magsd.training.signals import StopRequest
from magsd.training.step import StepResult
from magsd.training.train_step import TrainStep
from magsd.training.trainer import Trainer

#: What each process runs.
SCRIPT = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_training_captured_together import train_each_way
train_each_way(*sys.argv[1:])
"""
EPOCHS = 4
#: Of five images one process has two and the other three; of the four that are left over in an
#: epoch each has two: the first process sees no other shape.
IMAGES, BATCH = 24, 5
WAYS = ("plain", "recorded", "one cannot record")


class StandIns:
    """In place of what needs a GPU: a replay repeats the step with what was there to record."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.fails = False
        self._recording: Any = None
        take = TrainStep.__call__

        class Graph:
            def replay(graph) -> None:
                take(*graph.held)  # type: ignore[attr-defined]
                self.ran.append("replayed")

        class Stream:
            def __init__(stream, device: object = None) -> None:
                pass

            def wait_stream(stream, other: object) -> None:
                pass

        @contextlib.contextmanager
        def recording(graph: object, *_: object, **__: object) -> Iterator[None]:
            self._recording = graph
            try:
                yield
            finally:
                self._recording = None

        def noted(step: TrainStep, *given: Any) -> StepResult | None:
            if self._recording is None:
                self.ran.append("as it is")
                return take(step, *given)
            if self.fails:
                step._connected()(*given)  # half a step
                raise RuntimeError("no room for a graph")
            self._recording.held = step, *given
            return None

        TrainStep.__call__ = noted  # type: ignore[method-assign]
        trainer_module.CAPTURE_DEVICES = frozenset(("cpu",))
        for name, value in {
            "CUDAGraph": Graph,
            "graph": recording,
            "Stream": Stream,
            "current_stream": Stream,
            "stream": lambda _: contextlib.nullcontext(),
            "synchronize": lambda _: None,
        }.items():
            setattr(torch.cuda, name, value)


def train_each_way(out: str, *pairs: str) -> None:
    """Train in each of WAYS, in every process; keep what came out of it."""
    settings = [*pairs, f"batch_size={BATCH}", "class_weights=[0.25, 3.0, 0.5, 1.0]"]
    config = load_config(None, settings)
    stand_ins = StandIns()
    with team_of(config.train) as team:
        kept = {}
        for way in WAYS:
            config.train.cuda_graph = way != "plain"
            stand_ins.fails = way == "one cannot record" and team.rank == 1
            stand_ins.ran = []
            kept[way] = {**_train(config, team, Path(out)), "ran": stand_ins.ran}
        torch.save(kept, f"{out}.{team.rank}")


def _train(config: Config, team: Team, folder: Path) -> dict[str, Any]:
    classes, cache = open_images(config, config.data.source)
    split = split_by_patient(cache.records, folds=2, seed=0)
    torch.manual_seed(0)
    said: list[str] = []
    trainer = Trainer(
        config,
        build_model(config.model, len(classes)).double(),
        training_loader(config, cache, split.train[:IMAGES], classes, team),
        plain_loader(config, cache, split.validation[:4], classes),
        RunFolder(folder),
        Runtime.from_config(config.train),
        said.append,
        team,
    )
    one_step = trainer._one_step

    def in_double(batch: Batch) -> None:
        one_step(batch._replace(images=batch.images.double()))

    trainer._one_step = in_double  # type: ignore[method-assign]
    start = _weights(trainer)
    progress = TrainingProgress(Console(quiet=True), EPOCHS, len(trainer.train_loader), 0)
    for epoch in range(EPOCHS):
        trainer.epoch, trainer.step = epoch, 0
        trainer._train_epoch(MetricsLog(None, None), progress, StopRequest())
    return {"moved": _weights(trainer) - start, "said": said, "sums": trainer.read_sums()}


def _weights(trainer: Trainer) -> Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


@pytest.fixture(scope="module")
def kept(
    torchrun: Callable[..., subprocess.CompletedProcess[str]],
    small_pairs: list[str],
    tmp_path_factory: pytest.TempPathFactory,
) -> list[dict[str, Any]]:
    """What each of two processes kept."""
    folder = tmp_path_factory.mktemp("together")
    (folder / "script.py").write_text(SCRIPT)
    # At so low a rate a difference in rounding does not grow from step to step.
    pairs = [*small_pairs, "data.source=phantom:n=64,size=32", "log_interval=1000", "lr=1e-7"]
    done = torchrun(folder / "script.py", folder / "kept", *pairs)
    assert done.returncode == 0, done.stdout + done.stderr
    return [torch.load(folder / f"kept.{rank}") for rank in (0, 1)]


def test_both_record_and_replay_the_same_steps(kept: list[dict[str, Any]]) -> None:
    """After eleven at least; the left-over batch as it is, in the process that sees no change."""
    epoch = ["replayed"] * 4 + ["as it is"]
    for process in kept:
        assert process["plain"]["ran"] == ["as it is"] * 20
        assert process["recorded"]["ran"] == ["as it is"] * 13 + ["replayed", "as it is", *epoch]
        assert process["recorded"]["said"] == []


@pytest.mark.parametrize("way", WAYS[1:])
def test_each_way_trains_alike(way: str, kept: list[dict[str, Any]]) -> None:
    """A recorded step too reads each batch's own share of the weights of its classes."""
    for process in kept:
        wanted, found = process["plain"], process[way]
        assert float(wanted["moved"].norm()) > 0
        difference = (found["moved"] - wanted["moved"]).norm() / wanted["moved"].norm()
        assert float(difference) < 1e-5
        assert found["sums"] == pytest.approx(wanted["sums"], rel=1e-5)
    assert torch.equal(kept[0][way]["moved"], kept[1][way]["moved"])


def test_where_one_cannot_record_none_does(kept: list[dict[str, Any]]) -> None:
    ways = [process["one cannot record"] for process in kept]
    assert all(way["ran"] == ["as it is"] * 20 for way in ways)
    why = "training without a CUDA graph: "
    assert [way["said"] for way in ways] == [
        [f"{why}another process could not capture its step"],
        [f"{why}no room for a graph"],
    ]
