"""What goes wrong in training: divergence, full disks, unreadable images."""

from __future__ import annotations

import csv
import errno
import os
import signal
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from magsd.data import Batch
from magsd.errors import DataError, RunError, TrainingDiverged
from magsd.training.checkpoint import load_checkpoint
from magsd.training.run import train_run
from magsd.training.trainer import Trainer


def break_loss(monkeypatch: pytest.MonkeyPatch, at: int) -> list[list[int]]:
    """Make the loss NaN in the step after `at` steps; returns where its indices will stand."""
    one_step = Trainer._one_step
    seen: list[list[int]] = []

    def broken(self: Trainer, batch: Batch) -> None:
        if self.global_step == at:
            seen.append([self.train_loader.indices[p] for p in self._recent[self.step]])
            batch = batch._replace(images=batch.images * float("nan"))
        one_step(self, batch)

    monkeypatch.setattr(Trainer, "_one_step", broken)
    return seen


@pytest.mark.parametrize("interval", [1, 2, 50])
def test_nan_stops_names_the_batch_and_keeps_the_last_good_checkpoint(
    interval: int, tmp_path: Path, small_config, console, monkeypatch
) -> None:
    seen = break_loss(monkeypatch, at=4)
    out = tmp_path / "run"
    config = small_config(f"log_interval={interval}", "epochs=3")
    with pytest.raises(TrainingDiverged, match="epoch 2, step 2 of 3") as caught:
        train_run(config, out, console=console)
    with open(out / "split.csv") as file:
        keys = [row["key"] for row in csv.DictReader(file)]
    assert len(seen[0]) == 4
    assert all(keys[index] in str(caught.value) for index in seen[0])
    saved = load_checkpoint(out / "checkpoints" / "last.pt")
    assert (saved["epoch"], saved["step"]) == (1, 0)
    assert all(v.isfinite().all() for v in saved["model"].values() if v.is_floating_point())
    monkeypatch.undo()
    train_run(small_config("lr=1e-5", "epochs=2"), out, resume=True, console=console)


def test_signal_after_nan_does_not_save_it(
    tmp_path: Path, small_config, console, monkeypatch
) -> None:
    break_loss(monkeypatch, at=4)
    one_step = Trainer._one_step

    def signalled(self: Trainer, *arguments: Any) -> None:
        if self.global_step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        one_step(self, *arguments)

    monkeypatch.setattr(Trainer, "_one_step", signalled)
    out = tmp_path / "run"
    with pytest.raises(TrainingDiverged):
        train_run(small_config("log_interval=50"), out, console=console)
    assert load_checkpoint(out / "checkpoints" / "last.pt")["epoch"] == 1


def test_weights_that_are_spoilt_while_the_loss_is_finite(
    tmp_path: Path, small_config, console, monkeypatch
) -> None:
    """The last step's update overflows: its loss was fine, its weights are not."""
    one_step = Trainer._one_step

    def spoil(self: Trainer, *arguments: Any) -> None:
        one_step(self, *arguments)
        if self.global_step == 6:
            next(self.model.parameters()).data.view(-1)[0] = float("inf")

    monkeypatch.setattr(Trainer, "_one_step", spoil)
    with pytest.raises(
        TrainingDiverged, match=r"weights became.*epoch 2, step 3 of 3; its batch: ph"
    ):
        train_run(small_config(), tmp_path / "run", console=console)
    assert load_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt")["epoch"] == 1


@pytest.mark.parametrize("name", ["last.pt", "metrics.csv", "config.yaml"])
def test_full_disk_is_said_and_keeps_what_was_there(
    name: str, tmp_path: Path, small_config, console, monkeypatch
) -> None:
    out = tmp_path / "run"
    train_run(small_config("epochs=1"), out, console=console)
    before = (out / "checkpoints" / "last.pt").read_bytes()
    replace = os.replace

    def full(source: Any, target: Any) -> None:
        if Path(target).name == name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(RunError, match=rf"disk is full.*{name}.*--resume"):
        train_run(small_config(), out, resume=True, console=console)
    monkeypatch.undo()
    assert (out / "checkpoints" / "last.pt").read_bytes() == before
    assert not list(out.rglob("*.part"))
    train_run(small_config(), out, resume=True, console=console)


def test_training_on_a_disk_that_is_really_full(small_disk, small_config, console) -> None:
    """The first checkpoint fits; with the optimizer's state the next does not."""
    tiny_disk = small_disk(megabytes=3)
    with pytest.raises(RunError, match=r"disk is full.*--resume"):
        train_run(small_config("optim.name=adamw"), tiny_disk / "run", console=console)
    saved = load_checkpoint(tiny_disk / "run" / "checkpoints" / "last.pt")
    assert (saved["epoch"], saved["step"]) == (0, 0)


def test_truncated_image_is_named_and_skipped_when_asked(
    tmp_path: Path, small_config, console
) -> None:
    rng = np.random.default_rng(0)
    for label in ("a", "b"):
        for number in range(6):
            path = tmp_path / "data" / label / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(path), rng.integers(0, 255, (40, 40), dtype=np.uint8))
    bad = tmp_path / "data" / "a" / "3.png"
    bad.write_bytes(bad.read_bytes()[:100])
    source = f"source=folder:{tmp_path / 'data'}"
    with pytest.raises(DataError, match=r"(?s)1 of 12 images.*a/3\.png.*skip_bad"):
        train_run(small_config(source, "epochs=1"), tmp_path / "run", console=console)
    trained = train_run(
        small_config(source, "epochs=1", "skip_bad=true"), tmp_path / "run", console=console
    )
    assert len(trained.data.cache.records) == 11
    assert "a/3.png" in console.file.getvalue()
