"""`magsd crossval` over tiny runs: failures, interruptions, and calls that go on."""

from __future__ import annotations

import csv
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from typer.testing import CliRunner

from magsd import cli
from magsd.crossval import execute
from magsd.errors import ConfigError, DataError, RunError
from magsd.reporting.predictions import read_predictions
from magsd.training.run_folder import RunFolder
from magsd.training.trainer import Trainer


@pytest.fixture
def crossval(small_pairs: list[str], tmp_path: Path) -> Callable[..., tuple[int, str]]:
    """Exit code and output of the command over two folds, in `tmp_path / "out"`."""

    pairs = [pair for pair in small_pairs if pair != "attention_maps=4"]  # no model may read it

    def call(*arguments: str) -> tuple[int, str]:
        options = ["crossval", "--out", str(tmp_path / "out"), *pairs, "epochs=1", *arguments]
        result = CliRunner(env={"COLUMNS": "200"}).invoke(cli.app, [*options])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.exit_code, result.output

    return call


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Folders of the runs that training was started for, of which "plain/seed0/fold0" fails."""
    train_run, started = execute.train_run, []

    def watched(config: Any, out: Path, **options: Any) -> Any:
        started.append("/".join(out.parts[-3:]))
        if started == ["plain/seed0/fold0"]:
            raise ValueError("no such luck\nat all")
        return train_run(config, out, **options)

    monkeypatch.setattr(execute, "train_run", watched)
    return started


def test_failed_fold_leaves_the_others_and_is_tried_again(
    crossval: Callable[..., tuple[int, str]], trained: list[str], tmp_path: Path
) -> None:
    options = ["--model", "plain", "--model", "magsd", "--folds", "0"]
    code, output = crossval(*options)
    assert code == 1
    assert trained == ["plain/seed0/fold0", "magsd/seed0/fold0"]
    assert "1 of 2 runs are missing" in output
    assert "plain, seed 0, fold 0: ValueError: no such luck" in output
    failed = tmp_path / "out" / "plain" / "seed0" / "fold0" / "failed.txt"
    assert failed.read_text().startswith("ValueError: no such luck\n\nTraceback")
    with open(tmp_path / "out" / "results.csv") as file:
        states = [row["state"] for row in csv.DictReader(file)]
    assert states == ["failed", "finished"]

    code, output = crossval(*options)
    assert code == 0
    assert trained[2:] == ["plain/seed0/fold0"]
    assert not failed.exists()
    assert output.count("finished before") == 1
    report = json.loads((failed.parent / "evaluation.json").read_text())
    with open(tmp_path / "out" / "results.csv") as file:
        row = next(csv.DictReader(file))
    assert float(row["accuracy"]) == report["raw"]["accuracy"]
    assert (row["side"], int(row["images"])) == ("test", report["raw"]["images"])
    assert "Nothing was selected on the folds" in output
    for name in ("summary.csv", "summary.md", "summary.tex", "scores.png"):
        assert (tmp_path / "out" / name).is_file(), name


def test_predictions_out_of_fold(crossval: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    """Every image once, by the run that did not train on it, with the cells of its table."""
    random = np.random.default_rng(0)
    rows = []
    for n in range(16):
        cv2.imwrite(str(tmp_path / f"{n}.png"), random.integers(0, 256, (32, 32), np.uint8))
        rows.append(f"{n}.png,{'ab'[n % 2]},p{n // 2 % 6},{30 + n},x")
    table = tmp_path / "t.csv"
    table.write_text("\n".join(["file,label,patient,Age,fold", *rows]) + "\n")
    code, output = crossval("--model", "plain", f"data.source=csv:{table}")
    assert code == 0, output
    folder = tmp_path / "out" / "plain" / "seed0"
    whole = read_predictions(folder / "predictions.csv")
    assert sorted(whole.keys) == sorted(f"{n}.png" for n in range(16))
    assert set(whole.splits) == {"test"}
    assert [int(age) for age in whole.extra["Age"]] == [
        30 + int(key.partition(".")[0]) for key in whole.keys
    ]
    assert set(whole.extra["csv_fold"]) == {"x"}
    for fold in "01":
        of_run = read_predictions(folder / f"fold{fold}" / "predictions.csv").side("test")
        mine = whole.rows(whole.extra["fold"] == fold)
        assert mine.keys.tolist() == of_run.keys.tolist()
        assert np.array_equal(mine.logits, of_run.logits)
    # A run whose predictions are gone, as of an earlier version, is measured again.
    (folder / "fold0" / "predictions.csv").unlink()
    before = (folder / "predictions.csv").read_bytes()
    code, output = crossval("--model", "plain", f"data.source=csv:{table}")
    assert output.count("finished before") == 1
    assert (folder / "predictions.csv").read_bytes() == before


def test_interrupted_run_goes_on(
    crossval: Callable[..., tuple[int, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one_step = Trainer._one_step

    def signalled(self: Trainer, *arguments: Any) -> None:
        one_step(self, *arguments)
        if self.global_step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Trainer, "_one_step", signalled)
    code, output = crossval("--model", "plain", "--folds", "1")
    assert code == 128 + signal.SIGINT
    assert "the same command resumes" in output
    assert not list((tmp_path / "out").rglob("failed.txt"))
    monkeypatch.undo()
    # Cut off while it was written, or left from before: no result.
    (tmp_path / "out" / "plain" / "seed0" / "fold1" / "evaluation.json").write_text('{"raw":')
    code, output = crossval("--model", "plain", "--folds", "1")
    assert code == 0
    assert "resuming after epoch 0, step 2" in output


def test_refusals_come_before_any_training(
    crossval: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="--seeds a: expected whole numbers"):
        crossval("--model", "plain", "--seeds", "a")
    with pytest.raises(DataError, match="no/where"):
        crossval("--model", "plain", "data.source=folder:no/where")
    assert not (tmp_path / "out").exists()


def test_second_call_into_the_folder_is_refused(
    crossval: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    first = RunFolder(tmp_path / "out")
    first.lock()
    try:
        with pytest.raises(RunError, match=r"another process is training in .*out"):
            crossval("--model", "plain")
    finally:
        first.unlock()
    assert [path.name for path in first.root.iterdir()] == [".lock"]
