"""AUROC and its covariance by DeLong, for several images of a patient by Obuchowski."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtr, ndtri
from scipy.stats import rankdata

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class AurocDifference:
    """AUROC of two scores of the same images; NaN where undefined.

    difference: first minus second, with its interval and the two-sided p-value of no difference.
    clustered: some patients have several images, and the variance is Obuchowski's.
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
) -> tuple[Floats, Floats]:
    """AUROCs (S,) of S scores of the same N images, and their covariance (S, S).

    positive: (N,) bool. patients: (N,) anything that tells patients apart; None: each image is its
    own. Then the covariance is that of DeLong et al. 1988, by the ranks of Sun and Xu 2014;
    otherwise that of Obuchowski 1997, which sums the same components over each patient and is equal
    to it where no patient has two images. NaN where undefined: no positives or no negatives, or,
    for the covariance, those of a single patient.
    """
    is_positive = np.asarray(positive, dtype=bool)
    of = np.arange(len(is_positive)) if patients is None else np.asarray(patients)
    _, cluster = np.unique(of, return_inverse=True)
    m, n = int(is_positive.sum()), int((~is_positive).sum())
    count = len(scores)
    if not m or not n:
        return np.full(count, math.nan), np.full((count, count), math.nan)
    components = [_components(is_positive, np.asarray(s, dtype=np.float64)) for s in scores]
    values = np.array([of_positives.mean() for of_positives, _ in components])
    clusters = int(cluster.max()) + 1

    def deviations(side: int, mask: NDArray[np.bool_]) -> tuple[Floats, int]:
        """Sums (S, P) over patients of a side's components less the AUROC; patients with any."""
        own = cluster[mask]
        sums = [
            np.bincount(own, parts[side] - value, minlength=clusters)
            for parts, value in zip(components, values, strict=True)
        ]
        return np.stack(sums), len(np.unique(own))

    of_positives, i10 = deviations(0, is_positive)
    of_negatives, i01 = deviations(1, ~is_positive)
    if i10 < 2 or i01 < 2:
        return values, np.full((count, count), math.nan)
    cross = of_positives @ of_negatives.T * clusters / (clusters - 1)
    covariance = (
        of_positives @ of_positives.T * i10 / (i10 - 1) / m**2
        + of_negatives @ of_negatives.T * i01 / (i01 - 1) / n**2
        + (cross + cross.T) / (m * n)
    )
    return values, covariance


def _components(positive: NDArray[np.bool_], scores: Floats) -> tuple[Floats, Floats]:
    """Of each positive the share of negatives below it, of each negative that of positives above.

    Equal ones count half.
    """
    own, others = scores[positive], scores[~positive]
    ranks = rankdata(scores)
    of_positives = (ranks[positive] - rankdata(own)) / len(others)
    of_negatives = 1 - (ranks[~positive] - rankdata(others)) / len(own)
    return of_positives, of_negatives


def compare_aurocs(
    positive: ArrayLike,
    first: ArrayLike,
    second: ArrayLike,
    patients: ArrayLike | None = None,
    level: float = 0.95,
) -> AurocDifference:
    """Test the difference of two AUROCs over the same images (N,) by its normal approximation."""
    values, covariance = auroc_covariance(positive, (first, second), patients)
    of = np.arange(len(np.asarray(positive))) if patients is None else np.asarray(patients)
    difference = float(values[0] - values[1])
    variance = float(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])
    if variance < 1e-18:  # rounding alone, as of equal scores
        variance = 0.0
    deviation = math.sqrt(variance)
    if deviation:
        p_value = float(2 * ndtr(-abs(difference) / deviation))
    else:
        p_value = 1.0 if abs(difference) < 1e-12 else math.nan
    width = float(ndtri((1 + level) / 2)) * deviation
    return AurocDifference(
        first=float(values[0]),
        second=float(values[1]),
        difference=difference,
        low=difference - width,
        high=difference + width,
        p_value=p_value,
        clustered=len(np.unique(of)) < len(of),
    )
