"""Thresholds by rules, and the file that keeps them."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.special import softmax
from sklearn.metrics import confusion_matrix, roc_curve

from magsd.errors import ConfigError, DataError, RunError
from magsd.reporting.bootstrap import Resampling
from magsd.reporting.calibration import fit_temperature
from magsd.reporting.decisions import decision_curve, measure_thresholds
from magsd.reporting.operating import (
    OperatingPoints,
    choose_thresholds,
    fit_operating_points,
    read_operating_points,
    write_operating_points,
)
from magsd.reporting.rules import Rule

RULES = ["argmax", "youden", "sensitivity=0.95", "specificity=0.9", "cost=5:1"]


@pytest.mark.parametrize("text", RULES)
def test_rules_are_text(text) -> None:
    assert str(Rule.parse(text)) == text
    assert Rule.parse(f" {text.replace('=', ' = ')} ") == Rule.parse(text)


def test_costs_are_a_ratio() -> None:
    assert Rule.parse("cost=10:4") == Rule("cost", 2.5) == Rule.parse("cost=2.5:1")


@pytest.mark.parametrize(
    "text",
    ["", "best", "youden=1", "sensitivity", "sensitivity=0", "sensitivity=95", "specificity=nan",
     "specificity=high", "cost=5", "cost=0:1", "cost=1:0", "cost=1e308:1e-308", "cost=1:2:3"],
)  # fmt: skip
def test_other_rules_are_named(text) -> None:
    with pytest.raises(ConfigError, match=r"expected argmax, youden, sensitivity=0\.95") as error:
        Rule.parse(text)
    assert repr(text) in str(error.value)


def sample(rows: int, digits: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    labels = rng.choice(3, rows, p=[0.5, 0.3, 0.2])
    scores = softmax(rng.normal(size=(rows, 3)) + 1.2 * np.eye(3)[labels], axis=1)
    return labels, scores.round(digits)


def rates(positive, of_class):
    return positive[of_class].mean(), (~positive)[~of_class].mean()


@pytest.mark.parametrize("digits", [1, 2, 12])
@pytest.mark.parametrize("text", RULES[1:])
@pytest.mark.parametrize("rows", [12, 200])
def test_no_threshold_is_better(rows, digits, text) -> None:
    """Every cut between two values is tried."""
    rule = Rule.parse(text)
    labels, scores = sample(rows, digits)
    for k, (name, found) in enumerate(choose_thresholds(scores, labels, "abc", rule).items()):
        of_class = labels == k
        assert name == "abc"[k]
        sensitivity, specificity = rates(scores[:, k] >= found.value, of_class)
        assert (found.sensitivity, found.specificity) == (sensitivity, specificity)
        cuts = [*np.unique(scores[:, k]), math.inf]
        every = [rates(scores[:, k] >= cut, of_class) for cut in cuts]
        if rule.name == "sensitivity":
            assert sensitivity >= rule.value
            best = max(spec for sens, spec in every if sens >= rule.value)
            assert specificity == best
        elif rule.name == "specificity":
            assert specificity >= rule.value
            best = max((sens, spec) for sens, spec in every if spec >= rule.value)
            assert (sensitivity, specificity) == best
        elif rule.name == "youden":
            assert sensitivity + specificity == pytest.approx(max(map(sum, every)))
            false_rate, true_rate, _ = roc_curve(of_class, scores[:, k])
            assert sensitivity + specificity - 1 == pytest.approx((true_rate - false_rate).max())
        else:
            m, n = of_class.sum(), (~of_class).sum()
            costs = [5 * m * (1 - sens) + n * (1 - spec) for sens, spec in [*every]]
            assert 5 * m * (1 - sensitivity) + n * (1 - specificity) == pytest.approx(min(costs))


def test_thresholds_lie_between_values() -> None:
    scores = np.array([0.1, 0.3, 0.3, 0.6, 0.9])
    labels = np.array([1, 1, 0, 0, 0])
    both = np.stack([scores, 1 - scores], axis=1)

    def chosen(text):
        return choose_thresholds(both, labels, ("a", "b"), Rule.parse(text))["a"]

    assert chosen("sensitivity=0.6").value == pytest.approx(0.45)
    assert chosen("sensitivity=0.7").value == pytest.approx(0.2)
    assert chosen("specificity=1").value == pytest.approx(0.45)
    # Between the highest value and 1; of equal sums the higher sensitivity.
    assert chosen("youden").value == pytest.approx(0.45)
    everything = choose_thresholds(both[:, ::-1], labels, ("a", "b"), Rule.parse("sensitivity=1"))
    assert everything["a"].value == 0
    assert everything["a"].note == "every image of the fit is positive"


def test_a_class_above_all_others_of_the_rest_may_have_no_positives() -> None:
    scores = np.array([[1.0, 0.0], [0.5, 0.5]])
    found = choose_thresholds(scores, [1, 0], ("a", "b"), Rule.parse("specificity=1"))["a"]
    assert found.value == np.nextafter(1, 2)
    assert (found.sensitivity, found.specificity) == (0, 1)
    assert found.note == "no image of the fit is positive"


@pytest.mark.parametrize("text", RULES)
def test_a_class_without_images_is_marked(text) -> None:
    labels, scores = np.array([1, 1, 1]), np.array([[0.2, 0.8], [0.6, 0.4], [0.1, 0.9]])
    found = choose_thresholds(scores, labels, ("a", "b"), Rule.parse(text))
    assert found["a"].value is None
    assert found["b"].value is None
    if text != "argmax":
        assert found["a"].note.startswith("no image is of this class")
        assert found["b"].note.startswith("every image is of this class")
    else:
        assert (found["a"].sensitivity, found["a"].specificity) == (None, 2 / 3)
        assert (found["b"].sensitivity, found["b"].specificity) == (2 / 3, None)


@pytest.mark.parametrize("text", RULES)
def test_points_are_fitted_kept_and_applied(tmp_path, make_table, text) -> None:
    table = make_table(90)
    validation, rule = table.side("validation"), Rule.parse(text)
    points = fit_operating_points(validation, rule)
    for kind in table.kinds:
        point = points.of(kind)
        logits = validation.logits_of(kind)
        assert point.temperature == fit_temperature(logits, validation.labels)
        assert (point.images, point.patients, point.rule) == (46, 23, rule)
        expected = choose_thresholds(
            softmax(logits / point.temperature, axis=1), validation.labels, table.classes, rule
        )
        assert point.thresholds == expected
        positive = point.positive(point.probabilities(logits))
        if text == "argmax":
            np.testing.assert_array_equal(positive, np.eye(3)[logits.argmax(axis=1)])
        for k, threshold in enumerate(point.thresholds.values()):
            found = rates(positive[:, k], validation.labels == k)
            assert found == (threshold.sensitivity, threshold.specificity)
    write_operating_points(tmp_path / "operating.json", points)
    assert read_operating_points(tmp_path / "operating.json") == points
    written = json.loads((tmp_path / "operating.json").read_text())
    assert list(written) == ["raw", "refined", "classes"]
    assert written["raw"]["rule"] == text
    applied = points.apply(table)
    for kind in table.kinds:
        np.testing.assert_array_equal(
            applied.of(kind), points.of(kind).probabilities(table.logits_of(kind))
        )
        np.testing.assert_array_equal(applied.predicted(kind), table.predicted(kind))


def test_probabilities_alone_are_calibrated_by_their_logarithms(make_table) -> None:
    table = make_table(60, refined=False)
    without = replace(table, logits=None)
    points = [fit_operating_points(each, Rule()) for each in (table, without)]
    assert points[0].refined is None
    assert points[0].raw.temperature == pytest.approx(points[1].raw.temperature, rel=1e-4)
    with pytest.raises(ValueError, match="no operating point of refined"):
        points[0].of("refined")


def test_test_labels_change_no_point(make_table) -> None:
    table = make_table(90)
    permuted = table.labels.copy()
    on_test = np.flatnonzero(table.splits == "test")
    permuted[on_test] = np.roll(permuted[on_test], 1)
    other = replace(table, labels=permuted)
    found = [fit_operating_points(t.side("validation"), Rule("youden")) for t in (table, other)]
    assert found[0] == found[1]


def test_odd_temperatures_are_noted(make_table) -> None:
    table = make_table(30, skill=100.0, refined=False)
    point = fit_operating_points(table, Rule()).raw
    assert (point.temperature, point.note[:31]) == (1, "every image of the fit is right")
    rng = np.random.default_rng(0)
    wrong = replace(table, labels=rng.permutation(table.labels))
    point = fit_operating_points(wrong, Rule()).raw
    assert point.note == "the temperature is at an end of its range, 0.1 to 10"


def test_points_of_other_tables(make_table) -> None:
    table = make_table(30)
    points = fit_operating_points(table, Rule())
    other = replace(table, classes=("a", "b", "c"))
    with pytest.raises(DataError, match="the classes a, b, c are not those"):
        points.apply(other)
    with pytest.raises(DataError, match="fitted for other classes"):
        measure_thresholds(other, points.raw)
    with pytest.raises(DataError, match="no images to fit"):
        fit_operating_points(table.side("external"), Rule())
    with pytest.raises(DataError, match="no images here"):
        measure_thresholds(table.side("external"), points.raw)
    with pytest.raises(DataError, match="the operating points were fitted without"):
        replace(points, refined=None).apply(table)


def test_damaged_files(tmp_path, make_table) -> None:
    path = tmp_path / "operating.json"
    with pytest.raises(RunError, match="no such file"):
        read_operating_points(path)
    with pytest.raises(RunError, match="cannot be read"):
        read_operating_points(tmp_path)
    whole = fit_operating_points(make_table(30), Rule("youden")).to_dict()
    zero = {**whole, "raw": {**whole["raw"], "temperature": 0}}
    ruled = {**whole, "raw": {**whole["raw"], "rule": "best"}}
    lacking = {**whole, "classes": ["a", "d"]}
    for text in ("", "[]", "{}", *map(json.dumps, (zero, ruled, lacking))):
        path.write_text(text)
        with pytest.raises(RunError, match="holds no operating points"):
            read_operating_points(path)
    assert isinstance(OperatingPoints.from_dict(whole), OperatingPoints)


def test_measures_at_thresholds(make_table) -> None:
    table = make_table(300)
    points = fit_operating_points(table.side("validation"), Rule.parse("sensitivity=0.9"))
    test = table.side("test")
    found = measure_thresholds(test, points.of("refined"), "refined", Resampling(400))
    calibrated = points.apply(test).of("refined")
    for k, (name, threshold) in enumerate(points.of("refined").thresholds.items()):
        of_class, positive = test.labels == k, calibrated[:, k] >= threshold.value
        cells = confusion_matrix(of_class, positive).tolist()
        at = found[name]
        assert cells == [
            [at.true_negatives, at.false_positives],
            [at.false_negatives, at.true_positives],
        ]
        (tn, fp), (fn, tp) = cells
        expected = (tp / (tp + fn), tn / (tn + fp), tp / (tp + fp), tn / (tn + fn))
        intervals = (at.sensitivity, at.specificity, at.ppv, at.npv)
        assert tuple(each.value for each in intervals) == pytest.approx(expected)
        for each, whole in zip(intervals, (tp + fn, tn + fp, tp + fp, tn + fn), strict=True):
            assert each.low < each.value < each.high
            # About that of independent images.
            width = 2 * 1.96 * math.sqrt(each.value * (1 - each.value) / whole)
            assert 0.6 * width < each.high - each.low < 1.6 * width


def test_decision_curve_by_counting() -> None:
    labels, scores = sample(80, 2)
    scores[0, 0] = 0.29  # equal to a threshold: positive
    found = decision_curve(scores, labels, 0)
    assert found.thresholds.tolist() == [k / 100 for k in range(1, 100)]
    for t, model, everyone in zip(found.thresholds, found.model, found.everyone, strict=True):
        positive, of_class = scores[:, 0] >= t, labels == 0
        odds = t / (1 - t)
        benefit = (positive & of_class).mean() - (positive & ~of_class).mean() * odds
        assert model == pytest.approx(benefit)
        assert everyone == pytest.approx(of_class.mean() - (~of_class).mean() * odds)


def test_decision_curve_of_a_perfect_model_is_the_frequency() -> None:
    labels = np.array([0, 1, 1, 1])
    found = decision_curve(np.eye(2)[labels], labels, 0)
    np.testing.assert_allclose(found.model, 0.25)
