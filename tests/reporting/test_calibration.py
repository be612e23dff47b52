"""Temperatures and reliability."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from scipy.special import softmax
from sklearn.calibration import calibration_curve
from sklearn.metrics import log_loss

from magsd.errors import DataError
from magsd.reporting.calibration import (
    bin_indices,
    calibrated,
    class_reliability,
    fit_binary_temperature,
    fit_temperature,
    reliability,
)
from magsd.reporting.measures import point_values


def sample(temperature: float, rows: int = 4000, seed: int = 0):
    """Labels drawn from the softmax of the logits over `temperature`."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(scale=3, size=(rows, 3))
    uniform = rng.random((rows, 1))
    cumulative = softmax(logits / temperature, axis=1).cumsum(axis=1)
    return logits, (uniform > cumulative[:, :2]).sum(axis=1)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
def test_the_temperature_of_the_labels_is_found(temperature) -> None:
    logits, labels = sample(temperature)
    found = fit_temperature(logits, labels)
    assert found == pytest.approx(temperature, rel=0.08)
    # It is the best on a grid, and what is in units of the logits scales with them.
    nll = log_loss(labels, calibrated(logits, found))
    for other in np.geomspace(0.2, 5, 31):
        assert nll <= log_loss(labels, calibrated(logits, other)) + 1e-12
    assert fit_temperature(2 * logits, labels) == pytest.approx(2 * found, rel=1e-3)


def test_calibration_improves_and_changes_no_prediction() -> None:
    logits, labels = sample(2.5)
    before = softmax(logits, axis=1)
    after = calibrated(logits, fit_temperature(logits, labels))
    np.testing.assert_array_equal(after.argmax(axis=1), logits.argmax(axis=1))
    values = [point_values(labels, scores, "abc")[0] for scores in (before, after)]
    for name in ("nll", "brier", "ece"):
        assert values[1][name] < 0.9 * values[0][name]
    assert values[0]["accuracy"] == values[1]["accuracy"]


@pytest.mark.parametrize("seed", range(20))
def test_nll_of_small_sets_is_never_worse(seed) -> None:
    rng = np.random.default_rng(seed)
    logits, labels = rng.normal(size=(5, 3)) * 10.0 ** rng.integers(-3, 3), rng.integers(0, 3, 5)
    found = fit_temperature(logits, labels)
    assert 0.1 <= found <= 10
    after = log_loss(labels, calibrated(logits, found), labels=range(3))
    assert after <= log_loss(labels, softmax(logits, axis=1), labels=range(3)) + 1e-9


def test_a_separated_set_does_not_run_away() -> None:
    """Nor one that says nothing."""
    labels = np.array([0, 1, 2])
    assert fit_temperature(np.eye(3)[labels] * 2, labels) == 1
    assert fit_temperature(np.zeros((3, 3)), labels) == 1
    # One wrong image of many bounds it.
    logits, labels = np.eye(3)[np.arange(300) % 3] * 2, np.arange(300) % 3
    labels[0] = 1
    share = 299 / 300
    # Two equal other classes: e^(2/T) / (e^(2/T) + 2) = share.
    expected = 2 / math.log(2 * share / (1 - share))
    assert fit_temperature(logits, labels) == pytest.approx(expected, rel=1e-3)


def test_a_finding_has_its_own_temperature() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(scale=4, size=5000)
    targets = rng.random(5000) < 1 / (1 + np.exp(-logits / 3))
    assert fit_binary_temperature(logits, targets) == pytest.approx(3, rel=0.08)


def test_logits_that_cannot_be_fitted() -> None:
    with pytest.raises(DataError, match="not finite for 1 of 2 images"):
        fit_temperature([[0, 1], [math.nan, 0]], [0, 1])
    with pytest.raises(DataError, match="no images"):
        fit_temperature(np.zeros((0, 3)), np.zeros(0, dtype=np.int64))


@pytest.mark.parametrize(("rows", "bins"), [(45, 15), (100, 15), (3, 3), (1, 1)])
def test_bins_have_equal_numbers_of_images(rows, bins) -> None:
    values = np.random.default_rng(0).permutation(rows) / rows
    counts = np.bincount(bin_indices(values))
    counts = counts[counts > 0]
    assert len(counts) == bins
    assert counts.max() - counts.min() <= 1


def test_reliability_of_a_class_is_that_of_scikit_learn() -> None:
    logits, labels = sample(2.0, 1500)
    scores = softmax(logits, axis=1)
    found = class_reliability(scores, labels, 1)
    accuracy, confidence = calibration_curve(
        labels == 1, scores[:, 1], n_bins=15, strategy="quantile"
    )
    np.testing.assert_allclose([each.accuracy for each in found], accuracy, atol=0.011)
    np.testing.assert_allclose([each.confidence for each in found], confidence, atol=0.011)


def test_reliability_is_what_the_calibration_error_is_made_of() -> None:
    logits, labels = sample(2.0, 500)
    scores = softmax(logits, axis=1).round(2)
    bins = reliability(scores, labels)
    assert sum(each.images for each in bins) == 500
    for each, following in pairwise(bins):
        assert each.low - 1e-12 <= each.confidence <= each.high + 1e-12
        assert each.high < following.low
    error = sum(abs(each.confidence - each.accuracy) * each.images for each in bins) / 500
    assert error == pytest.approx(point_values(labels, scores, "abc")[0]["ece"])
