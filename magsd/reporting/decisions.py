"""What thresholds and decisions are worth: counts and rates at a threshold, net benefit."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from magsd.errors import DataError
from magsd.reporting.bootstrap import DEFAULT, Floats, Interval, Resampling, bootstrap
from magsd.reporting.estimates import cluster_indices
from magsd.reporting.measures import ratio
from magsd.reporting.operating import OperatingPoint
from magsd.reporting.predictions import Kind, PredictionTable


@dataclass(frozen=True)
class ThresholdMeasures:
    """A class at its threshold: counts of images, and rates with intervals.

    ppv, npv: share of the positives (negatives) that are of the class (of the rest), at the
    frequency of the class among these images.
    """

    true_positives: int
    false_positives: int
    false_negatives: int
    true_negatives: int
    sensitivity: Interval
    specificity: Interval
    ppv: Interval
    npv: Interval


@dataclass(frozen=True)
class DecisionCurve:
    """Net benefit (T,) at threshold probabilities (T,).

    model: with its positives; everyone: with all images positive; no one is positive: 0.
    """

    thresholds: Floats
    model: Floats
    everyone: Floats


def measure_thresholds(
    table: PredictionTable,
    point: OperatingPoint,
    kind: Kind = "raw",
    resampling: Resampling = DEFAULT,
) -> dict[str, ThresholdMeasures]:
    """Class -> measures at the thresholds of a point, of the rows of a table.

    The point's temperature is applied to the table's logits of that kind. Raises DataError for a
    table without rows or of other classes, whose order may differ.
    """
    if set(point.thresholds) != set(table.classes):
        raise DataError(
            f"{table.name}: the operating points were fitted for other classes,"
            f" {', '.join(point.thresholds)}"
        )
    if not len(table):
        raise DataError(f"{table.name}: no images here; choose a side that has some")
    point = point.ordered(table.classes)
    positive = point.positive(point.probabilities(table.logits_of(kind)))
    patients = cluster_indices(table, resampling)
    return {
        name: _measure(table.labels == k, positive[:, k], patients, resampling)
        for k, name in enumerate(table.classes)
    }


def _measure(
    of_class: NDArray[np.bool_],
    positive: NDArray[np.bool_],
    patients: NDArray[np.int64],
    resampling: Resampling,
) -> ThresholdMeasures:
    cells = np.stack(
        [of_class & positive, ~of_class & positive, of_class & ~positive, ~of_class & ~positive]
    )
    count = int(patients.max()) + 1
    sums = np.stack([np.bincount(patients, cell, minlength=count) for cell in cells])
    # Rates as (numerator, the other part of the denominator), by the order of the cells.
    rates = np.array([(0, 2), (3, 1), (0, 1), (3, 2)])

    def statistic(weights: Floats) -> Floats:
        counts = sums @ weights
        part, whole = counts[rates[:, 0]], counts[rates].sum(axis=1)
        return ratio(part, whole)

    shares = np.array([np.count_nonzero(sums[list(rate)].sum(axis=0)) for rate in rates])
    intervals = bootstrap(statistic, count, resampling, shares=shares)
    return ThresholdMeasures(*cells.sum(axis=1).tolist(), *intervals)


def decision_curve(probabilities: ArrayLike, labels: ArrayLike, index: int) -> DecisionCurve:
    """Net benefit (Vickers and Elkin 2006) of class `index` at 0.01, 0.02 ... 0.99.

    At t it is TP / N - FP / N * t / (1 - t), where an image is positive at a probability of at
    least t. probabilities: (N, K), calibrated. labels: (N,) class indices.
    """
    scores = np.asarray(probabilities, dtype=np.float64)[:, index]
    of_class = np.asarray(labels) == index
    thresholds = np.arange(1, 100) / 100
    odds = thresholds / (1 - thresholds)
    true = of_class.sum() - np.searchsorted(np.sort(scores[of_class]), thresholds)
    false = (~of_class).sum() - np.searchsorted(np.sort(scores[~of_class]), thresholds)
    return DecisionCurve(
        thresholds=thresholds,
        model=(true - false * odds) / len(scores),
        everyone=(of_class.sum() - (~of_class).sum() * odds) / len(scores),
    )
