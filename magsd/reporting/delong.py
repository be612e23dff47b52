"""AUROC and its covariance by DeLong, for images of patients by Obuchowski."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True)
class AurocDifference:
    """AUROC of two scores of the same images; NaN where undefined.

    difference: first minus second, with its interval and the two-sided p-value of no difference.
    clustered: some patients have several images, which the variance allows for.
    """

    first: float
    second: float
    difference: float
    low: float
    high: float
    p_value: float
    clustered: bool


def auroc_covariance(
    positive: ArrayLike, scores: Sequence[ArrayLike], patients: ArrayLike | None = None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """AUROCs (S,) of S scores of the same N images, and their covariance (S, S)."""
    raise NotImplementedError


def compare_aurocs(
    positive: ArrayLike,
    first: ArrayLike,
    second: ArrayLike,
    patients: ArrayLike | None = None,
    level: float = 0.95,
) -> AurocDifference:
    """Test the difference of two AUROCs over the same images (N,)."""
    raise NotImplementedError
