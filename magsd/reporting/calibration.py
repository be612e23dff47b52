"""Calibration of probabilities: a temperature for logits, and the bins of a reliability plot."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax
from scipy.stats import rankdata

from magsd.errors import DataError

Floats = NDArray[np.float64]
#: Bins of the calibration error and of reliability plots.
BINS = 15
#: Within which temperatures are looked for.
BOUNDS = (0.1, 10.0)


@dataclass(frozen=True)
class Bin:
    """One bin of a reliability plot.

    low, high: its lowest and highest confidence, which may be equal. confidence: mean confidence.
    accuracy: share of the images that are right.
    """

    low: float
    high: float
    images: int
    confidence: float
    accuracy: float


def fit_temperature(logits: ArrayLike, labels: ArrayLike) -> float:
    """The temperature T within BOUNDS under which softmax(logits / T) has the lowest NLL.

    logits: (N, K). labels: (N,) class indices. The NLL is never above that of T = 1 (Guo et al.
    2017). Where the likeliest class of every image is the true one, a lower T is always better and
    none is the best: T stays 1.
    Raises DataError for no images or logits that are not finite.
    """
    values, truth = np.asarray(logits, dtype=np.float64), np.asarray(labels, dtype=np.int64)
    if not len(values):
        raise DataError("no images to fit a temperature on")
    bad = int((~np.isfinite(values)).any(axis=1).sum())
    if bad:
        raise DataError(f"logits are not finite for {bad} of {len(values)} images; leave these out")
    if is_separated(values, truth):
        return 1.0

    def nll(log_temperature: float) -> float:
        return negative_log_likelihood(values / math.exp(log_temperature), truth)

    bounds = (math.log(BOUNDS[0]), math.log(BOUNDS[1]))
    found = minimize_scalar(nll, bounds=bounds, method="bounded", options={"xatol": 1e-6})
    return math.exp(found.x) if found.fun < nll(0.0) else 1.0


def fit_binary_temperature(logits: ArrayLike, targets: ArrayLike) -> float:
    """`fit_temperature` of one finding: sigmoid(logits / T), logits (N,), targets (N,) 0 or 1."""
    values = np.asarray(logits, dtype=np.float64)
    # The sigmoid of a logit is the softmax over it and 0.
    return fit_temperature(np.stack([np.zeros_like(values), values], axis=1), targets)


def is_separated(logits: ArrayLike, labels: ArrayLike) -> bool:
    """Whether the true class of every image has the highest logit, alone."""
    values, truth = np.asarray(logits), np.asarray(labels)
    own = np.take_along_axis(values, truth[:, None], axis=1)
    return bool(((values >= own).sum(axis=1) == 1).all())


def negative_log_likelihood(logits: ArrayLike, labels: ArrayLike) -> float:
    """Mean NLL of softmax(logits), without clipping."""
    logs = log_softmax(np.asarray(logits, dtype=np.float64), axis=1)
    return float(-np.take_along_axis(logs, np.asarray(labels)[:, None], axis=1).mean())


def calibrated(logits: ArrayLike, temperature: float) -> Floats:
    """softmax(logits / temperature), (N, K) float64."""
    scaled: Floats = softmax(np.asarray(logits, dtype=np.float64) / temperature, axis=1)
    return scaled


def bin_indices(confidence: ArrayLike, bins: int = BINS) -> NDArray[np.int64]:
    """Bin (N,) in 0..bins-1 of each confidence, by rank, equal ones in the same bin.

    Bins have as equal numbers of images as equal confidences allow, which may leave some empty.
    """
    values = np.asarray(confidence, dtype=np.float64)
    ranks = rankdata(values, method="average") - 0.5
    return np.asarray((ranks * (bins / len(values))).astype(np.int64))


def reliability(probabilities: ArrayLike, labels: ArrayLike, bins: int = BINS) -> list[Bin]:
    """Bins of the probability of the predicted class, those of the ECE; empty ones are left out."""
    scores = np.asarray(probabilities, dtype=np.float64)
    return _bins(scores.max(axis=1), scores.argmax(axis=1) == np.asarray(labels), bins)


def class_reliability(
    probabilities: ArrayLike, labels: ArrayLike, index: int, bins: int = BINS
) -> list[Bin]:
    """Bins of the probability of one class; accuracy is then the share of images of the class."""
    scores = np.asarray(probabilities, dtype=np.float64)
    return _bins(scores[:, index], np.asarray(labels) == index, bins)


def _bins(confidence: Floats, right: NDArray[np.bool_], bins: int) -> list[Bin]:
    index = bin_indices(confidence, bins)
    found = []
    for k in np.unique(index):
        values = confidence[index == k]
        found.append(
            Bin(
                low=float(values.min()),
                high=float(values.max()),
                images=len(values),
                confidence=float(values.mean()),
                accuracy=float(right[index == k].mean()),
            )
        )
    return found
