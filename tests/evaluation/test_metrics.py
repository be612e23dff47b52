"""Metrics against hand counts and against absent classes."""

from __future__ import annotations

import math

import numpy as np
import pytest

from magsd.evaluation import compute_metrics

CLASSES = ("a", "b", "c")
# Confusion: a: 3 right, 1 taken for b; b: 1 right, 1 taken for c; c: 2 right, 2 taken for a.
TARGETS = [0, 0, 0, 0, 1, 1, 2, 2, 2, 2]
PREDICTED = [0, 0, 0, 1, 1, 2, 2, 2, 0, 0]


def _scores(predicted, classes=3, confidence=0.8):
    scores = np.full((len(predicted), classes), (1 - confidence) / (classes - 1))
    scores[np.arange(len(predicted)), predicted] = confidence
    return scores


def test_hand_counted():
    metrics = compute_metrics(TARGETS, _scores(PREDICTED), CLASSES)
    assert metrics.confusion == [[3, 1, 0], [0, 1, 1], [2, 0, 2]]
    assert metrics.images == 10
    assert metrics.accuracy == pytest.approx(0.6)
    recall = (3 / 4, 1 / 2, 2 / 4)
    precision = (3 / 5, 1 / 2, 2 / 3)
    specificity = (4 / 6, 7 / 8, 5 / 6)
    f1 = [2 * p * r / (p + r) for p, r in zip(precision, recall, strict=True)]
    assert metrics.recall == pytest.approx(np.mean(recall))
    assert metrics.precision == pytest.approx(np.mean(precision))
    assert metrics.specificity == pytest.approx(np.mean(specificity))
    assert metrics.false_positive_rate == pytest.approx(1 - np.mean(specificity))
    assert metrics.f1 == pytest.approx(np.mean(f1))
    for k, name in enumerate(CLASSES):
        scores = metrics.per_class[name]
        assert scores.images == TARGETS.count(k)
        assert scores.recall == pytest.approx(recall[k])
        assert scores.precision == pytest.approx(precision[k])
        assert scores.specificity == pytest.approx(specificity[k])
        assert scores.f1 == pytest.approx(f1[k])


def test_auroc_is_the_share_of_ordered_pairs():
    rng = np.random.default_rng(0)
    targets = rng.integers(0, 3, 60)
    scores = rng.dirichlet(np.ones(3), 60)
    metrics = compute_metrics(targets, scores, CLASSES)
    for k, name in enumerate(CLASSES):
        positive, negative = scores[targets == k, k], scores[targets != k, k]
        ordered = (positive[:, None] > negative[None]).mean()
        assert metrics.per_class[name].auroc == pytest.approx(ordered)
    assert metrics.auroc == pytest.approx(np.mean([m.auroc for m in metrics.per_class.values()]))


def test_class_without_images_stays_out_of_the_means():
    targets, predicted = [0, 0, 1, 1], [0, 2, 1, 1]
    metrics = compute_metrics(targets, _scores(predicted), CLASSES)
    absent = metrics.per_class["c"]
    assert absent.images == 0
    assert math.isnan(absent.recall)
    assert math.isnan(absent.auroc)
    assert absent.specificity == pytest.approx(3 / 4)
    assert metrics.recall == pytest.approx((0.5 + 1) / 2)
    assert metrics.precision == pytest.approx(1.0)
    assert metrics.auroc == pytest.approx(
        np.mean([metrics.per_class[name].auroc for name in ("a", "b")])
    )


def test_class_never_predicted_has_precision_zero():
    metrics = compute_metrics([0, 0, 1], _scores([0, 0, 0], 2), ("a", "b"))
    assert metrics.per_class["b"].precision == 0
    assert metrics.precision == pytest.approx((2 / 3 + 0) / 2)


def test_single_class_in_the_data():
    metrics = compute_metrics([1, 1], _scores([1, 0]), CLASSES)
    assert metrics.accuracy == 0.5
    assert metrics.recall == 0.5
    assert math.isnan(metrics.specificity)
    assert math.isnan(metrics.auroc)


@pytest.mark.parametrize(
    ("targets", "scores", "message"),
    [
        ([], np.zeros((0, 3)), "N >= 1"),
        ([0, 1], _scores([0]), r"expected shape \(2, 3\)"),
        ([0, 3], _scores([0, 1]), r"0\.\.2"),
        ([0, -1], _scores([0, 1]), r"0\.\.2"),
        ([0, 1], np.full((2, 3), np.nan), "not finite for 2 of 2"),
    ],
)
def test_refusals(targets, scores, message):
    with pytest.raises(ValueError, match=message):
        compute_metrics(np.array(targets, dtype=np.int64), scores, CLASSES)
