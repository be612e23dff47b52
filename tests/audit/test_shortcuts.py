"""How well features alone tell the class."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from magsd.audit import shortcuts
from magsd.audit.findings import shortcut_findings
from magsd.audit.shortcuts import ALL, BORDER, ShortcutReport, find_shortcuts

COUNT = 120
LABELS = ["a", "b", "c"] * (COUNT // 3)
PATIENTS = [f"p{number}" for number in range(COUNT)]


def look(
    facts: list[dict[str, Any]], border: Any = None, labels: Any = None, patients: Any = None
) -> ShortcutReport:
    pixels = np.zeros((len(facts), 0), np.uint8) if border is None else border
    return find_shortcuts(facts, pixels, labels or LABELS, patients or PATIENTS)


def by_name(report: ShortcutReport) -> dict[str, shortcuts.Shortcut]:
    return {row.name: row for row in report.rows}


@pytest.fixture
def noise() -> np.random.Generator:
    return np.random.default_rng(0)


def test_what_tells_the_class_is_told_from_what_does_not(noise: np.random.Generator) -> None:
    facts = [
        {
            "width": {"a": 1.0, "b": 2.0, "c": 2.0}[label] + noise.uniform(0, 0.5),
            "height": noise.uniform(),
            "format": "PNG" if label == "c" else "JPEG",
            "bits": 8.0,
        }
        for label in LABELS
    ]
    rows = by_name(look(facts))
    assert rows["width"].per_class["a"] == 1
    assert rows["width"].verdict == rows["format"].verdict == "warning"
    assert rows["height"].verdict != "warning"
    assert (rows["bits"].auroc, rows["bits"].deviation) == (0.5, 0)
    assert rows[ALL].auroc > max(rows["width"].auroc, rows["format"].auroc)
    assert rows[ALL].permuted == pytest.approx(0.5, abs=0.1)
    assert math.isnan(rows["width"].permuted)


def test_noise_says_nothing(noise: np.random.Generator) -> None:
    facts = [dict.fromkeys(("mean", "deviation"), noise.uniform()) for _ in LABELS]
    report = look(facts, noise.integers(0, 256, (COUNT, 50)).astype(np.uint8))
    assert "warning" not in {row.verdict for row in report.rows}
    assert by_name(report)[BORDER].auroc == pytest.approx(0.5, abs=0.15)


def test_the_border_tells_the_class(noise: np.random.Generator) -> None:
    border = noise.integers(0, 200, (COUNT, 50)).astype(np.uint8)
    border[np.array(LABELS) == "b", :20] += 55
    row = by_name(look([{} for _ in LABELS], border))[BORDER]
    assert row.verdict == "warning"
    assert row.per_class["b"] > 0.8
    assert row.permuted == pytest.approx(0.5, abs=0.1)


def test_images_of_a_patient_stay_in_one_fold(noise: np.random.Generator) -> None:
    """Else a number that each patient has for himself would tell the class."""
    patients = [f"p{number // 6}" for number in range(COUNT * 3)]
    labels = [("a", "b")[number // 6 % 2] for number in range(COUNT * 3)]
    own = dict(zip(sorted(set(patients)), noise.uniform(size=len(set(patients))), strict=True))
    facts = [{"mean": own[patient]} for patient in patients]
    assert by_name(look(facts, None, labels, patients))["mean"].auroc < 0.75


@pytest.mark.parametrize(
    ("labels", "patients", "left_out"),
    [
        (["a"] * COUNT, PATIENTS, []),
        (LABELS, [f"of {label}" for label in LABELS], ["a", "b", "c"]),
        (["a"] * (COUNT - 3) + ["b"] * 3, PATIENTS, ["b"]),
    ],
)
def test_not_enough_images(labels: list[str], patients: list[str], left_out: list[str]) -> None:
    report = look([{"mean": 1.0}] * COUNT, None, labels, patients)
    assert report.rows == []
    assert "not enough images" in report.note
    assert report.left_out == left_out


def test_classes_of_few_patients_are_left_out() -> None:
    labels = [*LABELS[:-3], "rare", "rare", "rare"]
    report = look([{"mean": float(label == "a")} for label in labels], None, labels)
    assert report.left_out == ["rare"]
    assert by_name(report)["mean"].per_class.keys() == {"a", "b", "c"}


def test_of_many_images_as_many_of_each_class_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shortcuts, "_MOST_IMAGES", 150)
    labels = ["a"] * 300 + ["b"] * 60
    report = look([{"mean": 0.0}] * 360, None, labels, [str(n) for n in range(360)])
    assert report.images == 75 + 60
    assert report.note == "135 of 360 images"


def test_columns_of_a_table(noise: np.random.Generator) -> None:
    """Numbers, words, and names, which are none of both."""
    facts = [
        {
            "column age": str(noise.integers(90)),
            "column site": site,
            "column file": str(number) + "x",
        }
        for number, site in enumerate("uvw" * (COUNT // 3))
    ]
    facts[0]["column age"] = ""
    rows = by_name(look(facts))
    assert rows["column site"].auroc == 1
    assert rows["column age"].verdict != "warning"
    assert "column file" not in rows


def test_one_of_many_classes_that_is_told_is_warned_of(
    noise: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its width tells one class of fifteen perfectly; the mean over classes hardly moves."""
    monkeypatch.setattr(shortcuts, "_PERMUTATIONS", 0)
    labels = [f"c{number % 15:02}" for number in range(15 * 12)]
    facts = [
        {"width": 2000.0 if label == "c07" else noise.uniform(500, 600), "height": noise.uniform()}
        for label in labels
    ]
    report = look(facts, None, labels, [str(number) for number in range(len(labels))])
    row = by_name(report)["width"]
    assert row.auroc < shortcuts.LITTLE
    assert (row.highest_class, row.per_class["c07"], row.class_deviations["c07"]) == ("c07", 1, 0)
    assert row.verdict == "warning"
    assert by_name(report)["height"].verdict in ("says nothing", "too few images to say")
    texts = [finding.text for finding in shortcut_findings(report)]
    assert any("class c07 can be told from the size alone (AUROC 1.00 against" in t for t in texts)
    assert not any("no shortcut found" in text for text in texts)


def test_many_classes_of_noise_are_not_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """The highest of fifteen classes is high by chance."""
    monkeypatch.setattr(shortcuts, "_PERMUTATIONS", 0)
    labels = [f"c{number % 15:02}" for number in range(15 * 12)]
    patients = [str(number) for number in range(len(labels))]
    for seed in range(3):
        noise = np.random.default_rng(seed)
        names = ("width", "mean", "markers")
        facts: list[dict[str, Any]] = [{name: noise.uniform() for name in names} for _ in labels]
        verdicts = {row.verdict for row in look(facts, None, labels, patients).rows}
        assert "warning" not in verdicts


def test_a_column_that_is_the_label_is_not_called_a_shortcut(noise: np.random.Generator) -> None:
    """Nor does it count among what a model can see."""
    facts = [
        {
            "width": noise.uniform(),
            "height": noise.uniform(),
            "column severity": str("abc".index(label)),
            "column age": str(noise.integers(90)),
        }
        for label in LABELS
    ]
    report = look(facts)
    rows = by_name(report)
    assert rows["column severity"].verdict == "warning"
    assert rows[ALL].auroc == rows["size"].auroc < 0.7
    assert list(rows).index(ALL) < list(rows).index(shortcuts.COLUMNS)
    warnings = [f.text for f in shortcut_findings(report) if f.level == "warning"]
    assert len(warnings) == 1
    assert warnings[0].startswith("column severity goes with class ")
    assert warnings[0].endswith("): a confounder, or the label in other words")


def test_columns_that_tell_only_together(noise: np.random.Generator) -> None:
    bits = noise.integers(0, 2, (COUNT, 2))
    labels = ["ab"[first ^ second] for first, second in bits.tolist()]
    facts = [{"column x": str(x), "column y": str(y)} for x, y in bits.tolist()]
    texts = [f.text for f in shortcut_findings(look(facts, None, labels)) if f.level == "warning"]
    assert len(texts) == 1
    assert texts[0].startswith("the columns of the table go with the class (AUROC 1.00): a conf")


def _row(name: str, auroc: float, deviation: float = 0.0, group: str = "") -> shortcuts.Shortcut:
    areas, deviations = {"a": auroc, "b": auroc}, {"a": deviation, "b": deviation}
    return shortcuts.Shortcut(name, group or name, auroc, deviation, areas, math.nan, 5, deviations)


@pytest.mark.parametrize(
    ("row", "text"),
    [
        (_row("size", 0.55), "no shortcut found: none of the measured features tells the class"),
        (_row("size", 0.67), "the class can be told a little from: size (0.67)"),
        (_row("size", 0.8, 0.4), "too few images to say whether these tell the class: size (0.80)"),
        (_row("size", 0.8), "the class can be told from the size alone (AUROC 0.80); a model may "),
        (
            _row("brightness", 0.8),
            "the class can be told from the brightness alone (AUROC 0.80); a model may learn this"
            " instead of the disease; some of it may be the disease",
        ),
    ],
)
def test_that_no_shortcut_was_found_is_said_only_where_all_say_nothing(
    row: shortcuts.Shortcut, text: str
) -> None:
    report = ShortcutReport([_row("file", 0.5), row], 100, 5, [], "", "")
    (finding,) = shortcut_findings(report)
    assert finding.text.startswith(text)


def test_a_group_stands_for_its_features_unless_one_is_graver() -> None:
    rows = [_row("size", 0.65), _row("width", 0.62, 0.0, "size"), _row("height", 0.9, 0.0, "size")]
    first, second = shortcut_findings(ShortcutReport(rows, 100, 5, [], "", ""))
    assert "told from the height alone" in first.text
    assert second.text.endswith("told a little from: size (0.65)")


def test_a_warning_needs_folds_that_agree() -> None:
    row = shortcuts.Shortcut("mean", "mean", 0.72, 0.3, {}, math.nan, 5)
    assert row.verdict == "too few images to say"


def test_the_same_again() -> None:
    facts = [{"mean": float(number % 7), "deviation": float(number % 5)} for number in range(COUNT)]
    assert repr(look(facts)) == repr(look(facts))
