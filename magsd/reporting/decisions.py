"""What thresholds and decisions are worth: counts and rates at a threshold, net benefit."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from magsd.reporting.bootstrap import DEFAULT, Interval, Resampling
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
    """Net benefit (T,) at threshold probabilities (T,) of the model, of all and of no positives."""

    thresholds: NDArray[np.float64]
    model: NDArray[np.float64]
    everyone: NDArray[np.float64]
    no_one: NDArray[np.float64]


def measure_thresholds(
    table: PredictionTable,
    point: OperatingPoint,
    kind: Kind = "raw",
    resampling: Resampling = DEFAULT,
) -> dict[str, ThresholdMeasures]:
    """Class -> measures at the thresholds of a point, of the rows of a table.

    The table is not calibrated: the point's temperature is applied to its logits.
    """
    raise NotImplementedError


def decision_curve(probabilities: ArrayLike, labels: ArrayLike, index: int) -> DecisionCurve:
    """Net benefit (Vickers and Elkin 2006) of class `index` at 0.01, 0.02 ... 0.99.

    An image is positive where its probability is at least the threshold.
    """
    raise NotImplementedError
