"""Operating points: temperature and thresholds, fitted on validation images, kept with a run."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from magsd.errors import DataError, MagsdError, RunError
from magsd.outputs import write_text
from magsd.reporting.calibration import BOUNDS, calibrated, fit_temperature, is_separated
from magsd.reporting.predictions import Floats, Kind, PredictionTable
from magsd.reporting.rules import Rule


@dataclass(frozen=True)
class Threshold:
    """A class is positive where its probability is at least `value`.

    value: None without a threshold: positive is then the likeliest class. sensitivity, specificity:
    on the images it was chosen on, None if undefined. note: why there is none, or what is odd.
    """

    value: float | None
    sensitivity: float | None
    specificity: float | None
    note: str = ""


@dataclass(frozen=True)
class OperatingPoint:
    """Of one kind of predictions.

    thresholds: class -> threshold of its calibrated probability. images, patients: how many it was
    fitted on. note: what is odd about the temperature.
    """

    temperature: float
    rule: Rule
    thresholds: dict[str, Threshold]
    images: int
    patients: int
    note: str = ""

    def ordered(self, classes: Sequence[str]) -> OperatingPoint:
        """The same with the thresholds in the order of these classes; KeyError for an unknown."""
        return replace(self, thresholds={name: self.thresholds[name] for name in classes})

    def probabilities(self, logits: ArrayLike) -> Floats:
        """softmax(logits / temperature), (N, K) float64; argmax as that of the logits."""
        return calibrated(logits, self.temperature)

    def positive(self, probabilities: ArrayLike) -> NDArray[np.bool_]:
        """Which images are positive for which class, (N, K), from calibrated probabilities.

        An image may be positive for several classes or none; under "argmax" it is for one.
        """
        scores = np.asarray(probabilities, dtype=np.float64)
        positive = np.zeros(scores.shape, dtype=bool)
        positive[np.arange(len(scores)), scores.argmax(axis=1)] = True
        for k, threshold in enumerate(self.thresholds.values()):
            if threshold.value is not None:
                positive[:, k] = scores[:, k] >= threshold.value
        return positive


@dataclass(frozen=True)
class OperatingPoints:
    """What `operating.json` holds: a point of the raw and of the refined predictions, or None."""

    classes: tuple[str, ...]
    raw: OperatingPoint
    refined: OperatingPoint | None

    def of(self, kind: Kind) -> OperatingPoint:
        """The point of a kind; ValueError for refined predictions without one."""
        point = self.raw if kind == "raw" else self.refined
        if point is None:
            raise ValueError("no operating point of refined predictions")
        return point

    def apply(self, table: PredictionTable) -> PredictionTable:
        """The table with calibrated probabilities; logits, and the order of classes, stay.

        Raises DataError where the classes differ, or the table has refined predictions and these
        points have none.
        """
        if set(self.classes) != set(table.classes):
            raise DataError(
                f"{table.name}: the classes {', '.join(table.classes)} are not those of the"
                f" operating points, {', '.join(self.classes)}"
            )
        refined = None
        if table.refined_probabilities is not None:
            if self.refined is None:
                raise DataError(
                    f"{table.name}: has refined predictions, and the operating points were fitted"
                    " without any; fit them again"
                )
            refined = self.refined.probabilities(table.logits_of("refined"))
        raw = self.raw.probabilities(table.logits_of("raw"))
        return replace(table, probabilities=raw, refined_probabilities=refined)

    def to_dict(self) -> dict[str, Any]:
        """As JSON types; a rule is its text."""
        points = {"raw": self.raw, "refined": self.refined}
        values = {kind: point and asdict(point) | {"rule": str(point.rule)}
                  for kind, point in points.items()}  # fmt: skip
        return {**values, "classes": list(self.classes)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> OperatingPoints:
        """The same from `to_dict`.

        Raises KeyError, TypeError, ValueError or ConfigError for values that are not from there.
        """
        classes = tuple(values["classes"])
        refined = values["refined"]
        return cls(
            classes=classes,
            raw=_point(values["raw"], classes),
            refined=None if refined is None else _point(refined, classes),
        )


def choose_thresholds(
    probabilities: ArrayLike, labels: ArrayLike, classes: Sequence[str], rule: Rule
) -> dict[str, Threshold]:
    """A threshold for each class against the rest, from probabilities (N, K), labels (N,).

    A threshold lies halfway between the lowest value that is positive and the next lower one, so
    that rounding of another device changes nothing; with every image positive it is 0, with none it
    is above all of them. Equal values are all positive or all negative. Of thresholds that the rule
    finds equal, the one with the higher specificity is taken; under "youden" and "cost" the one
    with the higher sensitivity. A class without images, or without images of others, gets no
    threshold and a note.
    """
    scores, truth = np.asarray(probabilities, dtype=np.float64), np.asarray(labels)
    return {
        name: _choose(scores[:, k], truth == k, scores.argmax(axis=1) == k, rule)
        for k, name in enumerate(classes)
    }


def _choose(
    scores: Floats, of_class: NDArray[np.bool_], likeliest: NDArray[np.bool_], rule: Rule
) -> Threshold:
    m, n = int(of_class.sum()), int((~of_class).sum())
    if rule.name == "argmax":
        hits, correct = int((likeliest & of_class).sum()), int((~likeliest & ~of_class).sum())
        return Threshold(None, _share(hits, m), _share(correct, n))
    if not m or not n:
        side = "no image is of this class" if not m else "every image is of this class"
        return Threshold(None, None, None, f"{side}: the likeliest class is taken instead")
    # One candidate below each distinct value, and one above all.
    values = np.unique(scores)
    positives = np.searchsorted(np.sort(scores[of_class]), values)
    negatives = np.searchsorted(np.sort(scores[~of_class]), values)
    tp = np.append(m - positives, 0)
    tn = np.append(negatives, n)
    best = _best(tp, tn, m, n, rule)
    note = ""
    if best == 0:
        note = "every image of the fit is positive"
    elif best == len(values):
        note = "no image of the fit is positive"
    return Threshold(_between(values, best), float(tp[best] / m), float(tn[best] / n), note)


def _best(tp: NDArray[np.int64], tn: NDArray[np.int64], m: int, n: int, rule: Rule) -> int:
    """Index of the best candidate; whole numbers, so that equal ones are equal."""
    if rule.name == "sensitivity":
        assert rule.value is not None
        # Specificity rises with the candidates, sensitivity falls.
        return int(np.flatnonzero(tp / m >= rule.value)[-1])
    if rule.name == "specificity":
        assert rule.value is not None
        feasible = np.flatnonzero(tn / n >= rule.value)
        return int(feasible[tp[feasible] == tp[feasible[0]]][-1])
    if rule.name == "youden":
        return int((tp * n + tn * m).argmax())
    assert rule.value is not None
    return int(((m - tp) * rule.value + (n - tn)).argmin())


def _between(values: Floats, index: int) -> float:
    """Halfway between a distinct value and the next lower one, or that value itself."""
    if index == 0:
        return 0.0
    low = float(values[index - 1])
    high = float(values[index]) if index < len(values) else 1.0
    if high <= low:
        return float(np.nextafter(low, math.inf))
    middle = (low + high) / 2
    return middle if middle > low else high


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def fit_operating_points(table: PredictionTable, rule: Rule) -> OperatingPoints:
    """Temperature of the logits, then thresholds of the calibrated probabilities.

    table: the rows to fit on, the validation side. Raises DataError where it has none.
    """
    if not len(table):
        raise DataError(f"{table.name}: no images to fit operating points on")
    points = {kind: _fit(table, kind, rule) for kind in table.kinds}
    return OperatingPoints(table.classes, points["raw"], points.get("refined"))


def _fit(table: PredictionTable, kind: Kind, rule: Rule) -> OperatingPoint:
    logits = table.logits_of(kind)
    temperature = fit_temperature(logits, table.labels)
    note = ""
    if is_separated(logits, table.labels):
        note = "every image of the fit is right, which leaves the temperature open: kept at 1"
    elif not BOUNDS[0] * 1.001 < temperature < BOUNDS[1] / 1.001:
        note = f"the temperature is at an end of its range, {BOUNDS[0]:g} to {BOUNDS[1]:g}"
    probabilities = calibrated(logits, temperature)
    return OperatingPoint(
        temperature=temperature,
        rule=rule,
        thresholds=choose_thresholds(probabilities, table.labels, table.classes, rule),
        images=len(table),
        patients=table.num_patients,
        note=note,
    )


def write_operating_points(path: str | os.PathLike[str], points: OperatingPoints) -> None:
    """Write `operating.json`."""
    write_text(Path(path), json.dumps(points.to_dict(), indent=2, allow_nan=False) + "\n")


def read_operating_points(path: str | os.PathLike[str]) -> OperatingPoints:
    """Read `operating.json`; RunError where it is missing or damaged."""
    try:
        return OperatingPoints.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise RunError(f"{path}: no such file; it is written at the end of training") from None
    except OSError as error:
        raise RunError(f"{path}: cannot be read ({error.strerror})") from error
    except (ArithmeticError, KeyError, TypeError, ValueError, MagsdError) as error:
        raise RunError(f"{path}: holds no operating points ({error!r}); write it again") from error


def _point(values: dict[str, Any], classes: tuple[str, ...]) -> OperatingPoint:
    thresholds = {name: Threshold(**values["thresholds"][name]) for name in classes}
    temperature = float(values["temperature"])
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature {temperature}")
    rest = {name: values[name] for name in ("images", "patients", "note")}
    return OperatingPoint(temperature, Rule.parse(values["rule"]), thresholds, **rest)
