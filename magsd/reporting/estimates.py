"""Measures of a table of predictions with intervals, and differences between two tables."""

from __future__ import annotations

from dataclasses import dataclass

from magsd.reporting.bootstrap import DEFAULT, Difference, Interval, Resampling
from magsd.reporting.delong import AurocDifference
from magsd.reporting.predictions import Kind, PredictionTable


@dataclass(frozen=True)
class Estimates:
    """Measures with intervals.

    overall: measure of `measures.OVERALL` -> interval. per_class: class -> measure of
    `measures.PER_CLASS` -> interval. class_images, class_patients: counts by class.
    confusion[i][j]: images of class i taken for class j.
    """

    images: int
    patients: int
    class_images: dict[str, int]
    class_patients: dict[str, int]
    confusion: list[list[int]]
    overall: dict[str, Interval]
    per_class: dict[str, dict[str, Interval]]
    resampling: Resampling


@dataclass(frozen=True)
class Comparison:
    """First minus second over the same images, measures as in `Estimates`.

    auroc: class -> the test of DeLong.
    """

    first: str
    second: str
    overall: dict[str, Difference]
    per_class: dict[str, dict[str, Difference]]
    auroc: dict[str, AurocDifference]
    resampling: Resampling


def estimate(
    table: PredictionTable, kind: Kind = "raw", resampling: Resampling = DEFAULT
) -> Estimates:
    """Measures of the rows of a table; DataError where it has none."""
    raise NotImplementedError


def compare(
    first: PredictionTable,
    second: PredictionTable,
    kinds: tuple[Kind, Kind] = ("raw", "raw"),
    resampling: Resampling = DEFAULT,
) -> Comparison:
    """Paired differences of tables over the same images, as `check_comparable` returns them.

    The same table twice with two kinds compares raw and refined predictions.
    """
    raise NotImplementedError
