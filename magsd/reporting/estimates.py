"""Measures of a table of predictions with intervals, and differences between two tables."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from magsd.errors import DataError
from magsd.reporting.bootstrap import (
    DEFAULT,
    Difference,
    Floats,
    Interval,
    Resampling,
    bootstrap,
    bootstrap_differences,
)
from magsd.reporting.delong import AurocDifference, compare_aurocs
from magsd.reporting.measures import Measures, grouped
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
    _check_rows(table)
    measures = Measures(table.labels, table.of(kind), cluster_indices(table, resampling))
    intervals = bootstrap(
        measures.values,
        measures.patients,
        resampling,
        rows=measures.images,
        shares=measures.shares,
        biased=measures.biased,
    )
    overall, per_class = grouped(measures, intervals, table.classes)
    confusion = np.zeros((len(table.classes),) * 2, dtype=np.int64)
    np.add.at(confusion, (table.labels, table.predicted(kind)), 1)
    class_images, class_patients = class_counts(table)
    return Estimates(
        images=len(table),
        patients=table.num_patients,
        class_images=class_images,
        class_patients=class_patients,
        confusion=confusion.tolist(),
        overall=overall,
        per_class=per_class,
        resampling=resampling,
    )


def compare(
    first: PredictionTable,
    second: PredictionTable,
    kinds: tuple[Kind, Kind] = ("raw", "raw"),
    resampling: Resampling = DEFAULT,
) -> Comparison:
    """Paired differences of tables over the same images, as `check_comparable` returns them.

    That of the calibration error has no limits and no p-value (`bootstrap_differences`).

    The same table twice with two kinds compares raw and refined predictions.
    """
    _check_rows(first)
    if not np.array_equal(first.keys, second.keys) or first.classes != second.classes:
        raise ValueError("the tables differ in keys or classes: see check_comparable")
    patients = cluster_indices(first, resampling)
    scores = first.of(kinds[0]), second.of(kinds[1])
    pair = [Measures(first.labels, values, patients) for values in scores]

    def statistic(weights: Floats) -> Floats:
        return pair[0].values(weights) - pair[1].values(weights)

    differences = bootstrap_differences(
        statistic, pair[0].patients, resampling, rows=len(first), biased=pair[0].biased
    )
    overall, per_class = grouped(pair[0], differences, first.classes)
    auroc = {
        name: compare_aurocs(
            first.labels == k, scores[0][:, k], scores[1][:, k], patients, resampling.level
        )
        for k, name in enumerate(first.classes)
    }
    return Comparison(first.name, second.name, overall, per_class, auroc, resampling)


def cluster_indices(table: PredictionTable, resampling: Resampling) -> NDArray[np.int64]:
    """Index (N,) of what is drawn: each row's patient, or the row itself."""
    if resampling.cluster == "image":
        return np.arange(len(table))
    indices: NDArray[np.int64] = np.unique(table.patients, return_inverse=True)[1]
    return indices


def class_counts(table: PredictionTable) -> tuple[dict[str, int], dict[str, int]]:
    """Images and patients of each class."""
    images, patients = {}, {}
    for k, name in enumerate(table.classes):
        own = table.patients[table.labels == k]
        images[name], patients[name] = len(own), len(np.unique(own))
    return images, patients


def _check_rows(table: PredictionTable) -> None:
    if not len(table):
        raise DataError(f"{table.name}: no images here; choose a side that has some")
