"""Statistics against numbers worked out by hand, and the tables that hold them."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path

import cv2
import pytest
from rich.console import Console

from magsd.config import Config
from magsd.crossval.plan import PlannedRun
from magsd.crossval.predictions import write_out_of_fold
from magsd.crossval.report import (
    caption,
    print_report,
    summary_table,
    write_results,
    write_summary,
)
from magsd.crossval.results import METRICS, Outcome, RunResult
from magsd.crossval.summary import corrected_resampled_t_test, summarize
from magsd.data.record import Side
from magsd.errors import DataError, RunError
from magsd.training.run_folder import RunFolder

KEYS = [frozenset(f"image{10 * fold + k}" for k in range(10)) for fold in range(5)]
BASE = [0.50, 0.52, 0.54, 0.56, 0.58]
GAINS = [0.02, 0.04, 0.03, 0.01, 0.05]


def outcome(
    model: str, fold: int, value: float | None, side: Side = "test", **kinds: float
) -> Outcome:
    run = PlannedRun(model, 0, fold, RunFolder(f"{model}/{fold}"), Config())
    if value is None:
        return Outcome(run, None, "out of memory & more")
    scores = {kind: dict.fromkeys(METRICS, v) for kind, v in ({"raw": value} | kinds).items()}
    return Outcome(run, RunResult(side, 30, 10, KEYS[fold], scores))


def outcomes() -> list[Outcome]:
    first = [outcome("base_1", k, value, refined=value) for k, value in enumerate(BASE)]
    return first + [outcome("new", k, BASE[k] + GAINS[k]) for k in range(5)]


def test_corrected_t_by_hand() -> None:
    """Mean 0.03, variance 0.00025: t = 0.03 / sqrt((1/5 + 1/4) 0.00025) = sqrt(8).

    With four degrees of freedom p = 1 - (3/4) t / sqrt(3) (1 - 8 / 36), as 1 + t^2 / 4 = 3.
    """
    t, p = corrected_resampled_t_test(GAINS, 0.25)
    assert t == pytest.approx(math.sqrt(8))
    assert p == pytest.approx(1 - 0.75 * math.sqrt(8 / 3) * (1 - 8 / 36))
    assert corrected_resampled_t_test([-gain for gain in GAINS], 0.25) == pytest.approx((-t, p))


@pytest.mark.parametrize("differences", [[], [0.1], [0.1, 0.3 - 0.2, 0.1]])
def test_no_p_without_two_pairs_that_vary(differences: list[float]) -> None:
    assert all(map(math.isnan, corrected_resampled_t_test(differences, 0.25)))


def test_summary() -> None:
    first, second = summarize(outcomes()).models
    score = second.scores["raw", "f1"]
    assert (score.n, first.finished, first.planned) == (5, 5, 5)
    assert first.scores["raw", "f1"].mean == pytest.approx(0.54)
    assert first.scores["raw", "f1"].deviation == pytest.approx(math.sqrt(0.001))
    assert first.scores["raw", "f1"].test is None
    assert score.test is not None
    assert (score.test.pairs, score.test.difference) == (5, pytest.approx(0.03))
    assert score.test.t == pytest.approx(math.sqrt(8))
    assert ("refined", "f1") in first.scores
    assert ("refined", "f1") not in second.scores


def test_missing_runs_leave_pairs_out() -> None:
    runs = outcomes()
    runs[1] = outcome("base_1", 1, None)
    runs[7] = outcome("new", 2, None)
    runs[9] = outcome("new", 4, math.nan)
    first, second = summarize(runs).models
    assert (first.finished, second.finished, second.planned) == (4, 4, 5)
    score = second.scores["raw", "accuracy"]
    assert set(score.values) == {(0, 0), (0, 1), (0, 3)}
    assert score.test is not None
    assert (score.test.pairs, score.test.difference) == (2, pytest.approx(0.015))


def test_runs_on_other_images_are_not_compared() -> None:
    runs = outcomes()
    result = runs[5].result
    assert result is not None
    runs[5] = Outcome(runs[5].run, RunResult("test", 30, 10, KEYS[1], result.scores))
    with pytest.raises(RunError, match="new, seed 0, fold 0 was measured on other images"):
        summarize(runs)


def read(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_files(tmp_path: Path) -> None:
    runs = outcomes()
    runs[6] = outcome("new", 1, None)
    summary = summarize(runs)
    write_results(tmp_path / "results.csv", runs)
    write_summary(tmp_path, summary)
    lines = read(tmp_path / "results.csv")
    assert len(lines) == 10
    assert float(lines[4]["refined_auroc"]) == BASE[4]
    columns = ("side", "images", "train_images", "validation_images")
    assert [lines[4][column] for column in columns] == ["test", "10", "30", "10"]
    assert (lines[6]["state"], lines[6]["accuracy"]) == ("failed", "")
    assert lines[6]["reason"] == "out of memory & more"
    rows = {(r["model"], r["logits"], r["metric"]): r for r in read(tmp_path / "summary.csv")}
    assert len(rows) == 3 * len(METRICS)
    row = rows["new", "raw", "recall"]
    assert (row["n"], row["planned"], row["pairs"], row["baseline"]) == ("4", "5", "4", "base_1")
    assert float(row["difference"]) == pytest.approx(0.0275)
    markdown = (tmp_path / "summary.md").read_text()
    assert "| base_1 | raw | 5/5 | 54.0 ± 3.2 |" in markdown
    assert "|  | p, against base_1 | n = 4 |" in markdown
    assert "Runs missing: 1." in markdown
    latex = (tmp_path / "summary.tex").read_text()
    assert r"base\_1 & raw & 5/5 & 54.0 $\pm$ 3.2 &" in latex
    assert latex.count(r"\midrule") == 2
    assert "base_1 &" not in latex
    assert cv2.imread(str(tmp_path / "scores.png")).shape[1] > 900
    assert "Nothing was selected on the folds" in markdown
    assert "Nothing was selected on the folds" in latex


def test_results_of_the_images_that_the_epoch_was_selected_on(tmp_path: Path) -> None:
    """They say so wherever they are shown; training alone counts against them then."""
    runs = [outcome(model, k, BASE[k], side="validation") for model in "ab" for k in range(5)]
    summary = summarize(runs)
    assert summary.ratio == pytest.approx(10 / 30)
    assert summarize(outcomes()).ratio == pytest.approx(10 / 40)
    write_summary(tmp_path, summary)
    console = Console(file=io.StringIO(), width=400)
    print_report(console, runs, summary)
    texts = [(tmp_path / name).read_text() for name in ("summary.md", "summary.tex")]
    for text in (*texts, console.file.getvalue()):
        assert "Selected on these images" in text


def test_folds_that_share_images_are_not_gathered(tmp_path: Path) -> None:
    """The images changed between the runs of two folds."""
    outcomes = []
    for fold, keys in enumerate((["x", "y"], ["y", "z"])):
        folder = RunFolder(tmp_path / "m" / "seed0" / f"fold{fold}")
        rows = "".join(f"{key},test,a,1,0\n" for key in keys)
        folder.root.mkdir(parents=True)
        folder.predictions.write_text(f"key,split,label,probability_a,probability_b\n{rows}")
        planned = PlannedRun("m", 0, fold, folder, Config())
        outcomes.append(Outcome(planned, RunResult("test", 1, 1, frozenset(keys), {})))
    with pytest.raises(DataError, match="1 images stand in several folds, the first y"):
        write_out_of_fold(outcomes)
    assert len(write_out_of_fold(outcomes[:1])) == 1
    folder.predictions.write_text("key,split,label,probability_a,probability_b\ny,test,a,1,0\n")
    with pytest.raises(DataError, match="does not hold the test images"):
        write_out_of_fold(outcomes[1:])


def test_nothing_finished(tmp_path: Path) -> None:
    summary = summarize([outcome("base_1", 0, None), outcome("new", 0, None)])
    (tmp_path / "scores.png").touch()  # of an earlier call
    write_summary(tmp_path, summary)
    assert "| new | - | 0/1 | - |" in (tmp_path / "summary.md").read_text()
    assert not (tmp_path / "scores.png").exists()
    assert summary_table(summary).row_count == 2
    assert "nan" not in caption(summary)
