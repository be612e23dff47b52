"""Measures against scikit-learn and against the metrics of an evaluation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn import metrics

from magsd.evaluation.metrics import AVERAGED, compute_metrics
from magsd.reporting.measures import OVERALL, PER_CLASS, Measures, grouped, point_values

CLASSES = ("a", "b", "c")


def sample(rows: int = 300, *, digits: int | None = None, seed: int = 0):
    """Labels, probabilities, in rounded numbers with many ties, and predicted classes."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(3, rows, p=[0.6, 0.3, 0.1])
    scores = rng.dirichlet(np.ones(3), rows) + 0.4 * np.eye(3)[labels]
    scores /= scores.sum(axis=1, keepdims=True)
    if digits is not None:
        scores = scores.round(digits)
    return labels, scores, scores.argmax(axis=1)


def by_sklearn(labels, scores, predicted, weights=None):
    """Overall and per-class values of scikit-learn."""
    own = {"sample_weight": weights}
    every = {"labels": range(3), "zero_division": 0.0, **own}
    precision, recall, f1, _ = metrics.precision_recall_fscore_support(labels, predicted, **every)
    cells = metrics.multilabel_confusion_matrix(labels, predicted, labels=range(3), **own)
    per_class = {
        name: {
            "precision": precision[k],
            "recall": recall[k],
            "specificity": cells[k][0, 0] / cells[k][0].sum(),
            "f1": f1[k],
            "auroc": metrics.roc_auc_score(labels == k, scores[:, k], **own),
            "average_precision": metrics.average_precision_score(labels == k, scores[:, k], **own),
        }
        for k, name in enumerate(CLASSES)
    }
    overall = {
        name: np.mean([values[name] for values in per_class.values()])
        for name in PER_CLASS
        if name != "recall"
    }
    overall |= {
        "accuracy": metrics.accuracy_score(labels, predicted, **own),
        "balanced_accuracy": metrics.balanced_accuracy_score(labels, predicted, **own),
        "nll": metrics.log_loss(labels, scores, **own),
        "brier": np.average(((scores - np.eye(3)[labels]) ** 2).sum(axis=1), weights=weights),
    }
    return overall, per_class


def assert_equal(found, expected) -> None:
    overall, per_class = found
    assert {name: overall[name] for name in expected[0]} == pytest.approx(expected[0], abs=1e-12)
    assert overall.keys() - expected[0].keys() == {"ece"}
    for name, values in expected[1].items():
        assert per_class[name] == pytest.approx(values, abs=1e-12)


@pytest.mark.parametrize("digits", [None, 1])
def test_values_are_those_of_scikit_learn(digits) -> None:
    labels, scores, predicted = sample(digits=digits)
    scores /= scores.sum(axis=1, keepdims=True)
    expected = by_sklearn(labels, scores, predicted)
    assert_equal(point_values(labels, scores, CLASSES), expected)


@pytest.mark.parametrize("digits", [None, 1])
def test_weighted_values_are_those_of_scikit_learn(digits) -> None:
    labels, scores, predicted = sample(digits=digits)
    scores /= scores.sum(axis=1, keepdims=True)
    rng = np.random.default_rng(1)
    patients = np.append(np.arange(100), rng.integers(0, 100, 200))
    measures = Measures(labels, scores, patients)
    # Counts of resamples, many of them zero, and weights.
    weights = np.stack([*rng.poisson(1, (3, 100)), rng.exponential(size=100)], axis=1)
    values = measures.values(weights)
    for r in range(4):
        expected = by_sklearn(labels, scores, predicted, weights[patients, r])
        assert_equal(grouped(measures, values[:, r].tolist(), CLASSES), expected)


def test_values_are_those_of_an_evaluation() -> None:
    """Also where a class has no images, and where another is never predicted."""
    labels, scores, _ = sample(60)
    scores = np.insert(scores * 0.9, [3, 3], [0.1, 0.0], axis=1)
    labels[labels == 2] = 4
    scores = scores[:, [3, 0, 1, 4, 2]]
    classes = ("no images", "x", "b", "never predicted", "c")
    labels = np.array([1, 2, 3, 0, 4])[labels]
    labels[0] = 3
    expected = compute_metrics(labels, scores, classes)
    overall, per_class = point_values(labels, scores, classes)
    assert per_class["never predicted"]["precision"] == 0
    for name in ("recall", "f1", "auroc", "average_precision"):
        assert math.isnan(per_class["no images"][name])
    names = {"recall": "balanced_accuracy"}
    for name in AVERAGED:
        if name != "false_positive_rate":
            mean = getattr(expected, name)
            assert overall[names.get(name, name)] == pytest.approx(mean)
            for each, values in expected.per_class.items():
                found = per_class[each][name]
                assert found == pytest.approx(getattr(values, name), nan_ok=True)
    assert overall["accuracy"] == pytest.approx(expected.accuracy)


def test_one_class_only() -> None:
    overall, per_class = point_values([1, 1, 1], [[0.2, 0.8], [0.6, 0.4], [0, 1]], ("a", "b"))
    assert overall["accuracy"] == overall["balanced_accuracy"] == per_class["b"]["recall"] == 2 / 3
    assert math.isnan(overall["auroc"])
    assert math.isnan(overall["specificity"])
    assert math.isnan(per_class["b"]["specificity"])
    assert per_class["a"]["specificity"] == 2 / 3
    assert per_class["b"]["average_precision"] == 1


def test_a_resample_without_a_class_has_no_means() -> None:
    measures = Measures([0, 1, 2, 0], np.eye(3)[[0, 1, 2, 1]])
    values = dict(
        zip(measures.names, measures.values(np.array([[1.0, 1, 0, 1]]).T)[:, 0], strict=True)
    )
    assert values["accuracy", None] == 2 / 3
    assert values["auroc", 0] == 0.75
    for name in OVERALL:
        is_mean = name not in ("accuracy", "nll", "brier", "ece")
        assert math.isnan(values[name, None]) == is_mean, name


def test_a_probability_of_zero_has_a_finite_nll() -> None:
    scores = np.array([[1.0, 0.0], [0.5, 0.5]])
    expected = metrics.log_loss([1, 0], scores)
    assert point_values([1, 0], scores, ("a", "b"))[0]["nll"] == pytest.approx(expected)


def test_calibration_error_by_hand() -> None:
    """45 images are three a bin; in every bin two are right."""
    confidence = np.linspace(0.6, 0.99, 45)
    scores = np.stack([confidence, 1 - confidence], axis=1)
    labels = np.array([0, 1, 0] * 15)
    expected = np.mean([abs(c.mean() - 2 / 3) for c in confidence.reshape(15, 3)])
    order = np.random.default_rng(0).permutation(45)
    found = point_values(labels[order], scores[order], ("a", "b"))[0]["ece"]
    assert found == pytest.approx(expected)


def test_equal_confidences_share_a_bin() -> None:
    labels = np.arange(40) % 4 == 0
    scores = np.tile([0.75, 0.25], (40, 1))
    assert point_values(labels, scores, ("a", "b"))[0]["ece"] == pytest.approx(0)


@pytest.mark.parametrize(
    ("labels", "scores", "message"),
    [
        ([], np.zeros((0, 2)), "N >= 1"),
        ([0, 1], np.zeros((3, 2)), "expected 2 rows"),
        ([0, 2], np.zeros((2, 2)), r"expected 0\.\.1"),
        ([0, 1], [[0, 1], [np.nan, 1]], "not finite for 1 of 2 images"),
    ],
)
def test_what_is_no_sample(labels, scores, message) -> None:
    with pytest.raises(ValueError, match=message):
        Measures(labels, scores)
