"""How well features alone tell the class."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from magsd.audit import shortcuts
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


def test_a_warning_needs_folds_that_agree() -> None:
    row = shortcuts.Shortcut("mean", "mean", 0.72, 0.3, {}, math.nan, 5)
    assert row.verdict == "too few images to say"


def test_the_same_again() -> None:
    facts = [{"mean": float(number % 7), "deviation": float(number % 5)} for number in range(COUNT)]
    assert repr(look(facts)) == repr(look(facts))
