"""`magsd report` of runs' folders and of a cross-validation's."""

from __future__ import annotations

import csv
import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from magsd import cli
from magsd.errors import DataError, RunError
from magsd.reporting.page.inputs import find_inputs

Made = Callable[..., Path]
Report = Callable[..., str]


@pytest.fixture(scope="module")
def run(small_pairs: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("reported") / "run"
    result = CliRunner().invoke(cli.app, ["train", "--out", str(out), *small_pairs, "epochs=1"])
    assert result.exit_code == 0, result.output
    return out


def test_a_run_is_reported_with_its_origin_and_images(run: Path, report: Report, tmp_path: Path):
    report(run, "--out", tmp_path, "--images", "2")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    for file in (run / "predictions.csv", run / "checkpoints" / "best.pt"):
        assert hashlib.sha256(file.read_bytes()).hexdigest() in page
    assert "phantom:n=48,size=32" in page
    # Each image alone and under its map, wrong ones and right ones.
    pictures = re.findall(r'<img src="data:image/jpeg;base64,[A-Za-z0-9+/=]{200,}"', page)
    assert len(pictures) in (4, 6, 8)
    content = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    model = content["models"][0]
    with (run / "split.csv").open(newline="", encoding="utf-8") as file:
        sides = [row["split"] for row in csv.DictReader(file)]
    for side in ("train", "validation", "test"):
        counted = sum(images for images, _ in model["sides"][side].values())
        assert counted == sides.count(side) > 0
    assert model["facts"]["configuration"]["train"]["epochs"] == 1
    kept = json.loads((run / "operating.json").read_text(encoding="utf-8"))
    assert model["point"]["temperature"] == kept[model["kind"]]["temperature"]
    assert "kept with the run" in page
    assert "of the source that the models were trained on" in page
    assert "library_name: magsd" in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_images_that_are_gone_are_said(run: Path, report: Report, tmp_path: Path):
    moved = shutil.copytree(run, tmp_path / "moved")
    config = moved / "config.yaml"
    text = config.read_text(encoding="utf-8")
    text = re.sub(r"source: phantom.*", "source: 'csv:/home/eve/set.csv,label=a/b'", text)
    text = re.sub(r"  test: folds", "  test: folder:/home/eve/elsewhere", text)
    config.write_text(text, encoding="utf-8")
    report(moved, "--out", tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "moved: its images cannot be shown" in page
    assert "Whether the images are of one or of several hospitals is not known" in page
    assert "<img" not in page
    # The page is the user's own; the card is published.
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8").replace("\\", "")
    assert "source: csv:set.csv,label=a/b" in card
    assert "the test side is folder:elsewhere" in card
    assert "/home/eve" in page
    assert "eve/" not in card
    assert str(tmp_path) not in card


def test_an_audit_in_the_run_s_folder_is_read(run: Path, report: Report, tmp_path: Path):
    moved = shutil.copytree(run, tmp_path / "moved")
    finding = {"level": "note", "text": "no two images show the same picture"}
    audit = {"source": "phantom", "images": 24, "findings": [finding], "pairs": []}
    audit["shortcuts"] = {"rows": []}
    (moved / "audit.json").write_text(json.dumps(audit), encoding="utf-8")
    report(moved, "--out", tmp_path / "out", "--images", "0")
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "no two images show the same picture" in page
    assert "No images were asked for" in page


def test_a_run_without_predictions_names_the_remedy(run: Path, report: Report, tmp_path: Path):
    moved = shutil.copytree(run, tmp_path / "moved")
    (moved / "predictions.csv").unlink()
    with pytest.raises(RunError, match=r"magsd evaluate .*moved --predictions FILE"):
        report(moved, "--out", tmp_path / "out")


def test_kept_thresholds_are_those_of_the_run_s_own_file(run: Path, report: Report, tmp_path: Path):
    moved = shutil.copytree(run, tmp_path / "moved")
    shutil.copy(moved / "predictions.csv", moved / "other.csv")
    report(moved / "other.csv", "--out", tmp_path / "out")
    content = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert content["models"][0]["fitted"] == "fitted on the validation rows of the file"
    kept = json.loads((moved / "operating.json").read_text(encoding="utf-8"))
    (moved / "operating.json").write_text(json.dumps(kept | {"refined": None}), encoding="utf-8")
    with pytest.raises(DataError, match=r"operating\.json: has no thresholds of refined.*--rule"):
        report(moved, "--out", tmp_path / "none")


def test_cross_validation_compares_its_models(made: Made, report: Report, tmp_path: Path):
    for seed, model in enumerate(("magsd", "plain")):
        folder = tmp_path / "cv" / model / "seed0"
        folder.mkdir(parents=True)
        made(folder / "predictions.csv", patients=30, seed=seed, splits=["test"])
    (tmp_path / "cv" / "results.csv").write_text(
        "model,seed,fold\nplain,0,0\nmagsd,0,0\n", encoding="utf-8"
    )
    report(tmp_path / "cv", "--out", tmp_path / "out")
    content = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert [model["name"] for model in content["models"]] == ["plain", "magsd"]
    assert [(c["first"], c["second"]) for c in content["comparisons"]] == [("plain", "magsd")]


def test_runs_that_a_cross_validation_has_not_gathered_do_not_count(run: Path, tmp_path: Path):
    """A fold that was stopped, or left out by --folds, lies beside those in the file."""
    seed = tmp_path / "cv" / "magsd" / "seed0"
    for fold in (0, 1, 2):
        shutil.copytree(run, seed / f"fold{fold}")
    (seed / "predictions.csv").write_text(
        "key,label,fold,probability_a,probability_b\nx,a,0,1,0\ny,b,1,0,1\n", encoding="utf-8"
    )
    (found,) = find_inputs([tmp_path / "cv"], ())
    assert [folder.name for folder in found.folds] == ["fold0", "fold1"]
