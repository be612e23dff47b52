"""Means, standard deviations and a paired test over the runs of a cross-validation.

Folds share most of their training images, so the differences between two models over the folds are
not independent, and the common paired t-test calls far too many of them significant. The corrected
resampled t-test (Nadeau and Bengio, "Inference for the Generalization Error", Machine Learning 52,
2003) adds n_test / n_train to the factor 1 / n of their variance; for several partitions see
Bouckaert and Frank, "Evaluating the Replicability of Significance Tests for Comparing Learning
Algorithms", PAKDD 2004.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from magsd.crossval.results import LOGITS, METRICS, Outcome, RunResult
from magsd.errors import RunError

NAN = float("nan")


@dataclass(frozen=True)
class PairedTest:
    """A model against the baseline over the runs that both have finished.

    pairs: how many. difference: mean of model minus baseline. t and p (two-sided): NaN for fewer
    than two pairs, and where the differences do not vary.
    """

    pairs: int
    difference: float
    t: float
    p: float


@dataclass(frozen=True)
class Score:
    """One metric of one model: mean and sample standard deviation over n runs.

    values: those of the runs, by (seed, fold), undefined ones left out. mean is NaN for n = 0 and
    deviation for n < 2. test: None for the baseline.
    """

    values: dict[tuple[int, int], float]
    test: PairedTest | None

    @property
    def n(self) -> int:
        """Number of runs."""
        return len(self.values)

    @property
    def mean(self) -> float:
        """Mean over the runs."""
        return float(np.mean(list(self.values.values()))) if self.values else NAN

    @property
    def deviation(self) -> float:
        """Sample standard deviation over the runs."""
        return float(np.std(list(self.values.values()), ddof=1)) if self.n > 1 else NAN


@dataclass(frozen=True)
class ModelSummary:
    """scores: (logits, metric) -> `Score`. finished, planned: numbers of runs."""

    model: str
    finished: int
    planned: int
    scores: dict[tuple[str, str], Score]


@dataclass(frozen=True)
class Summary:
    """All models, the baseline first.

    ratio: mean n_test / n_train over the finished runs, where n_train counts the images on which
    the epoch was selected as well. selected: whether some run was measured on those.
    """

    models: list[ModelSummary]
    ratio: float
    selected: bool = False

    @property
    def baseline(self) -> str:
        """Name of the model that the others are tested against."""
        return self.models[0].model


def corrected_resampled_t_test(differences: ArrayLike, ratio: float) -> tuple[float, float]:
    """Statistic t and two-sided p of paired differences (n,) over resampled training sets.

    t = mean / sqrt((1/n + ratio) variance) with n - 1 degrees of freedom, where ratio is
    n_test / n_train and the variance the sample variance (Nadeau and Bengio, 2003). NaN for n < 2
    and where the differences do not vary.
    """
    values = np.asarray(differences, dtype=np.float64)
    n = len(values)
    # Equal differences come out of the subtraction equal up to rounding.
    if n < 2 or np.ptp(values) <= 1e-12:
        return NAN, NAN
    t = float(values.mean() / math.sqrt((1 / n + ratio) * values.var(ddof=1)))
    return t, float(2 * stats.t.sf(abs(t), df=n - 1))


def summarize(outcomes: Sequence[Outcome]) -> Summary:
    """Statistics of each model over its finished runs; the first model is the baseline.

    Raises `RunError` where two runs that pair up were measured on different images.
    """
    models = list(dict.fromkeys(outcome.run.model for outcome in outcomes))
    results = {model: _results(outcomes, model) for model in models}
    baseline = results[models[0]]
    summaries = []
    for model in models:
        own = results[model]
        _check_paired(model, own, baseline)
        scores = {
            (kind, metric): Score(
                values := _values(own, kind, metric),
                None
                if model == models[0]
                else _paired(values, _values(baseline, kind, metric), own),
            )
            for kind in LOGITS
            if any(kind in result.scores for result in own.values())
            for metric in METRICS
        }
        planned = sum(outcome.run.model == model for outcome in outcomes)
        summaries.append(ModelSummary(model, len(own), planned, scores))
    every = [result for own in results.values() for result in own.values()]
    selected = any(result.side == "validation" for result in every) or any(
        outcome.run.config.data.test == "none" for outcome in outcomes
    )
    return Summary(summaries, _ratio(every), selected)


def _results(outcomes: Sequence[Outcome], model: str) -> dict[tuple[int, int], RunResult]:
    return {
        (outcome.run.seed, outcome.run.fold): outcome.result
        for outcome in outcomes
        if outcome.run.model == model and outcome.result is not None
    }


def _values(
    results: dict[tuple[int, int], RunResult], kind: str, metric: str
) -> dict[tuple[int, int], float]:
    values = {
        place: result.scores[kind][metric]
        for place, result in results.items()
        if kind in result.scores
    }
    return {place: value for place, value in values.items() if math.isfinite(value)}


def _paired(
    values: dict[tuple[int, int], float],
    baseline: dict[tuple[int, int], float],
    results: dict[tuple[int, int], RunResult],
) -> PairedTest:
    places = [place for place in values if place in baseline]
    differences = np.array([values[place] - baseline[place] for place in places])
    t, p = corrected_resampled_t_test(differences, _ratio([results[place] for place in places]))
    return PairedTest(len(places), float(differences.mean()) if places else NAN, t, p)


def _ratio(results: Sequence[RunResult]) -> float:
    ratios = [result.ratio for result in results]
    return float(np.mean(ratios)) if ratios else NAN


def _check_paired(
    model: str,
    own: dict[tuple[int, int], RunResult],
    baseline: dict[tuple[int, int], RunResult],
) -> None:
    for (seed, fold), result in own.items():
        other = baseline.get((seed, fold))
        if other is not None and result.measured != other.measured:
            raise RunError(
                f"{model}, seed {seed}, fold {fold} was measured on other images than the first "
                "model, so the two cannot be compared: the data changed between their runs; remove "
                "the older run's folder and give the command again"
            )
