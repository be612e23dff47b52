"""Measures of probabilities against labels, for many weightings of the images at once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
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


class Measures:
    """Measures of N images over K classes in P patients; undefined ones are NaN.

    labels: (N,) class indices. probabilities: (N, K). patients: (N,) index in 0..P-1, without one
    each image is its own. names: (measure, index of the class or None for all) of the M rows of
    `values`: those of OVERALL, then those of PER_CLASS for each class.

    As in `magsd.evaluation.metrics`: a class that is never predicted has precision 0; recall, F1
    and average precision of a class without images, and specificity and AUROC where every image is
    of the class, are undefined; means leave out undefined values and classes without images.
    """

    names: tuple[tuple[str, int | None], ...]

    def __init__(
        self, labels: ArrayLike, probabilities: ArrayLike, patients: ArrayLike | None = None
    ) -> None:
        raise NotImplementedError

    def values(self, weights: Floats) -> Floats:
        """Values (M, R) where patient p counts weights[p, r] times, from weights (P, R)."""
        raise NotImplementedError


def point_values(
    labels: ArrayLike, probabilities: ArrayLike, classes: Sequence[str]
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Values of OVERALL, and for every class those of PER_CLASS, without intervals."""
    raise NotImplementedError
