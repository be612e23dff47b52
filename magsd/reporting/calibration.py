"""Calibration of probabilities: a temperature for logits, and the bins of a reliability plot."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
BINS = 15
BOUNDS = (0.1, 10.0)


@dataclass(frozen=True)
class Bin:
    """One bin of a reliability plot.

    low, high: its edges, confidences in [low, high], which may be equal. confidence: mean
    confidence. accuracy: share of the images that are right.
    """

    low: float
    high: float
    images: int
    confidence: float
    accuracy: float


def fit_temperature(logits: ArrayLike, labels: ArrayLike) -> float:
    """The temperature T within BOUNDS under which softmax(logits / T) has the lowest NLL.

    logits: (N, K). labels: (N,) class indices. The NLL is never above that of T = 1. Where every
    image is right the NLL falls for ever as T does, so that T stays 1.
    Raises DataError for logits that are not finite or no images.
    """
    raise NotImplementedError


def fit_binary_temperature(logits: ArrayLike, targets: ArrayLike) -> float:
    """`fit_temperature` of one finding: sigmoid(logits / T), logits (N,), targets (N,) 0 or 1."""
    raise NotImplementedError


def calibrated(logits: ArrayLike, temperature: float) -> Floats:
    """softmax(logits / temperature), (N, K) float64; its argmax is that of the logits."""
    raise NotImplementedError


def bin_indices(confidence: ArrayLike, bins: int = BINS) -> NDArray[np.int64]:
    """Bin (N,) of each confidence: bins of as equal numbers of images as equal values allow."""
    raise NotImplementedError


def reliability(probabilities: ArrayLike, labels: ArrayLike, bins: int = BINS) -> list[Bin]:
    """Bins of the probability of the predicted class, those of the ECE; empty ones are left out."""
    raise NotImplementedError


def class_reliability(
    probabilities: ArrayLike, labels: ArrayLike, index: int, bins: int = BINS
) -> list[Bin]:
    """Bins of the probability of one class; accuracy is then the share of images of the class."""
    raise NotImplementedError
