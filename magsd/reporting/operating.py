"""Operating points: temperature and thresholds, fitted on validation images, kept with a run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from magsd.reporting.predictions import Kind, PredictionTable

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Rule:
    """How thresholds are chosen.

    name: "argmax" chooses none: the likeliest class is the prediction. "youden": the highest
    sensitivity + specificity. "sensitivity", "specificity": at least `value` of it, and as much of
    the other as that allows. "cost": the lowest cost where a false negative costs `value` times a
    false positive.
    """

    name: Literal["argmax", "youden", "sensitivity", "specificity", "cost"] = "argmax"
    value: float | None = None

    @classmethod
    def parse(cls, text: str) -> Rule:
        """`argmax`, `youden`, `sensitivity=0.95`, `specificity=0.9` or `cost=5:1`; ConfigError."""
        raise NotImplementedError

    def __str__(self) -> str:
        raise NotImplementedError


@dataclass(frozen=True)
class Threshold:
    """A class is positive where its probability is at least `value`.

    value: None without a threshold: positive is then the likeliest class. sensitivity, specificity:
    on the images it was chosen on, NaN if undefined. note: why there is none, or what is wrong.
    """

    value: float | None
    sensitivity: float
    specificity: float
    note: str = ""


@dataclass(frozen=True)
class OperatingPoint:
    """Of one kind of predictions; images, patients: how many it was fitted on."""

    temperature: float
    rule: Rule
    thresholds: dict[str, Threshold]
    images: int
    patients: int
    note: str = ""

    def probabilities(self, logits: ArrayLike) -> Floats:
        """softmax(logits / temperature), (N, K)."""
        raise NotImplementedError

    def positive(self, probabilities: ArrayLike) -> NDArray[np.bool_]:
        """Which images are positive for which class, (N, K), from calibrated probabilities."""
        raise NotImplementedError


@dataclass(frozen=True)
class OperatingPoints:
    """What `operating.json` holds: a point of the raw and of the refined predictions, or None."""

    classes: tuple[str, ...]
    raw: OperatingPoint
    refined: OperatingPoint | None

    def of(self, kind: Kind) -> OperatingPoint:
        """The point of a kind; ValueError for refined predictions without one."""
        raise NotImplementedError

    def apply(self, table: PredictionTable) -> PredictionTable:
        """The table with calibrated probabilities; DataError where the classes differ."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        raise NotImplementedError

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> OperatingPoints:
        """The same from `to_dict`; KeyError, TypeError or ValueError for other values."""
        raise NotImplementedError


def choose_thresholds(
    probabilities: ArrayLike, labels: ArrayLike, classes: Sequence[str], rule: Rule
) -> dict[str, Threshold]:
    """A threshold for each class against the rest, from probabilities (N, K), labels (N,)."""
    raise NotImplementedError


def fit_operating_points(table: PredictionTable, rule: Rule) -> OperatingPoints:
    """Temperature of the logits, then thresholds of the calibrated probabilities.

    table: the rows to fit on, the validation side. Raises DataError where it has none.
    """
    raise NotImplementedError


def write_operating_points(path: str | os.PathLike[str], points: OperatingPoints) -> None:
    """Write `operating.json`."""
    raise NotImplementedError


def read_operating_points(path: str | os.PathLike[str]) -> OperatingPoints:
    """Read `operating.json`; RunError where it is missing or damaged."""
    raise NotImplementedError
