"""The audit of made sets: what is planted is found, and nothing else."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from typer.testing import CliRunner

from magsd import cli
from magsd.audit import AuditReport, audit_source
from magsd.audit.shortcuts import ShortcutReport
from magsd.audit.sides import Sides, read_sides
from magsd.data import open_source
from magsd.errors import DataError, RunError
from magsd.outputs import save_png

PATIENTS = 24
NO_SHORTCUTS = ShortcutReport([], 0, 0, [], "", "")


def run(*arguments: str | Path) -> str:
    result = CliRunner(env={"COLUMNS": "200"}).invoke(cli.app, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


class MadeSet:
    """A table of images in a folder, and a split by patient."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows: list[tuple[str, str, str, str]] = []

    def add(self, name: str, image: NDArray[np.uint8], label: str, patient: str, side: str) -> None:
        assert cv2.imwrite(str(self.folder / name), image)
        self.rows.append((name, label, patient, side))

    def write(self) -> tuple[str, Path]:
        """The source, and the file of the sides."""
        for name, columns in (
            ("labels.csv", ("file", "label", "patient")),
            ("split.csv", ("key", "label", "patient", "split")),
        ):
            with (self.folder / name).open("w", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(columns)
                writer.writerows(row[: len(columns)] for row in self.rows)
        return f"csv:{self.folder / 'labels.csv'}", self.folder / "split.csv"


@pytest.fixture
def clean(tmp_path: Path, picture: Any) -> MadeSet:
    return make_clean(tmp_path, picture)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory, picture: Any) -> MadeSet:
    return make_planted(tmp_path_factory.mktemp("planted"), picture)


@pytest.fixture(scope="module")
def found(planted: MadeSet) -> AuditReport:
    return audited(planted)


def make_clean(folder: Path, picture: Any) -> MadeSet:
    made = MadeSet(folder)
    for n in range(PATIENTS):
        side = "test" if n % 4 == 0 else "train"
        made.add(f"{n}.png", picture(n), "ab"[n // 2 % 2], f"p{n}", side)
    return made


def make_planted(folder: Path, picture: Any) -> MadeSet:
    """Class b is wider, in another format, with a black margin; two copies, one strayed patient."""
    made = MadeSet(folder)
    for n in range(2 * PATIENTS):
        side = "test" if n % 4 < 2 else "train"
        if n % 2:
            image = picture(n, 96, 120)
            image[:, :12] = 0
            made.add(f"{n}.jpg", image, "b", f"p{n}", side)
        else:
            made.add(f"{n}.png", picture(n), "a", f"p{n}", side)
    made.add("renamed.bmp", picture(2), "a", "p2", "train")
    small = cv2.resize(picture(6), (72, 72), interpolation=cv2.INTER_AREA)
    made.add("small.png", np.asarray(small, np.uint8), "b", "new", "test")
    made.add("strayed.png", picture(999), "a", "p2", "test")
    return made


def audited(made: MadeSet, **options: Any) -> AuditReport:
    source, split = made.write()
    return audit_source(source, read_sides(split), **options)


def test_planted_copies_are_found(found: AuditReport) -> None:
    first, second = found.pairs
    assert (first.first.key, first.second.key, first.kind) == ("6.png", "small.png", "near")
    assert (first.across_sides, first.across_classes, first.across_patients) == (True, True, True)
    assert (second.first.key, second.second.key, second.kind) == ("2.png", "renamed.bmp", "exact")
    assert (second.across_sides, second.across_classes) == (False, False)


def test_a_planted_patient_on_two_sides_is_found(found: AuditReport) -> None:
    patients = found.patients
    assert patients.on_several_sides == {"p2": {"train": 2, "test": 1}}
    assert patients.in_several_classes == {}
    assert patients.per_class["a"].most_images == 3
    assert patients.per_class["a"].by_side == {"train": 13, "test": 13}


def test_planted_shortcuts_are_found(found: AuditReport) -> None:
    rows = {row.name: row for row in found.shortcuts.rows}
    for name in ("width", "format", "margin left", "size", "file", "image border"):
        assert rows[name].verdict == "warning", name
    for name in ("height", "bits", "margin bottom"):
        assert rows[name].verdict != "warning", name


def test_a_clean_set_is_clean(clean: MadeSet) -> None:
    report = audited(clean)
    assert report.pairs == []
    assert report.patients.on_several_sides == report.patients.in_several_classes == {}
    assert not [f.text for f in report.findings if f.level == "warning"]
    rows = {row.name: row for row in report.shortcuts.rows}
    assert rows["format"].auroc == rows["width"].auroc == 0.5


def test_the_command(tmp_path: Path, picture: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    source, split = make_planted(tmp_path, picture).write()
    (tmp_path / "3.jpg").write_bytes(b"no image")
    out, report = tmp_path / "out", tmp_path / "out" / "audit.json"
    text = run("audit", source, "--split", split, "--out", out, "--json", report)
    assert "left out 1 images that cannot be read" in text
    assert "Pairs of images that look the same: 2" in text
    assert "warning: pairs across sides (a model may be measured" in text
    assert "warning: the class can be told from the size alone" in text
    assert "patients on several sides: 1 of 48" in text
    content = json.loads(report.read_text(), parse_constant=pytest.fail)
    assert content["sides"] == {"train": 24, "test": 26}
    assert content["images"] == 50
    assert content["bad"][0]["key"] == "3.jpg"
    assert content["pairs"][0]["across_sides"] is True
    assert {row["verdict"] for row in content["shortcuts"]["rows"]} >= {"warning"}
    size = content["shortcuts"]["rows"][0]
    assert size["per_class"][size["highest_class"]] == max(size["per_class"].values())
    assert size["class_deviations"].keys() == {"a", "b"}
    assert "highest class" not in text  # of two classes both have one area
    sheet = cv2.imread(str(out / "pairs.png"))
    assert min(sheet.shape[:2]) > 200
    monkeypatch.setattr("magsd.audit.report.find_shortcuts", lambda *_, **__: NO_SHORTCUTS)
    run("audit", source, "--split", split, "--out", out, "--json", report)  # its own files


def test_a_sheet_of_another_audit_does_not_stay(tmp_path: Path) -> None:
    save_png(tmp_path / "pairs.png", np.zeros((9, 9), np.uint8))
    run("audit", "phantom:n=2,size=64", "--out", tmp_path)
    assert not list(tmp_path.iterdir())


def test_sides_are_those_that_a_run_would_choose(
    clean: MadeSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("magsd.audit.report.find_shortcuts", lambda *_, **__: NO_SHORTCUTS)
    source, _ = clean.write()
    report = audit_source(source)
    assert sum(report.sides.values()) == PATIENTS
    assert report.sides["train"] > PATIENTS / 2
    assert "as magsd train would divide them" in run("audit", source)
    assert "none: class 'a' has 12 patients, fewer than the 20 folds" in run(
        "audit", source, "folds=20"
    )


def test_a_published_split_is_taken(tmp_path: Path, picture: Any) -> None:
    for start, side in enumerate(("train", "test")):
        for n, label in enumerate("abab"):
            folder = tmp_path / side / label
            folder.mkdir(parents=True, exist_ok=True)
            seed = 10 * start + n if n else 0
            cv2.imwrite(str(folder / f"{n}.png"), picture(seed))
    report = audit_source(f"folder:{tmp_path}")
    assert report.sides_origin == "as published"
    assert [pair.across_sides for pair in report.pairs] == [True]
    assert report.shortcuts.rows == []


def test_drawn_images_and_one_class() -> None:
    report = audit_source("phantom:n=36,size=64")
    assert {row.name for row in report.shortcuts.rows} == set()  # six patients of each class
    assert "not enough images" in report.shortcuts.note
    json.dumps(report.to_dict(), allow_nan=False)
    source = open_source("phantom:n=2,size=64")
    report = audit_source(source)
    assert report.sides == {}
    assert report.sides_origin.startswith("none: ")
    assert report.images == 2


def test_the_class_that_is_told_is_named(tmp_path: Path, picture: Any) -> None:
    made = MadeSet(tmp_path)
    for n in range(3 * 12):
        label = "abc"[n % 3]
        made.add(f"{n}.png", picture(n, 96, 120 if label == "b" else 96), label, f"p{n}", "train")
    text = run("audit", made.write()[0])
    assert "highest class" in text
    assert "b 1.00 ± 0.00" in text
    assert (
        "warning: class b can be told from the size alone (AUROC 1.00 against the rest; me" in text
    )


def test_further_columns_are_looked_at(clean: MadeSet) -> None:
    """Where a source offers them; stood in for here."""
    source = open_source(clean.write()[0])

    class Wider:
        def __init__(self, record: Any) -> None:
            self.record, self.extra = record, {"site": f"site of {record.label}"}

        def __getattr__(self, name: str) -> Any:
            return getattr(self.record, name)

    source.records = tuple(Wider(record) for record in source.records)  # type: ignore[misc]
    report = audit_source(source, Sides({}, "none"))
    rows = {row.name: row for row in report.shortcuts.rows}
    assert rows["column site"].auroc == 1
    warned = [finding.text for finding in report.findings if finding.level == "warning"]
    text = "column site goes with the class (AUROC 1.00): a confounder, or the label in other words"
    assert warned == [text]


def test_nothing_readable_is_an_error(clean: MadeSet) -> None:
    source, _ = clean.write()
    for path in clean.folder.glob("*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(DataError, match=r"none of the 24 images can be read; 0\.png: "):
        run("audit", source)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no split file"),
        ("file,side\na,b\n", "no split file; the columns key and split are expected"),
        ("key,split\na,train\na,test\n", "line 3: a stands on two sides, train and test"),
        (None, "cannot be read"),
    ],
)
def test_a_split_that_is_none(text: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "split.csv"
    if text is not None:
        path.write_text(text)
    with pytest.raises(DataError, match=message):
        run("audit", "phantom:n=4,size=32", "--split", path)


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(*_: Any, **__: Any) -> None:
        raise AssertionError("work began before the output was checked")

    monkeypatch.setattr("magsd.data.open_source", work)


def _file(place: Path) -> Path:
    place.write_text("somebody's")
    return place


@pytest.mark.parametrize(
    ("option", "make", "message"),
    [
        ("--out", _file, "is not a folder"),
        ("--out", lambda place: place.with_name("x" * 300), "the name is too long"),
        ("--json", _file, "was not written by this command"),
        ("--json", lambda place: place.parent, "is a folder"),
        ("--json", lambda place: Path("/dev/null"), "not a regular file"),
    ],
)
@pytest.mark.usefixtures("no_work")
def test_outputs_are_checked_before_any_work(
    option: str, make: Callable[[Path], Path], message: str, tmp_path: Path
) -> None:
    with pytest.raises(RunError, match=message):
        run("audit", "phantom", option, make(tmp_path / "place"))


@pytest.mark.usefixtures("no_work")
def test_a_sheet_of_others_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "pairs.png").write_text("somebody's")
    with pytest.raises(RunError, match=r"pairs\.png, not written by this command"):
        run("audit", "phantom", "--out", tmp_path)
