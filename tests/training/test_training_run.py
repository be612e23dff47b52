"""Whole runs: their folder, refusals, divergence, full disks, and real radiographs."""

from __future__ import annotations

import csv
import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

import magsd_kernels
from magsd.config import Config, load_config
from magsd.data.run_data import training_loader
from magsd.errors import ConfigError, DataError, RunError
from magsd.reporting.operating import fit_operating_points, read_operating_points
from magsd.reporting.predictions import read_predictions
from magsd.reporting.rules import Rule
from magsd.runtime import CPU, Runtime, choose_device
from magsd.training import load_run
from magsd.training import trainer as trainer_module
from magsd.training.checkpoint import load_checkpoint
from magsd.training.metrics_log import COLUMNS, MetricsLog, read_metrics
from magsd.training.report import evaluate_run, finish_run
from magsd.training.run import train_run
from magsd.training.run_folder import RunFolder, default_run_folder
from magsd.training.signals import StopRequest
from magsd.training.step import class_weights
from magsd.training.validation import validate


@pytest.fixture
def finished(tmp_path: Path, small_config, console) -> Path:
    out = tmp_path / "run"
    train_run(small_config("epochs=1"), out, console=console)
    return out


def test_folder_of_a_run(tmp_path: Path, small_config, console: Console) -> None:
    config = small_config("overlays=3", "tensorboard=true")
    trained = train_run(config, tmp_path / "run", console=console)
    report = finish_run(trained, console)
    folder = trained.folder
    assert folder.load_config() == config
    assert [row["epoch"] for row in read_metrics(folder.metrics)] == ["1", "2"]
    assert list(read_metrics(folder.metrics)[0]) == list(COLUMNS)
    assert list(folder.tensorboard.glob("events.*"))
    for name in ("confusion.png", "confusion_refined.png", "curves.png"):
        assert (folder.plots / name).read_bytes().startswith(b"\x89PNG"), name
    assert len(list(folder.overlays.glob("[0-9]*.png"))) == 3
    assert sorted(p.name for p in folder.checkpoints.iterdir()) == ["best.pt", "last.pt"]
    with open(folder.split) as file:
        sides = [row["split"] for row in csv.DictReader(file)]
    assert sides.count("train") == len(trained.data.split.train)
    assert report.raw.images == sides.count("test") == len(trained.data.split.test)
    table = read_predictions(folder.predictions)
    keys = {i: trained.data.cache.records[i].key for i in range(len(sides))}
    assert table.side("test").keys.tolist() == [keys[i] for i in trained.data.split.test]
    held = [keys[i] for i in trained.data.split.validation]
    assert table.side("validation").keys.tolist() == held
    assert len(table) == sides.count("test") + sides.count("validation")
    assert np.array_equal(table.side("test").logits, report.predictions.logits)
    points = fit_operating_points(table.side("validation"), Rule("youden"))
    assert read_operating_points(folder.operating) == points
    written = json.loads(folder.evaluation.read_text())
    assert (written["side"], written["raw"]) == ("test", report.to_dict()["raw"])
    assert written["validation"]["raw"]["images"] == len(held)
    text = console.file.getvalue()
    assert "12 training, 12 validation and 24 test images" in text
    for words in ("test accuracy", "validation accuracy", "uniform map", "images/s",
                  "Operating points", str(folder.overlays)):  # fmt: skip
        assert words in text, words


def test_run_without_a_test_side(tmp_path: Path, small_config, console: Console) -> None:
    """Its results are those of the images that the epoch was selected on, and are said to be."""
    config = small_config("epochs=1", "data.test=none", "data.source=phantom:n=24,size=32")
    trained = train_run(config, tmp_path / "run", console=console)
    report = finish_run(trained, console)
    written = json.loads(trained.folder.evaluation.read_text())
    assert (written["side"], "validation" in written) == ("validation", False)
    assert set(read_predictions(trained.folder.predictions).splits) == {"validation"}
    assert report.raw.images == 12
    text = console.file.getvalue()
    assert "validation side: 12 images; the epoch was selected on these images" in text
    assert "test accuracy" not in text
    assert "no test side" not in text


def test_split_keeps_patients_apart(finished: Path) -> None:
    sides: dict[str, set[str]] = {}
    with open(finished / "split.csv") as file:
        for row in csv.DictReader(file):
            sides.setdefault(row["patient"], set()).add(row["split"])
    assert len(sides) > 4
    assert all(len(found) == 1 for found in sides.values())


def test_best_epoch_is_the_one_with_the_best_accuracy(
    tmp_path: Path, small_config, console, monkeypatch
) -> None:
    scores = iter([(0.5, 1.0), (0.8, 0.9), (0.8, 0.7), (0.6, 0.1)])

    def scripted(*_: Any, **__: Any) -> dict[str, float]:
        accuracy, loss = next(scores)
        return {
            "validation_accuracy": accuracy,
            "validation_balanced_accuracy": accuracy,
            "validation_loss": loss,
        }

    monkeypatch.setattr(trainer_module, "validate", scripted)
    trained = train_run(small_config("epochs=4"), tmp_path / "run", console=console)
    assert trained.best_epoch == 3
    assert load_checkpoint(trained.folder.best)["epoch"] == 3
    assert load_checkpoint(trained.folder.last)["epoch"] == 4


def test_loaded_run_evaluates_as_validated(finished: Path, small_config, console) -> None:
    trained = train_run(small_config("epochs=1"), finished, resume=True, console=console)
    run = load_run(finished)
    assert run.classes == trained.data.classes
    assert not run.model.training
    report = evaluate_run(run, trained.data.cache, trained.data.split.validation)
    row = read_metrics(finished / "metrics.csv")[0]
    assert report.raw.accuracy == pytest.approx(float(row["validation_accuracy"]))
    assert report.raw.recall == pytest.approx(float(row["validation_balanced_accuracy"]))


def test_out_with_another_run_is_refused_and_untouched(
    finished: Path, small_config, console
) -> None:
    before = {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()}
    with pytest.raises(RunError, match=r"holds another run.*--resume.*--overwrite"):
        train_run(small_config("epochs=1"), finished, console=console)
    assert before == {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()}


def test_overwrite_replaces_the_run_and_nothing_else(finished: Path, small_config, console) -> None:
    (finished / "notes.txt").write_text("mine")
    (finished / "overlays").mkdir()
    (finished / "overlays" / "old.png").write_text("old")
    train_run(small_config("epochs=1", "train.seed=7"), finished, overwrite=True, console=console)
    assert (finished / "notes.txt").read_text() == "mine"
    assert not (finished / "overlays").exists()
    assert RunFolder(finished).load_config().train.seed == 7


def test_folder_of_other_files_is_never_overwritten(tmp_path: Path, small_config, console) -> None:
    (tmp_path / "config.yaml").write_text("mine: 1\n")
    with pytest.raises(RunError, match=r"config\.yaml, not written by"):
        train_run(small_config(), tmp_path, overwrite=True, console=console)
    assert (tmp_path / "config.yaml").read_text() == "mine: 1\n"


@pytest.mark.parametrize(
    ("pair", "error"),
    [
        ("source=csv:nowhere.csv", DataError),
        ("backbone=no_such_net", ConfigError),
        ("loss.class_weights=[1, 2]", ConfigError),
    ],
)
def test_a_run_that_cannot_start_touches_nothing(
    pair: str, error: type[Exception], finished: Path, tmp_path: Path, small_config, console
) -> None:
    before = {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()}
    for out in (finished, tmp_path / "new"):
        with pytest.raises(error, match=r"nowhere|no_such_net|class_weights"):
            train_run(small_config(pair), out, overwrite=True, console=console)
    assert before == {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()}
    assert not (tmp_path / "new").exists()


def test_run_without_a_checkpoint_may_be_started_again(
    tmp_path: Path, small_config, console
) -> None:
    RunFolder(tmp_path / "run").create(small_config("epochs=3"), overwrite=False)
    train_run(small_config("epochs=1"), tmp_path / "run", console=console)
    assert RunFolder(tmp_path / "run").load_config().train.epochs == 1


def test_out_that_is_a_file(tmp_path: Path, small_config, console) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="is not a folder"):
        train_run(small_config(), tmp_path / "file", console=console)


def test_second_process_is_kept_out(tmp_path: Path, small_config, console) -> None:
    """The lock belongs to an open file, so a second holder in this process meets it, too."""
    other = RunFolder(tmp_path / "run")
    other.lock()
    with pytest.raises(RunError, match="another process is training"):
        train_run(small_config("epochs=1"), tmp_path / "run", console=console)
    other.unlock()
    train_run(small_config("epochs=1"), tmp_path / "run", console=console)


def test_default_folders_do_not_collide(tmp_path: Path) -> None:
    first = default_run_folder("folder:/a/b", tmp_path)
    first.mkdir()
    assert default_run_folder("folder:/a/b", tmp_path) != first
    assert first.name.startswith("folder-")


def test_class_weights(small_config, tmp_path: Path, console) -> None:
    trained = train_run(small_config("epochs=1"), tmp_path / "run", console=console)
    data = trained.data
    chosen = [i for i in data.split.train if data.cache.records[i].label != "normal"]
    loader = training_loader(trained.config, data.cache, chosen[:5], data.classes)
    assert class_weights("none", loader) is None
    balanced = class_weights("balanced", loader)
    for k in range(4):
        count = loader.labels.count(k)
        assert balanced[k] == pytest.approx(5 / (4 * max(count, 1)))
    assert class_weights([1.0, 2.0, 3.0, 4.0], loader).tolist() == [1, 2, 3, 4]
    with pytest.raises(ConfigError, match="2 numbers; the classes are diffuse"):
        class_weights([1.0, 2.0], loader)


def test_a_lone_last_image_is_left_out(small_config, finished: Path, console) -> None:
    trained = train_run(small_config("epochs=1"), finished, resume=True, console=console)
    cache, classes = trained.data.cache, trained.data.classes
    for count, steps in ((8, 2), (9, 2), (10, 3)):
        loader = training_loader(trained.config, cache, list(range(count)), classes)
        assert len(loader) == steps


def test_validation_by_hand(small_config, finished: Path, console) -> None:
    trained = train_run(small_config("epochs=1"), finished, resume=True, console=console)
    run = load_run(finished)
    loader = training_loader(
        trained.config, trained.data.cache, trained.data.split.validation, run.classes
    )
    loader.augment, loader.shuffle = None, False
    measured = validate(run.model, loader, CPU)
    logits = torch.cat([run.model(b.images).logits.detach() for b in loader]).double()
    labels = torch.tensor(loader.labels)
    hits = logits.argmax(1) == labels
    assert measured["validation_accuracy"] == pytest.approx(float(hits.double().mean()))
    assert measured["validation_loss"] == pytest.approx(
        float(torch.nn.functional.cross_entropy(logits, labels))
    )
    recalls = [float(hits[labels == k].double().mean()) for k in labels.unique()]
    assert measured["validation_balanced_accuracy"] == pytest.approx(np.mean(recalls))


def test_unknown_devices() -> None:
    with pytest.raises(ConfigError, match=r"train\.device=warp"):
        choose_device("warp")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match=r"train\.device=cuda"):
            choose_device("cuda")


def test_unknown_and_unavailable_kernels(tmp_path: Path, small_config, console) -> None:
    with pytest.raises(ConfigError, match=r"train\.kernels=fast.*reference"):
        train_run(small_config("kernels=fast"), tmp_path / "run", console=console)
    absent = [n for n, state in magsd_kernels.backends().items() if state != "available"]
    for name in absent:
        with pytest.raises(ConfigError, match=rf"train\.kernels={name} cannot run here: ."):
            train_run(small_config(f"kernels={name}"), tmp_path / "run", console=console)


def test_named_kernels_win_over_the_environment_and_auto_leaves_it(
    small_config, monkeypatch
) -> None:
    monkeypatch.setenv("MAGSD_BACKEND", "no-such-backend")
    arguments = torch.rand(1, 1, 8, 8), torch.rand(1, 1, 4, 4), torch.rand(1)
    with Runtime.from_config(small_config("kernels=reference").train):
        magsd_kernels.attention_drop(*arguments)
    with (
        Runtime.from_config(small_config().train),
        pytest.raises(ValueError, match="no-such-backend"),
    ):
        magsd_kernels.attention_drop(*arguments)


def test_tensorboard_curves(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.csv", tmp_path / "tb")
    log.start(0, 0)
    log.epoch(dict.fromkeys(COLUMNS, 0.5) | {"epoch": 1, "step": 3})
    log.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    assert "validation/accuracy" in events.Tags()["scalars"]
    assert events.Scalars("train/loss")[0].step == 3


def test_stop_request_restores_handlers() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        assert not stop
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop
        assert stop.signum == signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) is before
    assert signal.getsignal(signal.SIGTERM) is before


def real_config(shared_dir: Path, tmp_path: Path, *overrides: str) -> Config:
    """Sixteen real radiographs of each class in a table of their own."""
    source = shared_dir / "data" / "cxr3"
    with open(source / "labels.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    labels = sorted({row["label"] for row in rows})
    chosen = [row for label in labels for row in [r for r in rows if r["label"] == label][:8]]
    table = tmp_path / "few.csv"
    with open(table, "w", newline="") as file:
        writer = csv.DictWriter(file, ["file", "label", "patient"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(row | {"file": str(source / row["file"])} for row in chosen)
    pairs = [
        f"data.source=csv:{table}",
        f"cache_dir={tmp_path / 'cache'}",
        "image_size=96",
        "folds=2",
        "batch_size=6",
        "epochs=1",
        "tensorboard=false",
        "overlays=3",
        "train.device=cpu",
        *overrides,
    ]
    return load_config("finetune", pairs)


@pytest.mark.parametrize("name", ["magsd", "plain"])
def test_a_few_steps_on_real_radiographs(
    name: str, shared_dir: Path, tmp_path: Path, console
) -> None:
    weights = shared_dir / "weights" / "tf_efficientnet_lite0.safetensors"
    config = real_config(
        shared_dir,
        tmp_path,
        f"model.name={name}",
        "backbone=tf_efficientnet_lite0",
        f"pretrained={weights}",
        "epochs=2",
    )
    trained = train_run(config, tmp_path / "run", console=console)
    report = finish_run(trained, console)
    rows = read_metrics(trained.folder.metrics)
    assert trained.data.classes == ("covid-19", "no-finding", "pneumonia")
    assert float(rows[1]["train_loss"]) < float(rows[0]["train_loss"])
    assert report.raw.images == len(trained.data.split.test) > 0
    assert len(list(trained.folder.overlays.glob("[0-9]*.png"))) == 3
