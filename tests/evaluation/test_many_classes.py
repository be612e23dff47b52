"""Two hundred classes: tables, pictures and memory stay those of few."""

from __future__ import annotations

import csv
import io
import json
import warnings
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from rich.console import Console
from rich.table import Table

from magsd.evaluation import EvaluationReport, compute_metrics, plot_confusion
from magsd.evaluation.localization import Localization, LocalizationScore
from magsd.evaluation.plots import write_classes, write_confusion
from magsd.evaluation.predict import Prediction
from magsd.evaluation.tables import localization_table, predictions_table
from magsd.reporting.measures import most_confused


def names_of(count: int) -> list[str]:
    return [f"{k:03d}.Black_footed_Albatross" for k in range(count)]


def report_of(count: int, images: int = 5) -> EvaluationReport:
    """All right but for the first class, whose images are taken for the second."""
    targets = np.repeat(np.arange(count), images)
    scores = np.eye(count)[targets] + 0.01
    scores[:images] = np.roll(scores[:images], 1, axis=1)
    metrics = compute_metrics(targets, scores / scores.sum(1, keepdims=True), names_of(count))
    empty = np.empty(0)
    predictions = type("None", (), {"logits": empty})()
    return EvaluationReport(tuple(names_of(count)), metrics, None, None, 1.0, predictions)


def printed(what: object, width: int) -> str:
    file = io.StringIO()
    Console(file=file, width=width).print(what)
    return file.getvalue()


@pytest.mark.parametrize("width", [80, 200])
@pytest.mark.parametrize("count", [3, 14, 40, 200])
def test_report_shows_what_a_terminal_can(count: int, width: int) -> None:
    output = printed(report_of(count), width)
    assert max(map(len, output.splitlines())) <= width
    assert output.count("\n") < 120
    if count == 3 and width == 200:
        assert "true \\ predicted" in output
        assert "Most confused" not in output
        return
    assert "true \\ predicted" not in output
    assert "confusion.csv" in output
    pair = output[output.index("Most confused") :].splitlines()
    row = next(line for line in pair if "100.0%" in line)
    assert row.split("│")[1].strip().startswith("000.Black_footed")
    assert row.split("│")[2].strip().startswith("001.Black_footed")
    assert row.split("│")[3].strip() == "5"


@pytest.mark.parametrize("count", [2, 12, 14])
def test_matrix_that_fits_is_shown(count: int) -> None:
    report = report_of(count)
    short = EvaluationReport(
        tuple(f"c{k}" for k in range(count)), report.raw, None, None, 1.0, report.predictions
    )
    output = printed(short, 120)
    assert "true \\ predicted" in output
    assert f"c{count - 1}" in output


def test_table_of_classes_names_the_worst_and_the_best() -> None:
    output = printed(report_of(60), 120)
    assert "lowest and highest F1 of 60 classes" in output
    table = output[output.index("By class") : output.index("Most confused")]
    assert table.count("Albatross") == 15
    assert "000.Black_footed_Albatross" in table
    assert "top-5 accuracy" in output
    assert "top-5 accuracy" not in printed(report_of(10), 120)


def test_localization_table_of_many_classes() -> None:
    scores = {
        name: LocalizationScore(1, 0.1 + k / 1000, 0.1) for k, name in enumerate(names_of(100))
    }
    output = printed(localization_table(Localization(LocalizationScore(100, 0.5, 0.1), scores)), 99)
    assert output.count("Albatross") == 15
    assert "000.Black" in output
    assert "099.Black" in output
    assert "all " in output


def table_of(count: int, width: int) -> tuple[Table, str]:
    values = np.linspace(0.0, 1.0, count)
    probabilities = dict(zip(names_of(count), (values / values.sum()).tolist(), strict=True))
    best = names_of(count)[-1]
    predictions = [Prediction(Path(f"image{k}.png"), best, probabilities) for k in range(2)]
    table = predictions_table(predictions, names_of(count), width)
    return table, printed(table, width)


def test_predictions_of_many_classes() -> None:
    table, output = table_of(200, 100)
    assert table.row_count == 10
    for k in range(195, 200):
        assert output.count(f"{k}.Black") == 2
    assert output.count("image1.png") == 1
    few, output = table_of(3, 200)
    assert few.row_count == 2
    assert "0.667" in output


def test_top5_accuracy() -> None:
    """The sixth likeliest does not count; of equal values the first classes are the likelier."""
    classes = [str(k) for k in range(12)]
    scores = np.tile(np.linspace(1.0, 0.1, 12), (12, 1))
    assert compute_metrics(range(12), scores, classes).top5_accuracy == pytest.approx(5 / 12)
    equal = np.ones((12, 12))
    assert compute_metrics(range(12), equal, classes).top5_accuracy == pytest.approx(5 / 12)
    assert compute_metrics(range(10), np.eye(10), classes[:10]).top5_accuracy is None


def test_absent_classes_are_no_warnings() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metrics = compute_metrics([0, 1, 1], np.eye(200)[[0, 1, 2]], names_of(200))
    assert metrics.per_class[names_of(200)[150]].images == 0
    assert np.isnan(metrics.per_class[names_of(200)[150]].auroc)


def test_most_confused() -> None:
    confusion = [[5, 0, 3], [4, 4, 0], [0, 0, 0]]
    assert most_confused(confusion, 10) == [(1, 0, 4, 0.5), (0, 2, 3, 0.375)]
    assert most_confused(confusion, 1) == [(1, 0, 4, 0.5)]


def test_matrix_and_classes_as_csv(tmp_path: Path) -> None:
    names = ['a,"b', "[/]", "肺炎"]
    with open(write_confusion(tmp_path / "c.csv", np.arange(9).reshape(3, 3), names)) as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["true \\ predicted", *names]
    assert rows[1:] == [['a,"b', *"012"], ["[/]", *"345"], ["肺炎", *"678"]]
    metrics = compute_metrics([0, 0, 1], np.eye(3)[[0, 1, 1]], names)
    with open(write_classes(tmp_path / "k.csv", {"raw": metrics, "refined": metrics})) as file:
        found = list(csv.DictReader(file))
    assert [row["class"] for row in found] == 2 * names
    assert [row["logits"] for row in found] == ["raw"] * 3 + ["refined"] * 3
    assert float(found[0]["recall"]) == 0.5
    assert found[2]["recall"] == ""


@pytest.mark.parametrize("count", [30, 200])
def test_picture_of_a_matrix_is_bounded(count: int, tmp_path: Path) -> None:
    confusion = np.eye(count, dtype=int) * 10
    picture = cv2.imread(str(plot_confusion(tmp_path / "c.png", confusion, ["n" * 99] * count)))
    assert max(picture.shape) < 2300
    blue = picture[..., 0].astype(int) - picture[..., 2] > 60
    assert 0.3 / count < blue[:, :1800].mean() < 3 / count  # the diagonal


SCRIPT = """
import resource, sys
from pathlib import Path
from magsd import cli

def call(*words):
    try:
        cli.app([str(word) for word in words], standalone_mode=False)
    except SystemExit as end:
        assert not end.code, words

for name in ("few", "many"):
    data, run, *pairs = Path(name), Path("run-" + name), *sys.argv[1:]
    call("train", "--data", f"folder:{data}", "--out", run, *pairs)
    if name == "many":
        call("predict", run, *sorted(data.rglob("*.png"))[:3], "--overlay", "maps")
    print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def test_memory_of_a_run_of_200_classes(
    warm_python: Callable[..., object], cache_dir: Path, tmp_path: Path
) -> None:
    """Training, evaluation and prediction, after training with two classes in one process."""
    rng = np.random.default_rng(0)
    for folder, count in (("few", 2), ("many", 200)):
        for name in names_of(count):
            (tmp_path / folder / name).mkdir(parents=True)
            for k in range(3):
                image = rng.integers(0, 256, (64, 64), dtype=np.uint8)
                cv2.imwrite(str(tmp_path / folder / name / f"{k}.png"), image)
    pairs = ["model.backbone=test_resnet", "model.pretrained=false", "data.image_size=32"]
    pairs += ["attention_maps=4", "epochs=1", "folds=3", "overlays=2", "tensorboard=false"]
    pairs += ["train.device=cpu", "batch_size=32"]
    script = f"import os; os.chdir({str(tmp_path)!r})\n{SCRIPT}"
    done = warm_python("-c", script, *pairs, f"cache_dir={cache_dir}", COLUMNS=80)
    assert done.returncode == 0, done.stderr
    few, many = (int(row.split()[1]) for row in done.stdout.splitlines() if "peak" in row[:5])
    assert many - few < 400e6
    report = json.loads((tmp_path / "run-many" / "evaluation.json").read_text())
    assert len(report["classes"]) == 200
    assert 0 <= report["raw"]["accuracy"] <= report["raw"]["top5_accuracy"] <= 1
    plots = tmp_path / "run-many" / "plots"
    for file in ("confusion.csv", "confusion_refined.csv", "per_class.csv"):
        assert (plots / file).is_file()
    assert done.stdout.count("\n") < 400
    assert "200 classes (000.Black" in done.stdout
    assert "and 190 more" in done.stdout
