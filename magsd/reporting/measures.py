"""Measures of probabilities against labels, for many weightings of the images at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import coo_array, csr_array

from magsd.reporting.calibration import BINS, bin_indices
from magsd.reporting.predictions import SMALLEST, Floats

Ints = NDArray[np.int64]
T = TypeVar("T")
#: Over all images; means are unweighted over the classes that have images (macro).
OVERALL = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy (mean sensitivity)",
    "precision": "precision",
    "f1": "F1",
    "specificity": "specificity",
    "auroc": "AUROC",
    "average_precision": "average precision",
    "nll": "negative log-likelihood",
    "brier": "Brier score",
    "ece": "calibration error (ECE)",
}
#: Of each class against the rest.
PER_CLASS = {
    "precision": "precision",
    "recall": "sensitivity (recall)",
    "specificity": "specificity",
    "f1": "F1",
    "auroc": "AUROC",
    "average_precision": "average precision",
}
# The measure of each class whose mean is one over all images.
_MACRO = {name: name for name in OVERALL if name in PER_CLASS} | {"balanced_accuracy": "recall"}


class Measures:
    """Measures of N images over K classes in P patients; undefined ones are NaN.

    labels: (N,) class indices. probabilities: (N, K). patients: (N,) index in 0..P-1; None: each
    image is its own. names: (measure, index of the class or None for all) of the M rows of
    `values`: those of OVERALL, then those of PER_CLASS for each class.

    As in `magsd.evaluation.metrics`: a class that is never predicted has precision 0; recall, F1
    and average precision of a class without images, and specificity and AUROC where every image is
    of the class, are undefined; means leave out classes without images. Where a resample lacks a
    class that the sample has, its means are undefined.

    nll: mean -log of the probability of the true class, at least 2.2e-16. brier: mean sum of the
    squared differences over all classes, within 0..2. ece: mean difference of confidence and
    accuracy over bins of equal numbers of images (`calibration.bin_indices`), which resamples keep;
    chance makes it too high, the more so the fewer the images.

    shares: (M,) of each measure that is a share, the number of patients it is a share of; 0 of
    others. biased: (M,) which measures chance makes too high.
    """

    def __init__(
        self, labels: ArrayLike, probabilities: ArrayLike, patients: ArrayLike | None = None
    ) -> None:
        truth = np.asarray(labels, dtype=np.int64)
        scores = np.asarray(probabilities, dtype=np.float64)
        _check(truth, scores)
        self.images, self.classes = scores.shape
        of = np.arange(len(truth)) if patients is None else np.asarray(patients, dtype=np.int64)
        self.patients = int(of.max()) + 1
        self.names: tuple[tuple[str, int | None], ...] = (
            *((name, None) for name in OVERALL),
            *((name, k) for k in range(self.classes) for name in PER_CLASS),
        )
        predicted = scores.argmax(axis=1)
        self._sums = _patient_sums(truth, scores, predicted, of, self.patients)
        self._present = np.bincount(truth, minlength=self.classes) > 0
        self._rankings = [
            _Ranking(truth == k, scores[:, k], of, self.patients) for k in range(self.classes)
        ]
        self.shares = self._patients_of_shares(truth, predicted, of)
        self.biased = np.array([name == "ece" for name, _ in self.names])

    def values(self, weights: Floats) -> Floats:
        """Values (M, R) where patient p counts weights[p, r] times, from weights (P, R)."""
        classes = self.classes
        sums = self._sums @ weights
        support, taken, right = sums[: 3 * classes].reshape(3, classes, -1)
        nll, brier, total = sums[3 * classes : 3 * classes + 3]
        gaps = sums[3 * classes + 3 :]
        ranked = np.stack([ranking.values(weights) for ranking in self._rankings])
        others = total - support
        by_class = {
            "precision": ratio(right, taken, 0.0),
            "recall": ratio(right, support),
            "specificity": ratio(others - (taken - right), others),
            "f1": ratio(2 * right, np.where(support > 0, support + taken, 0)),
            "auroc": ranked[:, 0],
            "average_precision": ranked[:, 1],
        }
        overall = {
            "accuracy": ratio(right.sum(axis=0), total),
            "nll": ratio(nll, total),
            "brier": ratio(brier, total),
            "ece": ratio(np.abs(gaps).sum(axis=0), total),
        }
        absent = (support[self._present] <= 0).any(axis=0)
        for name, of_class in _MACRO.items():
            means = by_class[of_class][self._present].mean(axis=0)
            overall[name] = np.where(absent, math.nan, means)
        per_class = np.stack([by_class[name] for name in PER_CLASS], axis=1)
        first = np.stack([overall[name] for name in OVERALL])
        return np.concatenate([first, per_class.reshape(-1, weights.shape[1])])

    def _patients_of_shares(self, truth: Ints, predicted: Ints, of: Ints) -> Ints:
        """Of each measure that is a share of images, how many patients these have; 0 of others."""

        def patients(mask: NDArray[np.bool_]) -> int:
            return len(np.unique(of[mask]))

        def share(name: str, k: int | None) -> int:
            if name == "accuracy":
                return self.patients
            if k is None:
                return 0
            if name == "precision":
                return patients(predicted == k)
            if name == "recall":
                return patients(truth == k)
            return patients(truth != k) if name == "specificity" else 0

        return np.array([share(name, k) for name, k in self.names], dtype=np.int64)


def point_values(
    labels: ArrayLike, probabilities: ArrayLike, classes: Sequence[str]
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Values of OVERALL, and for every class those of PER_CLASS, without intervals."""
    measures = Measures(labels, probabilities)
    values = measures.values(np.ones((measures.patients, 1)))[:, 0].tolist()
    return grouped(measures, values, classes)


def grouped(
    measures: Measures, values: Sequence[T], classes: Sequence[str]
) -> tuple[dict[str, T], dict[str, dict[str, T]]]:
    """M values of `measures.names` as measure -> value, and class -> measure -> value."""
    overall: dict[str, T] = {}
    per_class: dict[str, dict[str, T]] = {name: {} for name in classes}
    for (name, k), value in zip(measures.names, values, strict=True):
        of = overall if k is None else per_class[classes[k]]
        of[name] = value
    return overall, per_class


def most_confused(
    confusion: Sequence[Sequence[int]], count: int
) -> list[tuple[int, int, int, float]]:
    """Up to `count` pairs of a true and another predicted class, those with most images first.

    Each with its number of images and their share of the true class.
    """
    counts = np.array(confusion)
    totals = counts.sum(axis=1)
    np.fill_diagonal(counts, 0)
    order = np.argsort(-counts, axis=None, kind="stable")[:count]
    pairs = zip(*np.unravel_index(order, counts.shape), strict=True)
    return [
        (int(i), int(j), int(counts[i, j]), float(counts[i, j] / totals[i]))
        for i, j in pairs
        if counts[i, j]
    ]


class _Ranking:
    """AUROC and average precision of one class; equal scores count as scikit-learn counts them.

    In the order of the G different scores of positives, sums over the images of a patient:
    positives of each score (G, P); negatives below it and not below the one before, and at last
    those that are below none (G + 1, P); negatives of the same score (G, P), None without any.
    """

    def __init__(
        self, positive: NDArray[np.bool_], scores: Floats, patients: Ints, count: int
    ) -> None:
        values, own = np.unique(scores[positive], return_inverse=True)
        others, of_others = scores[~positive], patients[~positive]
        above = np.searchsorted(values, others, side="right")
        equal = above != np.searchsorted(values, others, side="left")
        self._own = _sums(own, patients[positive], len(values), count)
        self._between = _sums(above, of_others, len(values) + 1, count)
        self._equal = None
        if equal.any():
            self._equal = _sums(above[equal] - 1, of_others[equal], len(values), count)

    def values(self, weights: Floats) -> Floats:
        """AUROC and average precision (2, R) under weights (P, R) of the patients."""
        own, below = self._own @ weights, self._between @ weights
        np.cumsum(below, axis=0, out=below)
        negatives, below = below[-1], below[:-1]
        up_to = np.cumsum(own, axis=0)
        positives = own.sum(axis=0)
        # In place: these arrays are most of the memory and of the time.
        at_least = np.subtract(positives + own, up_to, out=up_to)
        precision = ratio(at_least, at_least + (negatives - below), 0.0)
        average = (precision * own).sum(axis=0)
        if self._equal is not None:
            below += (self._equal @ weights) / 2
        below *= own
        return np.stack(
            [ratio(below.sum(axis=0), positives * negatives), ratio(average, positives)]
        )


def _sums(rows: Ints, patients: Ints, count: int, columns: int) -> csr_array:
    """How many images of each patient fall into each row, (count, columns)."""
    shape = (count, columns)
    return coo_array((np.ones(len(rows)), (rows, patients)), shape=shape).tocsr()


def ratio(part: Floats, whole: Floats, undefined: float = math.nan) -> Floats:
    """A quotient; `undefined` where `whole` is 0."""
    return np.divide(part, whole, out=np.full_like(part, undefined), where=whole > 0)


def _patient_sums(
    truth: Ints, scores: Floats, predicted: Ints, patients: Ints, count: int
) -> csr_array:
    """Sums (3 K + 3 + bins, P) over the images of a patient that measures are made of.

    Images of each class, taken for each class, and right; NLL, Brier score, images; confidence
    minus accuracy in each bin.
    """
    images, classes = scores.shape
    own = scores[np.arange(images), truth]
    confidence = scores[np.arange(images), predicted]
    right = predicted == truth
    squares = (scores**2).sum(axis=1) - own**2 + (1 - own) ** 2
    ones = np.ones(images)
    columns = [
        (truth, ones),
        (classes + predicted, ones),
        (2 * classes + truth, right.astype(np.float64)),
        (np.full(images, 3 * classes), -np.log(np.clip(own, SMALLEST, None))),
        (np.full(images, 3 * classes + 1), squares),
        (np.full(images, 3 * classes + 2), ones),
        (3 * classes + 3 + bin_indices(confidence), confidence - right),
    ]
    index = np.concatenate([column for column, _ in columns])
    values = np.concatenate([value for _, value in columns])
    shape = (3 * classes + 3 + BINS, count)
    return coo_array((values, (index, np.tile(patients, len(columns)))), shape=shape).tocsr()


def _check(truth: Ints, scores: Floats) -> None:
    if truth.ndim != 1 or not len(truth):
        raise ValueError(f"labels: expected (N,) with N >= 1, got shape {truth.shape}")
    if scores.ndim != 2 or len(scores) != len(truth):
        raise ValueError(f"probabilities: expected {len(truth)} rows, got shape {scores.shape}")
    if truth.min() < 0 or truth.max() >= scores.shape[1]:
        raise ValueError(f"labels: expected 0..{scores.shape[1] - 1}")
    bad = int((~np.isfinite(scores)).any(axis=1).sum())
    if bad:
        raise ValueError(f"probabilities: not finite for {bad} of {len(truth)} images")
