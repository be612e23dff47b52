"""The bootstrap over patients: intervals and p-values of statistics of weighted patients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
#: Values (M, R) of M statistics from the weights (P, R) of P patients in R resamples.
Statistic = Callable[[Floats], Floats]


@dataclass(frozen=True)
class Resampling:
    """How intervals are made.

    resamples: how many. level: of the interval. method: "bca" corrects bias and skew (Efron 1987),
    "percentile" does not. cluster: whole patients are drawn, or images as if each were a patient of
    its own.
    """

    resamples: int = 2000
    seed: int = 0
    level: float = 0.95
    method: Literal["bca", "percentile"] = "bca"
    cluster: Literal["patient", "image"] = "patient"


DEFAULT = Resampling()


@dataclass(frozen=True)
class Interval:
    """A value and its interval; all NaN where undefined.

    undefined: number of resamples in which the value is undefined, which the interval leaves out.
    exact: the interval is Clopper and Pearson's for one image a patient, since a share of 0 or 1 is
    the same in every resample.
    """

    value: float
    low: float
    high: float
    undefined: int = 0
    exact: bool = False


@dataclass(frozen=True)
class Difference(Interval):
    """First minus second; p_value: two-sided, of no difference, by the same resamples."""

    p_value: float = float("nan")


def bootstrap(statistic: Statistic, patients: int, resampling: Resampling) -> list[Interval]:
    """Intervals of the M statistics."""
    raise NotImplementedError


def bootstrap_differences(
    statistic: Statistic, patients: int, resampling: Resampling
) -> list[Difference]:
    """Intervals and p-values of M statistics that are differences."""
    raise NotImplementedError
