"""The bootstrap over patients: intervals and p-values of statistics of weighted patients."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri

Floats = NDArray[np.float64]
#: Values (M, R) of M statistics from the weights (P, R) of P patients in R resamples.
Statistic = Callable[[Floats], Floats]
# Numbers in one array of a chunk of resamples, 32 MiB of them.
_CHUNK = 2**22
# The jackknife leaves out one patient at a time, of more patients one of so many random groups.
_JACKKNIFE = 200


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

    def __post_init__(self) -> None:
        if self.resamples < 1 or not 0 < self.level < 1:
            raise ValueError("expected at least one resample and a level between 0 and 1")


DEFAULT = Resampling()


@dataclass(frozen=True)
class Interval:
    """A value and its interval; all NaN where undefined.

    The interval is NaN, too, for a single patient. undefined: number of resamples in which the
    value is undefined; the interval leaves them out. exact: a share of 0 or 1 is the same in every
    resample, and the interval is Clopper and Pearson's, which takes every patient for one image.
    turned: the interval is of reversed percentiles (`bootstrap`) and may leave out the value.
    """

    value: float
    low: float
    high: float
    undefined: int = 0
    exact: bool = False
    turned: bool = False

    @property
    def flat(self) -> bool:
        """Every resample gave the same value, so that the interval says nothing."""
        return self.low == self.high


@dataclass(frozen=True)
class Difference(Interval):
    """First minus second; p_value: two-sided, of no difference, by the same resamples."""

    p_value: float = math.nan


@dataclass(frozen=True)
class _Replicates:
    """Values of M statistics: of the sample (M,), of R resamples, of J jackknife samples."""

    values: Floats
    resampled: Floats
    jackknife: Floats


def bootstrap(
    statistic: Statistic,
    patients: int,
    resampling: Resampling,
    *,
    rows: int = 0,
    shares: NDArray[np.int64] | None = None,
    biased: NDArray[np.bool_] | None = None,
) -> list[Interval]:
    """Intervals of the M statistics, from resamples of `patients` patients with replacement.

    rows: the length of the longest arrays (rows, R) that the statistic makes, by which resamples
    are cut into chunks. shares: (M,) of each statistic that is a share, the number of patients it
    is a share of; 0 of others. biased: (M,) of statistics of at least 0 that chance makes too high,
    so that resamples are higher than the sample as the sample is than the truth: their intervals
    are reversed percentiles (Davison and Hinkley 1997, 5.6), which may leave out the value. They
    undo part of the bias: where the truth is 0 about a third of them lie above it.
    """
    found = _replicates(statistic, patients, resampling, rows)
    intervals = []
    for m, value in enumerate(found.values):
        resampled, jackknife = found.resampled[m], found.jackknife[m]
        count = 0 if shares is None else int(shares[m])
        if count and value in (0.0, 1.0):
            intervals.append(_exact(float(value), count, resampled, resampling.level))
        elif biased is not None and biased[m]:
            intervals.append(_reversed(float(value), resampled, resampling.level))
        else:
            intervals.append(_interval(float(value), resampled, jackknife, resampling))
    return intervals


def bootstrap_differences(
    statistic: Statistic,
    patients: int,
    resampling: Resampling,
    *,
    rows: int = 0,
    biased: NDArray[np.bool_] | None = None,
) -> list[Difference]:
    """As `bootstrap`, of statistics that are differences, with p-values.

    biased: (M,) of differences of statistics that chance makes too high. Their limits and p-values
    are NaN: chance adds unequally to both, so that resamples of two equal ones leave out 0.
    """
    found = _replicates(statistic, patients, resampling, rows)
    differences = []
    for m, value in enumerate(found.values):
        resampled, jackknife = found.resampled[m], found.jackknife[m]
        if biased is not None and biased[m]:
            undefined = int(np.isnan(resampled).sum())
            differences.append(Difference(float(value), math.nan, math.nan, undefined))
            continue
        interval = _interval(float(value), resampled, jackknife, resampling)
        p_value = _p_value(float(value), resampled, jackknife, resampling)
        differences.append(
            Difference(
                interval.value, interval.low, interval.high, interval.undefined, p_value=p_value
            )
        )
    return differences


def _replicates(
    statistic: Statistic, patients: int, resampling: Resampling, rows: int
) -> _Replicates:
    values = statistic(np.ones((patients, 1)))[:, 0]
    if patients < 2:
        nothing = np.empty((len(values), 0))
        return _Replicates(values, nothing, nothing)
    columns = max(1, _CHUNK // max(patients, rows))
    draws = _draws(patients, resampling, columns)
    resampled = np.concatenate([statistic(weights) for weights in draws], axis=1)
    left_out = (
        _left_out(patients, resampling.seed, columns) if resampling.method == "bca" else iter(())
    )
    jackknife = [statistic(weights) for weights in left_out] or [np.empty((len(values), 0))]
    return _Replicates(values, resampled, np.concatenate(jackknife, axis=1))


def _draws(patients: int, resampling: Resampling, columns: int) -> Iterator[Floats]:
    """Weights (P, at most `columns`) of all resamples, the same however they are cut."""
    rng = np.random.default_rng(resampling.seed)
    for first in range(0, resampling.resamples, columns):
        weights = np.empty((min(columns, resampling.resamples - first), patients))
        for row in weights:
            row[:] = np.bincount(rng.integers(0, patients, patients), minlength=patients)
        yield np.ascontiguousarray(weights.T)


def _left_out(patients: int, seed: int, columns: int) -> Iterator[Floats]:
    """Weights (P, at most `columns`) of the jackknife samples."""
    groups = min(patients, _JACKKNIFE)
    group = np.random.default_rng(seed).permutation(np.arange(patients) % groups)
    for first in range(0, groups, columns):
        yield (group[:, None] != np.arange(first, min(first + columns, groups))).astype(np.float64)


def _interval(
    value: float, resampled: Floats, jackknife: Floats, resampling: Resampling
) -> Interval:
    defined = resampled[~np.isnan(resampled)]
    undefined = resampled.size - defined.size
    if math.isnan(value) or not defined.size:
        return Interval(value, math.nan, math.nan, undefined)
    tails = np.array([1 - resampling.level, 1 + resampling.level]) / 2
    if resampling.method == "bca":
        bias, skew = _bias(value, defined), _acceleration(jackknife)
        shifted = bias + ndtri(tails)
        tails = ndtr(bias + shifted / np.maximum(1 - skew * shifted, 1e-3))
    low, high = np.quantile(defined, tails)
    return Interval(value, float(low), float(high), undefined)


def _reversed(value: float, resampled: Floats, level: float) -> Interval:
    """What resamples lie above the value, the truth lies below it."""
    plain = _interval(value, resampled, resampled[:0], Resampling(level=level, method="percentile"))
    if math.isnan(plain.low):
        return plain
    low, high = (max(0.0, 2 * value - end) for end in (plain.high, plain.low))
    return Interval(value, low, high, plain.undefined, turned=True)


def _p_value(value: float, resampled: Floats, jackknife: Floats, resampling: Resampling) -> float:
    """Two-sided; below 1 - level where the interval leaves out 0, but for rounding."""
    defined = resampled[~np.isnan(resampled)]
    if math.isnan(value) or not defined.size:
        return math.nan
    if (defined == value).all():
        return 1.0 if value == 0 else math.nan
    below = _rank(0.0, defined)
    if resampling.method == "bca":
        # The level at which an end of the interval is 0: `_interval` solved for the tail.
        bias, skew = _bias(value, defined), _acceleration(jackknife)
        shifted = ndtri(below) - bias
        below = float(ndtr(shifted / max(1 + skew * shifted, 1e-3) - bias))
    # No p-value from R resamples is below 2 / (R + 1).
    return max(min(1.0, 2 * min(below, 1 - below)), 2 / (defined.size + 1))


def _rank(value: float, values: Floats) -> float:
    """Share of values below a value, ties by half; never 0 or 1."""
    below = np.count_nonzero(values < value) + np.count_nonzero(values == value) / 2
    return float(np.clip(below / values.size, 0.5 / values.size, 1 - 0.5 / values.size))


def _bias(value: float, values: Floats) -> float:
    return float(ndtri(_rank(value, values)))


def _acceleration(jackknife: Floats) -> float:
    defined = jackknife[~np.isnan(jackknife)]
    if not defined.size:
        return 0.0
    apart = defined.mean() - defined
    squares = (apart**2).sum()
    # Equal values differ by rounding alone.
    if squares <= (1e-12 * abs(defined[0])) ** 2:
        return 0.0
    return float((apart**3).sum() / (6 * squares**1.5))


def _exact(value: float, patients: int, resampled: Floats, level: float) -> Interval:
    """Clopper and Pearson's of 0 or all of `patients`."""
    end = ((1 - level) / 2) ** (1 / patients)
    low, high = (0.0, 1 - end) if value == 0 else (end, 1.0)
    return Interval(value, low, high, int(np.isnan(resampled).sum()), exact=True)
