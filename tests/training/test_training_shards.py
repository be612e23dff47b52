"""Training from tar shards: the same run again after a stop, and on two processes."""

from __future__ import annotations

import csv
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from magsd.cli import app
from magsd.config import Config
from magsd.data import AugmentConfig, choose_split, open_source
from magsd.data.prepare import prepare_data
from magsd.data.run_sides import developed_on
from magsd.data.shards import ShardLoader, open_shards, write_shards
from magsd.distributed import ALONE, Team
from magsd.errors import ConfigError, DataError
from magsd.training.checkpoint import load_checkpoint
from magsd.training.metrics_log import read_metrics
from magsd.training.report import finish_run
from magsd.training.run import TrainedRun, train_run
from magsd.training.train_step import shard_of
from magsd.training.trainer import Interrupted, Trainer

pytest.importorskip("webdataset", reason="needs the shards extra")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides of the small run that take its images from shards of three, its fold kept."""
    out = tmp_path_factory.mktemp("shards")
    source = open_source("phantom:n=24,size=32")
    write_shards(source, out, split=choose_split(source.records, folds=2), shard_size=3)
    return [
        f"data.source=shards:{out}/train-{{000000..000003}}.tar",
        f"data.validation=shards:{out}/val-{{000000..000003}}.tar",
        "data.shuffle_buffer=5",
    ]


@pytest.fixture
def train(
    pairs: list[str], small_config: Callable[..., Config], console: Console
) -> Callable[..., TrainedRun]:
    return lambda out, *more, **how: train_run(
        small_config(*pairs, *more), out, console=console, **how
    )


def test_stopped_and_resumed_is_one_run(
    train: Callable[..., TrainedRun],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    same_state: Callable[[Any, Any], None],
) -> None:
    seen: list[list[int]] = []
    one_step = Trainer._one_step
    monkeypatch.setattr(
        Trainer,
        "_one_step",
        lambda self, batch: seen.append(batch.labels.tolist()) or one_step(self, batch),
    )
    whole = train(tmp_path / "whole")
    assert [len(labels) for labels in seen] == [4] * 6
    loader, _ = whole.data.loaders(whole.config, Team())
    labels = torch.tensor([label for batch in seen for label in batch])
    assert torch.bincount(labels).tolist() == [2 * count for count in loader.class_counts()]

    leave = Trainer._leave_if_asked
    stop_at_4 = SimpleNamespace(signum=15)
    monkeypatch.setattr(
        Trainer,
        "_leave_if_asked",
        lambda self, stop, *, meeting: leave(
            self, stop_at_4 if self.global_step == 4 else stop, meeting=meeting
        ),
    )
    with pytest.raises(Interrupted):
        train(tmp_path / "parted")
    monkeypatch.setattr(Trainer, "_leave_if_asked", leave)
    saved = load_checkpoint(tmp_path / "parted" / "checkpoints" / "last.pt")
    assert (saved["epoch"], saved["step"]) == (1, 1)
    train(tmp_path / "parted", resume=True)
    one, other = (
        load_checkpoint(tmp_path / name / "checkpoints" / "last.pt") for name in ("whole", "parted")
    )
    one.pop("config"), other.pop("config")
    same_state(one, other)
    fewer = whole.config.data.source.replace("000003", "000002")
    with pytest.raises(DataError, match="the run was trained on other shards"):
        train(tmp_path / "parted", f"data.source={fewer}", "epochs=3", resume=True)


def test_whole_command(train: Callable[..., TrainedRun], tmp_path: Path, console: Console) -> None:
    trained = train(tmp_path / "run", "epochs=1", "overlays=3", "loss.class_weights=balanced")
    report = finish_run(trained, console)
    assert report.raw.images == 12
    said = console.file.getvalue()
    assert "no test side: shards are not divided into folds" in said
    assert "validation side: 12 images; the epoch was selected on these images" in said
    assert len(list((tmp_path / "run" / "overlays").glob("0*.png"))) == 3
    rows = read_metrics(tmp_path / "run" / "metrics.csv")
    assert float(rows[-1]["validation_accuracy"]) == pytest.approx(report.raw.accuracy)
    again = CliRunner().invoke(app, ["evaluate", str(tmp_path / "run")])
    assert again.exit_code == 0, again.output
    other = ["evaluate", str(tmp_path / "run"), "--data", "phantom:n=6,size=32"]
    assert CliRunner().invoke(app, other).exit_code == 0


def test_refusals(
    train: Callable[..., TrainedRun], small_config: Callable[..., Config], pairs: list[str],
    tmp_path: Path,
) -> None:  # fmt: skip
    with pytest.raises(ConfigError, match="need shards to validate on"):
        train(tmp_path / "run", "data.validation=null")
    with pytest.raises(ConfigError, match=r"another source has no data\.validation"):
        train(tmp_path / "run", "data.source=phantom")
    with pytest.raises(ConfigError, match=r"data\.skip_bad=true"):
        train(tmp_path / "run", "data.skip_bad=true")
    with pytest.raises(DataError, match=r"train-000000\.tar is on two sides"):
        train(tmp_path / "run", pairs[0].replace("data.source", "data.validation"))
    with pytest.raises(DataError, match=r"val-000000\.tar is on two sides"):
        train(tmp_path / "run", pairs[1].replace("data.validation", "data.test"))
    with pytest.raises(ConfigError, match=r"data\.test=phantom: shards are tested on shards"):
        train(tmp_path / "run", "data.test=phantom")
    with pytest.raises(ConfigError, match=r"data\.test=shards:.*other sources on others"):
        train_run(small_config(pairs[1].replace("data.validation", "data.test")), tmp_path / "run")
    with pytest.raises(DataError, match="shards are streamed"):
        open_source(pairs[0].partition("=")[2])
    assert not (tmp_path / "run").exists()


def test_shares_of_two_processes_are_the_whole_batch(pairs: list[str]) -> None:
    """Without knowing the other's labels, by adding up what the processes' images weigh."""
    index = open_shards(pairs[0].partition("=")[2])
    weights = torch.tensor([1.0, 2.0, 4.0, 8.0], dtype=torch.float64)
    batches = [
        next(
            ShardLoader(
                index, image_size=32, clahe=None, buffer=5, batch_size=8, shuffle=True, seed=0,
                augment=AugmentConfig(), device="cpu", rank=rank, ranks=2,
            ).epoch(0)
        )
        for rank in (0, 1)
    ]  # fmt: skip
    own = [float(weights[batch.labels].sum()) for batch in batches]

    class Pair(Team):
        def all_reduce(self, values: torch.Tensor) -> torch.Tensor:
            return values.fill_(sum(own))

    for rank, batch in enumerate(batches):
        shard = shard_of(batch, Pair(rank, 2), weights, None)
        assert shard.cross_entropy == pytest.approx(2 * own[rank] / sum(own))
        assert shard.distance == 1.0
    assert own[0] != own[1]


def test_shards_are_divided_as_training_divides_their_source(
    tmp_path: Path, small_config: Callable[..., Config], console: Console
) -> None:
    """Although training leaves unreadable images out before it starts, and shards as they go."""
    for label in ("a", "b"):
        for number in range(8):
            path = tmp_path / "data" / label / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(path), np.full((8, 8), number, np.uint8))
    (tmp_path / "data" / "a" / "3.png").write_bytes(b"no image")
    settings = ["folds=2", "skip_bad=true", f"source=folder:{tmp_path / 'data'}"]
    data = prepare_data(small_config(*settings), None, None, console, ALONE)
    data.write_split(tmp_path / "split.csv")
    out = tmp_path / "shards"
    command = ["shards", "--data", f"folder:{tmp_path / 'data'}", "--out", str(out), *settings[:2]]
    assert CliRunner().invoke(app, command).exit_code == 0
    written: dict[str, set[str]] = {}
    for path in out.glob("*.tar"):
        with tarfile.open(path) as tar:
            about = [json.load(tar.extractfile(m)) for m in tar if m.name.endswith(".json")]
        written.setdefault(path.name.partition("-")[0], set()).update(a["key"] for a in about)
    with (tmp_path / "split.csv").open(newline="") as file:
        trained = {row["key"] for row in csv.DictReader(file) if row["split"] == "train"}
    assert written["train"] == trained
    assert trained | written["val"] == developed_on(tmp_path / "split.csv")
    assert len(trained | written["val"] | written["test"]) == 15
