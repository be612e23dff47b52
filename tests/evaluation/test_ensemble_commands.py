"""`magsd predict` and `magsd evaluate` with several runs, with mirrors, and operating points."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from typer.testing import CliRunner

from magsd import cli
from magsd.errors import ConfigError, DataError, RunError
from magsd.reporting.operating import (
    OperatingPoint,
    OperatingPoints,
    Threshold,
    write_operating_points,
)
from magsd.reporting.predictions import read_predictions
from magsd.reporting.rules import Rule

OTHER = "phantom:n=12,seed=9,size=32"


def run(*arguments: str | Path) -> str:
    result = CliRunner(env={"COLUMNS": "200"}).invoke(cli.app, [str(a) for a in arguments])
    if result.exception is not None:
        raise result.exception
    return result.output


def written(file: Path) -> Any:
    return json.loads(file.read_text())


@pytest.fixture(scope="module")
def runs(small_pairs: list[str], made_once: Callable[..., Path]) -> dict[str, Path]:
    """Two seeds of one fold, the second with smaller images, and another fold."""
    settings = {
        "first": [],
        "second": ["train.seed=1", "image_size=48", "data.clahe=false", "eval_batch_size=5"],
        "fold": ["data.fold=1", "horizontal_flip=false"],
    }

    def train(folder: Path) -> None:
        for name, pairs in settings.items():
            run("train", "--out", folder / name, *small_pairs, "epochs=1", *pairs)
            (folder / name / "operating.json").unlink(missing_ok=True)  # tests give their own

    folder = made_once("ensembles", train)
    return {name: folder / name for name in settings}


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    rng = np.random.default_rng(0)
    paths = [tmp_path / name for name in ("a.png", "b.png")]
    for path in paths:
        cv2.imwrite(str(path), rng.integers(0, 255, (50, 60), dtype=np.uint8))
    return paths


def probabilities(folder: Path, images: list[Path], *arguments: str | Path) -> np.ndarray:
    file = folder / "p.json"
    run("predict", *arguments, *images, "--json", file)
    return np.array([list(row["probabilities"].values()) for row in written(file)])


def test_predict_takes_the_mean(runs: dict[str, Path], images: list[Path], tmp_path: Path) -> None:
    each = [probabilities(tmp_path, images, folder) for folder in runs.values()]
    maps = tmp_path / "maps"
    found = probabilities(tmp_path, images, *runs.values(), "--overlay", maps)
    np.testing.assert_allclose(found, np.mean(each, axis=0), rtol=1e-5)
    assert not np.allclose(each[0], each[1], rtol=1e-3)
    rows = written(tmp_path / "p.json")
    assert [row["image"] for row in rows] == [str(path) for path in images]
    assert all(row.keys() == {"image", "label", "probabilities", "overlay"} for row in rows)
    assert sorted(path.name for path in maps.glob("*.png")) == ["a.png", "b.png"]


def test_predict_with_mirrors(runs: dict[str, Path], images: list[Path], tmp_path: Path) -> None:
    mirrors = [tmp_path / f"mirror_{path.name}" for path in images]
    for path, mirror in zip(images, mirrors, strict=True):
        cv2.imwrite(str(mirror), cv2.imread(str(path), cv2.IMREAD_UNCHANGED)[:, ::-1])
    plain = probabilities(tmp_path, images, runs["second"])
    flipped = probabilities(tmp_path, mirrors, runs["second"])
    found = probabilities(tmp_path, images, runs["second"], "--tta", "flip")
    output = run("predict", runs["second"], runs["fold"], *images, "--tta", "flip")
    assert output.count("trained without mirrored images") == 1
    np.testing.assert_allclose(found, (plain + flipped) / 2, rtol=1e-5)
    with pytest.raises(ConfigError, match=r"--tta turn: expected flip"):
        run("predict", runs["second"], *images, "--tta", "turn")


def test_evaluate_takes_the_mean_over_images_that_all_report_on(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    before = sorted(runs["first"].rglob("*"))
    file, plots = tmp_path / "report.json", tmp_path / "plots"
    output = run("evaluate", runs["first"], runs["second"], "--json", file)
    report = written(file)
    assert report["raw"]["images"] == report["refined"]["images"] == 24
    assert "mean of 2 runs: 24 images" in output
    assert report["localization"]["overall"]["images"] > 0
    assert sorted(runs["first"].rglob("*")) == before
    run("evaluate", runs["first"], runs["second"], "--plots", plots, "--tta", "flip", "seed=3")
    assert (plots / "confusion.png").is_file()


def test_the_mean_evaluated_is_the_mean_predicted(runs: dict[str, Path], tmp_path: Path) -> None:
    """Of image files: the confusion matrix of what `predict` says of each of them."""
    rng = np.random.default_rng(1)
    classes = ("diffuse", "focal", "ground-glass", "normal")
    files = []
    for number, name in enumerate(classes * 3):
        files.append(tmp_path / "images" / name / f"{number}.png")
        files[-1].parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(files[-1]), rng.integers(0, 255, (40, 40), dtype=np.uint8))
    file = tmp_path / "report.json"
    both = (runs["first"], runs["fold"])
    run("evaluate", *both, "--data", f"folder:{tmp_path / 'images'}", "--json", file)
    predicted = probabilities(tmp_path, files, *both).argmax(axis=1)
    confusion = np.zeros((4, 4), int)
    np.add.at(confusion, ([classes.index(path.parent.name) for path in files], predicted), 1)
    assert written(file)["refined"]["confusion"] == confusion.tolist()


def test_folds_have_no_images_that_none_was_trained_on(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"other images \(24 and 24, 0 of them .*--data SOURCE"):
        run("evaluate", runs["first"], runs["fold"])
    with pytest.raises(DataError, match="--data SOURCE"):
        run("evaluate", runs["first"], runs["fold"], "--data", "phantom:n=48,size=32")
    file = tmp_path / "report.json"
    output = run("evaluate", runs["first"], runs["fold"], "--data", OTHER, "--json", file)
    assert "trained on" not in output
    assert written(file)["raw"]["images"] == 12
    output = run("evaluate", runs["first"], runs["fold"], "--data", "phantom:n=30,size=32")
    assert output.count("of them have names that the run trained on") == 2


def test_other_sources_may_have_the_same_keys(runs: dict[str, Path], tmp_path: Path) -> None:
    other = shutil.copytree(runs["second"], tmp_path / "other")
    text = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(text.replace("source: phantom:", "source: folder:/of/"))
    with pytest.raises(DataError, match=r"other images \(phantom:.* and folder:/of/"):
        run("evaluate", runs["first"], other)


def test_where_any_epoch_was_selected_on_the_images_they_are_no_test(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    """A run without a test side, on whose validation images another was tested."""
    other = shutil.copytree(runs["second"], tmp_path / "other")
    text = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(text.replace("test: folds", "test: none"))
    split = (other / "split.csv").read_text()
    split = split.replace(",validation", ",train").replace(",test", ",validation")
    (other / "split.csv").write_text(split)
    file = tmp_path / "p.csv"
    run("evaluate", runs["first"], other, "--predictions", file)
    assert set(read_predictions(file).splits.tolist()) == {"validation"}


def test_outputs_of_evaluate_that_collide(runs: dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "both"
    with pytest.raises(ConfigError, match="both name"):
        run("evaluate", runs["first"], "--json", file, "--predictions", file)
    own = runs["first"] / "predictions.csv"
    before = own.read_bytes()
    with pytest.raises(ConfigError, match="a run keeps its own there"):
        run("evaluate", runs["first"], "--predictions", own)
    assert own.read_bytes() == before


def test_damaged_operating_points_are_told_before_images_are_read(
    runs: dict[str, Path], images: list[Path], tmp_path: Path
) -> None:
    moved = shutil.copytree(runs["first"], tmp_path / "moved")
    (moved / "operating.json").write_text("{")
    images[0].unlink()
    with pytest.raises(RunError, match=r"operating\.json"):
        run("predict", moved, *images)


def test_evaluate_one_run_with_mirrors(runs: dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    output = run("evaluate", runs["first"], "--tta", "flip", "--json", file)
    assert written(file)["raw"]["images"] == 24
    assert len(list((runs["first"] / "plots").glob("*-flip/confusion.png"))) == 1
    assert "mean of" not in output
    with pytest.raises(ConfigError, match="expected flip"):
        run("evaluate", runs["first"], "--tta", "turn")


def test_shards(runs: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("webdataset", reason="needs the shards extra")
    run("shards", "--data", OTHER, "--out", tmp_path / "shards", "folds=2", "data.test=none")
    reports = []
    spec = f"shards:{tmp_path}/shards/val-000000.tar"
    for names in (("first", "second"), ("first",), ("second",)):
        file = tmp_path / f"{'-'.join(names)}.json"
        run("evaluate", *(runs[name] for name in names), "--data", spec, "--json", file)
        reports.append(written(file))
    assert {report["raw"]["images"] for report in reports} == {6}
    with pytest.raises(ConfigError, match="shards have the labels of their index"):
        run("evaluate", runs["first"], runs["second"], "--data", spec, "--classes", "a=b")


def test_runs_that_differ_in_classes(
    runs: dict[str, Path], images: list[Path], tmp_path: Path
) -> None:
    import torch

    other = tmp_path / "other"
    shutil.copytree(runs["second"], other)
    best = other / "checkpoints" / "best.pt"
    payload = torch.load(best, weights_only=True)
    renamed = ["diffuse", "focal", "ground-glass", "healthy"]
    torch.save({**payload, "classes": renamed}, best)
    message = f"{other} has the classes .*healthy, {runs['first']} has .*normal"
    with pytest.raises(RunError, match=message):
        run("predict", runs["first"], other, *images)
    with pytest.raises(RunError, match=message):
        run("evaluate", runs["first"], other, "--data", OTHER)


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        (["first"], ConfigError, "no images: name some after .*first"),
        (["first", "first", "a.png"], ConfigError, "first: named 2 times"),
        (["first", "a.png", "second"], ConfigError, "second: runs come first"),
        (["first", "folder", "a.png"], RunError, "folder holds no run"),
        (["folder", "a.png"], RunError, "folder holds no run"),
        (["a.png", "first"], RunError, r"a\.png holds no run"),
        (["first", "gone.png"], DataError, r"1 of 1 images not found: .*gone\.png"),
    ],
)
def test_words_of_predict(
    words: list[str],
    error: type[Exception],
    message: str,
    runs: dict[str, Path],
    images: list[Path],
    tmp_path: Path,
) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(error, match=message):
        run("predict", *(runs.get(word, tmp_path / word) for word in words))


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        (["first", "folder"], RunError, "folder holds no run"),
        (["first", "gone"], RunError, "gone holds no run"),
        (["first", "batch_sise=3"], ConfigError, "unknown key 'batch_sise'"),
        (["first", "first"], ConfigError, "first: named 2 times"),
    ],
)
def test_words_of_evaluate(
    words: list[str], error: type[Exception], message: str, runs: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "folder").mkdir()
    given = [runs.get(word, word if "=" in word else tmp_path / word) for word in words]
    with pytest.raises(error, match=message):
        run("evaluate", *given)


def test_a_run_whose_name_looks_like_a_pair(
    runs: dict[str, Path], images: list[Path], tmp_path: Path
) -> None:
    shutil.copytree(runs["second"], tmp_path / "lr=0.1")
    both = (runs["first"], tmp_path / "lr=0.1")
    assert "mean of 2 runs" in run("evaluate", *both, "train.device=cpu")
    expected = probabilities(tmp_path, images, runs["first"], runs["second"])
    assert np.array_equal(probabilities(tmp_path, images, *both), expected)


@pytest.fixture
def fitted(runs: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of a run, with operating points of its classes."""
    folder = tmp_path / "fitted"
    shutil.copytree(runs["first"], folder)
    classes = ("diffuse", "focal", "ground-glass", "normal")
    thresholds = {name: Threshold(0.0 if name == "focal" else 1.1, None, None) for name in classes}
    point = OperatingPoint(2.0, Rule("youden"), thresholds, images=12, patients=12)
    write_operating_points(folder / "operating.json", OperatingPoints(classes, point, point))
    return folder


def test_operating_points_of_a_run(
    fitted: Path, runs: dict[str, Path], images: list[Path], tmp_path: Path
) -> None:
    expected = probabilities(tmp_path, images, runs["first"])
    file = tmp_path / "out.json"
    output = run("predict", fitted, *images, "--json", file)
    assert "findings" in output
    for row, before in zip(written(file), expected, strict=True):
        assert list(row["probabilities"].values()) == before.tolist()
        assert row["label"] == max(row["probabilities"], key=row["probabilities"].get)
        assert row["findings"] == ["focal"]
        roots = np.sqrt(before)
        assert list(row["calibrated"].values()) == pytest.approx(roots / roots.sum())
    assert "findings" not in run("predict", runs["first"], *images)


def test_operating_points_are_of_one_model(
    fitted: Path, runs: dict[str, Path], images: list[Path], tmp_path: Path
) -> None:
    file = tmp_path / "out.json"
    output = run("predict", runs["second"], fitted, *images, "--json", file)
    assert "operating points are not used: they were fitted for a single model" in output
    assert "findings" not in written(file)[0]
    output = run("predict", fitted, *images, "--tta", "flip", "--json", file)
    assert "they were fitted for images without their mirrors" in output
    assert "findings" not in written(file)[0]


def test_operating_points_that_do_not_fit(fitted: Path, images: list[Path]) -> None:
    file = fitted / "operating.json"
    values = written(file)
    file.write_text("{}")
    with pytest.raises(RunError, match=r"operating\.json: holds no operating points"):
        run("predict", fitted, *images)
    names = dict(zip(values["classes"], "abcd", strict=True))
    values["classes"] = list(names.values())
    for kind in ("raw", "refined"):
        thresholds = values[kind]["thresholds"]
        values[kind]["thresholds"] = {names[name]: each for name, each in thresholds.items()}
    file.write_text(json.dumps(values))
    with pytest.raises(RunError, match=r"operating\.json: was fitted for another model"):
        run("predict", fitted, *images)
