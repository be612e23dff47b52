"""Test sides: sources of their own, runs without one, and proof that nothing is chosen on them."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

import magsd.training.run
from magsd import cli
from magsd.config import Config, load_config
from magsd.data.prepare import prepare_data
from magsd.data.run_data import CachedData
from magsd.distributed import ALONE
from magsd.errors import ConfigError, DataError
from magsd.reporting.operating import read_operating_points
from magsd.reporting.predictions import read_predictions
from magsd.training.report import finish_run
from magsd.training.run import train_run
from magsd.training.run_folder import RunFolder

Make = Callable[..., Config]
SMALL = ("model=plain", "epochs=1")
TABLES = {"source": "train", "test": "test"}


def write_table(folder: Path, count: int, *, seed: int, labels: str = "ab") -> str:
    """Images n.png of two patients each, and the spec of a table of them."""
    random = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    rows = ["file,label,patient,Age"]
    for n in range(count):
        cv2.imwrite(str(folder / f"{n}.png"), random.integers(0, 256, (32, 32), np.uint8))
        rows.append(f"{n}.png,{labels[n // 2 % len(labels)]},s{seed}p{n // 2},{40 + n}")
    (folder / "t.csv").write_text("\n".join(rows) + "\n")
    return f"csv:{folder / 't.csv'}"


def permute_labels(table: Path) -> None:
    rows = list(csv.DictReader(table.open(newline="")))
    labels = [row["label"] for row in rows]
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(
            row | {"label": label} for row, label in zip(rows, labels[2:] + labels[:2], strict=True)
        )


def run(*arguments: object) -> str:
    result = CliRunner(env={"COLUMNS": "200"}).invoke(cli.app, [str(a) for a in arguments])
    if result.exception is not None:
        raise result.exception
    return result.output


@pytest.fixture(scope="module")
def apart(small_pairs: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was tested on a source of its own, whose images have the same names."""
    root = tmp_path_factory.mktemp("apart")
    write_table(root / "train", 16, seed=0)
    write_table(root / "test", 8, seed=1)
    console = Console(quiet=True)
    finish_run(train_run(config_of(root, small_pairs), root / "run", console=console), console)
    return root


def config_of(root: Path, small_pairs: list[str]) -> Config:
    tables = {f"data.{key}=csv:{root / name / 't.csv'}" for key, name in TABLES.items()}
    return load_config(None, [*sorted(tables), *SMALL], shared=small_pairs)


class TestOtherSource:
    def test_its_images_are_the_test_side(self, apart: Path) -> None:
        folder = RunFolder(apart / "run")
        with folder.split.open(newline="") as file:
            rows = list(csv.DictReader(file))
        sides = [row["split"] for row in rows]
        assert [sides.count(s) for s in ("train", "validation", "test")] == [8, 8, 8]
        assert {row["source"] for row in rows if row["split"] == "test"} == {
            f"csv:{apart / 'test' / 't.csv'}"
        }
        table = read_predictions(folder.predictions)
        assert table.side("test").keys.tolist() == [
            name if name not in table.side("validation").keys else f"test/{name}"
            for name in (f"{n}.png" for n in range(8))
        ]
        assert any(key.startswith("test/") for key in table.keys)
        assert table.side("test").extra["Age"].tolist() == [str(40 + n) for n in range(8)]
        report = json.loads(folder.evaluation.read_text())
        assert (report["side"], report["raw"]["images"]) == ("test", 8)
        assert report["validation"]["raw"]["images"] == 8

    @pytest.mark.parametrize(
        ("data", "side", "words"),
        [
            (None, "test", "8 test images of the run's own source"),
            ("test", "test", "8 test images of the run's own source"),
            ("train", "validation", "source, on which the epoch was selected"),
        ],
    )
    def test_evaluate(
        self, data: str | None, side: str, words: str, apart: Path, tmp_path: Path
    ) -> None:
        source = ["--data", f"csv:{apart}/test/../{data}/t.csv"] if data else []
        table = tmp_path / "p.csv"
        output = run("evaluate", apart / "run", *source, "--predictions", table)
        assert words in output
        found = read_predictions(table)
        wanted = read_predictions(apart / "run" / "predictions.csv").side(side)
        assert found.splits.tolist() == wanted.splits.tolist()
        assert np.array_equal(found.logits, wanted.logits)
        assert found.extra["Age"].tolist() == wanted.extra["Age"].tolist()

    def test_localize_reads_its_files(self, apart: Path, tmp_path: Path) -> None:
        output = run("localize", apart / "run", "--out", tmp_path / "maps", "--overlays", "0")
        assert "8 test images of the run's own source" in output

    def test_other_images_are_external(self, apart: Path, tmp_path: Path) -> None:
        other = write_table(tmp_path / "other", 4, seed=2)
        run("evaluate", apart / "run", "--data", other, "--predictions", tmp_path / "p.csv")
        assert set(read_predictions(tmp_path / "p.csv").splits) == {"external"}

    def test_it_cannot_change_when_the_run_resumes(
        self, apart: Path, console: Console, tmp_path: Path
    ) -> None:
        config = RunFolder(apart / "run").load_config()
        config.data.test = "none"
        with pytest.raises(ConfigError, match=r"data\.test was csv:.*, now none"):
            train_run(config, apart / "run", resume=True, console=console)

    def test_refusals(
        self, apart: Path, small_config: Make, console: Console, tmp_path: Path, caplog
    ) -> None:
        def prepare(test: str) -> CachedData:
            config = small_config(f"data.source=csv:{apart / 'train' / 't.csv'}", f"test={test}")
            data = prepare_data(config, None, None, console, ALONE)
            assert isinstance(data, CachedData)
            return data

        (tmp_path / "link.png").symlink_to(apart / "train" / "3.png")
        (tmp_path / "same.csv").write_text("file,label\nlink.png,a\n")
        with pytest.raises(DataError, match=r"1 of its images are among those of .* link\.png"):
            prepare(f"csv:{tmp_path / 'same.csv'}")
        with pytest.raises(DataError, match=r"'c' of 2\.png is not among the classes a, b"):
            prepare(write_table(tmp_path / "c", 4, seed=3, labels="ac"))
        assert not caplog.text
        data = prepare(write_table(tmp_path / "patients", 4, seed=0))
        assert "2 patients are among those of csv:" in caplog.text
        assert data.split.test == [0, 1, 2, 3]


def test_a_run_of_before_goes_on_with_two_sides(
    small_config: Make, console: Console, tmp_path: Path
) -> None:
    """Its configuration lacks the key, and its split the side."""
    config = small_config("data.test=none", *SMALL)
    finish_run(train_run(config, tmp_path / "run", console=console), console)
    folder = RunFolder(tmp_path / "run")
    text = folder.config.read_text()
    folder.config.write_text(re.sub(r"  (test|operating_point): \w+\n", "", text))
    assert "test:" not in folder.config.read_text()
    assert "24 validation images of the run's own" in run("evaluate", tmp_path / "run")
    output = run("train", "--resume", "--out", tmp_path / "run", "epochs=2")
    assert "validation side: 24 images; the epoch was selected on these images" in output
    assert "no test side" not in output
    assert ",test" not in folder.split.read_text()
    assert folder.load_config().data.test == "none"


def test_a_published_split_without_test_images_has_no_test_side(
    small_config: Make, console: Console, tmp_path: Path
) -> None:
    for side in ("train", "val"):
        for label in "ab":
            write_table(tmp_path / "images" / side / label, 2, seed=len(side))
            (tmp_path / "images" / side / label / "t.csv").unlink()
    config = small_config(f"data.source=folder:{tmp_path / 'images'}")
    data = prepare_data(config, None, None, console, ALONE)
    assert data.counts() == {"train": 4, "validation": 4}
    assert data.reported == "validation"
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert "no test side: the set publishes no test images" in said


def chosen(out: Path) -> list[bytes]:
    """What was chosen in a run: weights, temperature and thresholds."""
    folder = RunFolder(out)
    return [folder.best.read_bytes(), folder.operating.read_bytes()]


def measured(out: Path) -> list[int]:
    """The labels that the results of a run are of."""
    return read_predictions(RunFolder(out).predictions).side("test").labels.tolist()


def test_labels_of_a_test_source_choose_nothing(
    apart: Path, small_pairs: list[str], console: Console, tmp_path: Path
) -> None:
    config = config_of(apart, small_pairs)
    table = apart / "test" / "t.csv"
    before = table.read_text()
    try:
        permute_labels(table)
        assert table.read_text() != before
        finish_run(train_run(config, tmp_path / "run", console=console), console)
    finally:
        table.write_text(before)
    assert chosen(tmp_path / "run") == chosen(apart / "run")
    assert measured(tmp_path / "run") != measured(apart / "run")


def test_labels_of_a_test_fold_choose_nothing(
    small_config: Make, console: Console, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare = magsd.training.run.prepare_data

    def permuted(*arguments: Any) -> CachedData:
        data = prepare(*arguments)
        assert isinstance(data, CachedData)
        records = list(data.cache.records)
        labels = [records[i].label for i in data.split.test]
        for i, label in zip(data.split.test, labels[7:] + labels[:7], strict=True):
            records[i] = dataclasses.replace(records[i], label=label)
        cache = dataclasses.replace(data.cache, records=tuple(records))
        return dataclasses.replace(data, cache=cache)

    for name in ("as it is", "permuted"):
        if name == "permuted":
            monkeypatch.setattr(magsd.training.run, "prepare_data", permuted)
        config = small_config("epochs=2", "operating_point=sensitivity=0.8")
        finish_run(train_run(config, tmp_path / name, console=console), console)
    assert chosen(tmp_path / "as it is") == chosen(tmp_path / "permuted")
    assert measured(tmp_path / "as it is") != measured(tmp_path / "permuted")
    points = read_operating_points(tmp_path / "permuted" / "operating.json")
    assert str(points.raw.rule) == "sensitivity=0.8"
    assert all((t.sensitivity or 0) >= 0.8 for t in points.raw.thresholds.values())


@pytest.mark.parametrize("rule", ["sensitivity=2", "cost=5", "yuden", "sensitivity"])
def test_what_is_no_rule(rule: str) -> None:
    with pytest.raises(ConfigError, match=r"train\.operating_point=.*expected argmax, youden"):
        load_config("phantom", [f"operating_point={rule}"])
