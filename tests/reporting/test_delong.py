"""DeLong's and Obuchowski's variances of AUROCs."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from magsd.reporting.delong import auroc_covariance, compare_aurocs


def by_definition(positive, scores, patients):
    """Covariance by the sums over all pairs of Obuchowski's section 2, a patient at a time."""
    m, n = positive.sum(), (~positive).sum()
    names = np.unique(patients)
    wins = [
        (s[positive][:, None] > s[~positive]) + 0.5 * (s[positive][:, None] == s[~positive])
        for s in scores
    ]
    values = [w.mean() for w in wins]
    v10 = [w.mean(axis=1) for w in wins]
    v01 = [w.mean(axis=0) for w in wins]
    i10 = len(set(patients[positive].tolist()))
    i01 = len(set(patients[~positive].tolist()))
    covariance = np.zeros((len(scores), len(scores)))
    for a in range(len(scores)):
        for b in range(len(scores)):
            s10 = s01 = s11 = s11_swapped = 0.0
            for name in names:
                own, others = patients[positive] == name, patients[~positive] == name
                x = [v10[k][own].sum() - own.sum() * values[k] for k in (a, b)]
                y = [v01[k][others].sum() - others.sum() * values[k] for k in (a, b)]
                s10 += x[0] * x[1] * i10 / ((i10 - 1) * m)
                s01 += y[0] * y[1] * i01 / ((i01 - 1) * n)
                s11 += x[0] * y[1] * len(names) / (len(names) - 1)
                s11_swapped += x[1] * y[0] * len(names) / (len(names) - 1)
            covariance[a, b] = s10 / m + s01 / n + (s11 + s11_swapped) / (m * n)
    return values, covariance


def sample(rows: int = 60, digits: int = 1, seed: int = 0):
    rng = np.random.default_rng(seed)
    positive = rng.random(rows) < 0.4
    shared = rng.normal(size=rows)
    scores = [(shared + positive + rng.normal(size=rows)).round(digits) for _ in range(2)]
    return positive, scores, rng.integers(0, rows // 3, rows)


@pytest.mark.parametrize("clustered", [False, True])
def test_covariance_is_that_of_the_definition(clustered) -> None:
    positive, scores, patients = sample()
    of = patients if clustered else np.arange(60)
    values, covariance = auroc_covariance(positive, scores, of if clustered else None)
    expected, expected_covariance = by_definition(positive, scores, of)
    np.testing.assert_allclose(values, expected)
    np.testing.assert_allclose(values, [roc_auc_score(positive, s) for s in scores])
    np.testing.assert_allclose(covariance, expected_covariance, rtol=1e-9)


def test_a_small_example_by_hand() -> None:
    """Positives at 2 and 4, negatives at 1 and 3: V10 = (1/2, 1), V01 = (1, 1/2).

    Each has the sample variance 1/8, so that the variance of the AUROC 3/4 is 2 * (1/8) / 2.
    """
    values, covariance = auroc_covariance([False, True, False, True], [[1, 2, 3, 4]])
    assert values.tolist() == [0.75]
    assert covariance[0, 0] == pytest.approx(1 / 8)


def test_variance_is_that_of_simulated_aurocs() -> None:
    """Patients with three images each, some of both labels."""
    rng = np.random.default_rng(0)
    patients = np.repeat(np.arange(50), 3)
    values, variances, unclustered = [], [], []
    for _ in range(400):
        positive = (rng.random(50) < 0.5).repeat(3) ^ (rng.random(150) < 0.1)
        score = positive + rng.normal(size=50).repeat(3) + 0.3 * rng.normal(size=150)
        value, covariance = auroc_covariance(positive, [score], patients)
        values.append(value[0])
        variances.append(covariance[0, 0])
        unclustered.append(auroc_covariance(positive, [score])[1][0, 0])
    # A variance of 400 values is known to 7 %.
    assert np.mean(variances) == pytest.approx(np.var(values), rel=0.2)
    assert np.mean(unclustered) < 0.6 * np.var(values)


def test_p_values_are_uniform_without_a_difference() -> None:
    found = []
    for seed in range(200):
        positive, scores, patients = sample(90, 6, seed)
        # Equal models: the patients do not matter.
        found.append(compare_aurocs(positive, *scores, patients).p_value)
    assert stats.kstest(found, "uniform").pvalue > 0.01


def test_comparison_is_that_of_the_covariance() -> None:
    positive, scores, patients = sample(200, 6)
    worse = scores[1] + 2 * np.random.default_rng(9).normal(size=200)
    found = compare_aurocs(positive, scores[0], worse, patients, level=0.9)
    values, covariance = auroc_covariance(positive, [scores[0], worse], patients)
    deviation = math.sqrt(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])
    assert found.difference == found.first - found.second == values[0] - values[1]
    assert found.high - found.difference == pytest.approx(1.6449 * deviation, rel=1e-4)
    assert found.p_value == pytest.approx(2 * stats.norm.sf(found.difference / deviation))
    assert found.p_value < 0.05
    assert found.clustered
    assert not compare_aurocs(positive, scores[0], worse).clustered


def test_undefined_aurocs() -> None:
    nothing = compare_aurocs([True, True], [0, 1], [1, 0])
    assert math.isnan(nothing.first)
    assert math.isnan(nothing.p_value)
    # A single positive patient has an AUROC and no variance.
    single = compare_aurocs([True, True, False, False], [1, 2, 0, 1], [1, 2, 3, 4], [7, 7, 1, 2])
    assert single.first == 0.875
    assert math.isnan(single.p_value)
    assert math.isnan(single.low)


def test_perfect_and_equal_scores() -> None:
    positive = [False, False, True, True]
    found = compare_aurocs(positive, [0, 1, 2, 3], [0, 1, 2, 3])
    assert (found.difference, found.low, found.high, found.p_value) == (0, 0, 0, 1)
