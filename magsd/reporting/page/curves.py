"""ROC and precision-recall curves with bands of bootstrap resamples, on fixed grids."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from magsd.reporting.bootstrap import Resampling
from magsd.reporting.predictions import Kind, PredictionTable

Floats = NDArray[np.float64]
#: More resamples change no band by the width of a line.
BAND_RESAMPLES = 200
_POINTS = 201


@dataclass(frozen=True, eq=False)
class Curve:
    """x, y (M,); low, high (M,): limits of the band at every x, or None."""

    x: Floats
    y: Floats
    low: Floats | None = None
    high: Floats | None = None


@dataclass(frozen=True, eq=False)
class ClassCurves:
    """Of one class against the rest; share: of the images that are of the class."""

    roc: Curve
    precision_recall: Curve
    share: float


def class_curves(
    table: PredictionTable, kind: Kind, index: int, resampling: Resampling
) -> ClassCurves | None:
    """Curves of class `index`; None where every image, or none, is of it.

    The bands are pointwise percentiles of at most 200 resamples.
    """
    positive = table.labels == index
    if positive.all() or not positive.any():
        return None
    scores = table.of(kind)[:, index]
    order = np.argsort(-scores, kind="stable")
    # Equal scores are one point.
    ends = np.flatnonzero(np.diff(scores[order], append=-np.inf))
    positive = positive[order].astype(np.float64)
    names = table.keys if resampling.cluster == "image" else table.patients
    _, patient = np.unique(names[order], return_inverse=True)
    roc, recall = _curves(positive, np.ones(len(positive)), ends)
    generator = np.random.default_rng(resampling.seed)
    patients = int(patient.max()) + 1
    drawn = []
    for _ in range(min(resampling.resamples, BAND_RESAMPLES)):
        counts = np.bincount(generator.integers(patients, size=patients), minlength=patients)
        weights = counts[patient].astype(np.float64)
        if 0 < weights @ positive < weights.sum():
            drawn.append(_curves(positive, weights, ends))
    tail = (1 - resampling.level) / 2
    grid = np.linspace(0, 1, _POINTS)
    curves = []
    for k, values in enumerate((roc, recall)):
        band = None
        if len(drawn) > 1:
            band = np.quantile(np.stack([each[k] for each in drawn]), (tail, 1 - tail), axis=0)
        curves.append(Curve(grid, values, *(band if band is not None else (None, None))))
    return ClassCurves(curves[0], curves[1], float(positive.mean()))


def _curves(positive: Floats, weights: Floats, ends: NDArray[np.intp]) -> tuple[Floats, Floats]:
    """Sensitivity at each false-positive rate of the grid, and precision at each recall."""
    grid = np.linspace(0, 1, _POINTS)
    hits = np.cumsum(weights * positive)[ends]
    taken = np.cumsum(weights)[ends]
    false = taken - hits
    recall, rate = hits / hits[-1], false / false[-1]
    # The highest sensitivity at a rate that is at most the grid's, up to rounding.
    place = np.searchsorted(rate, grid + 1e-12, side="right") - 1
    sensitivity = np.where(place >= 0, recall[np.maximum(place, 0)], 0.0)
    precision = hits / np.maximum(taken, 1e-300)
    # At recall 0 that of the highest score that the resample has.
    first = np.searchsorted(recall, np.maximum(grid, 1e-12) - 1e-12)
    first = np.maximum(first, np.searchsorted(taken, 0, side="right"))
    return sensitivity, precision[np.minimum(first, len(precision) - 1)]
