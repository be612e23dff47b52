"""Intervals by the bootstrap over patients."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from magsd.errors import DataError
from magsd.reporting.bootstrap import Resampling, bootstrap, bootstrap_differences
from magsd.reporting.estimates import compare, estimate
from magsd.reporting.measures import OVERALL, PER_CLASS, Measures


def mean_of(values):
    """The weighted mean, as a statistic."""
    return lambda weights: (values @ weights / weights.sum(axis=0))[None]


@pytest.mark.parametrize("method", ["bca", "percentile"])
def test_intervals_are_those_of_scipy(method) -> None:
    """Within the noise of resampling, on a skewed sample whose BCa interval is shifted."""
    values = np.random.default_rng(0).exponential(size=80)
    (found,) = bootstrap(mean_of(values), 80, Resampling(20000, method=method))
    expected = stats.bootstrap(
        (values,), np.mean, n_resamples=20000, method=method, rng=np.random.default_rng(1)
    ).confidence_interval
    noise = 0.03 * (expected.high - expected.low)
    assert found.value == values.mean()
    assert found.low == pytest.approx(expected.low, abs=noise)
    assert found.high == pytest.approx(expected.high, abs=noise)


def test_resamples_do_not_depend_on_how_they_are_cut() -> None:
    statistic = mean_of(np.random.default_rng(0).normal(size=50))
    resampling = Resampling(300, seed=3)
    assert bootstrap(statistic, 50, resampling) == bootstrap(statistic, 50, resampling, rows=2**19)
    assert bootstrap(statistic, 50, resampling) != bootstrap(statistic, 50, Resampling(300, seed=4))


def test_the_jackknife_by_groups_has_the_acceleration_of_that_by_patients(monkeypatch) -> None:
    values = np.random.default_rng(0).exponential(size=3000)
    ends = []
    for groups in (200, 3000):
        monkeypatch.setattr("magsd.reporting.bootstrap._JACKKNIFE", groups)
        (found,) = bootstrap(mean_of(values), 3000, Resampling(500))
        ends.append([found.low, found.high])
    assert ends[0] == pytest.approx(ends[1], abs=0.003)


def simulated(rng, patients: int, skill: float = 1.0):
    """Binary labels and scores of patients with one to four images that resemble each other."""
    count = rng.integers(1, 5, patients)
    of = np.repeat(np.arange(patients), count)
    labels = np.repeat(rng.integers(0, 2, patients), count)
    shared = np.repeat(rng.normal(size=patients), count)
    score = skill * labels + shared + 0.5 * rng.normal(size=len(of))
    probability = 1 / (1 + np.exp(-score))
    return labels, np.stack([1 - probability, probability], axis=1), of


def test_intervals_cover_the_truth() -> None:
    """About 95 of 100 intervals do; the bounds hold for 94 % to 96 % in all but one of 10^4 runs.

    Per patient. Images of a patient resemble each other: intervals by image cover less often.
    """
    rng = np.random.default_rng(0)
    # Two standard normals of patients and images, 1 apart; the cut at a probability of 0.5.
    deviation = math.sqrt(1.25)
    truth = {
        ("auroc", 1): stats.norm.cdf(1 / (deviation * math.sqrt(2))),
        ("recall", 1): stats.norm.cdf(1 / deviation),
    }
    covered = {(name, cluster): 0 for name in truth for cluster in ("patient", "image")}
    runs = 200
    for run in range(runs):
        labels, scores, of = simulated(rng, 80)
        for cluster in ("patient", "image"):
            measures = Measures(labels, scores, of if cluster == "patient" else None)
            resampling = Resampling(250, seed=run)
            found = bootstrap(measures.values, measures.patients, resampling)
            intervals = dict(zip(measures.names, found, strict=True))
            for name, value in truth.items():
                interval = intervals[name]
                covered[name, cluster] += interval.low <= value <= interval.high
    low, high = stats.binom.ppf(1e-4, runs, 0.94), stats.binom.ppf(1 - 1e-4, runs, 0.96)
    for name in truth:
        assert low <= covered[name, "patient"] <= high, covered
        assert covered[name, "image"] < 0.88 * runs, covered


def test_intervals_by_patient_are_wider_where_images_resemble_each_other(make_table) -> None:
    labels, scores, of = simulated(np.random.default_rng(0), 300)
    rows = len(of)
    scores = np.insert(scores, 2, 0.0, axis=1)
    table = make_table(
        rows, refined=False, labels=labels, probabilities=scores, patients=of.astype(np.str_)
    )
    widths = {}
    for cluster in ("patient", "image"):
        found = estimate(table, resampling=Resampling(500, cluster=cluster))
        ends = [*found.overall.values(), *found.per_class["a"].values()]
        widths[cluster] = np.array([each.high - each.low for each in ends])
    ratio = dict(zip((*OVERALL, *PER_CLASS), widths["patient"] / widths["image"], strict=True))
    # Images of a patient are as good as one: with 2.5 of them up to sqrt(2.5 * 1.2) = 1.7.
    for name in ("accuracy", "balanced_accuracy", "auroc", "brier", "recall", "average_precision"):
        assert 1.2 < ratio[name] < 1.9, ratio


def test_estimates_count_what_they_are_made_of(make_table) -> None:
    table = make_table(60)
    found = estimate(table, "refined", Resampling(50))
    assert (found.images, found.patients) == (60, 30)
    assert sum(found.class_images.values()) == 60
    for k, name in enumerate(table.classes):
        assert found.class_patients[name] == len({*table.patients[table.labels == k].tolist()})
        assert sum(found.confusion[k]) == found.class_images[name]
    right = (table.predicted("refined") == table.labels).mean()
    assert found.overall["accuracy"].value == right
    assert np.trace(found.confusion) == pytest.approx(60 * right)
    assert found == estimate(table, "refined", Resampling(50))


def test_undefined_resamples_are_counted(make_table) -> None:
    """One patient of five has the third class: a share of 0.8^5 of the resamples lacks it."""
    labels = np.array([0, 1, 0, 1, 2])
    table = make_table(
        5,
        refined=False,
        labels=labels,
        probabilities=np.eye(3)[labels] * 0.4 + 0.2,
        logits=None,
        keys=np.arange(5).astype(np.str_),
        patients=np.arange(5).astype(np.str_),
        splits=np.full(5, "test"),
    )
    found = estimate(table, resampling=Resampling(1000))
    recall, auroc = found.per_class["c"]["recall"], found.overall["auroc"]
    assert 280 < recall.undefined < 375
    # Means want all three classes.
    assert auroc.undefined > recall.undefined
    assert found.overall["accuracy"].undefined == 0
    assert auroc.value == 1
    assert auroc.flat


def test_a_share_of_one_has_an_exact_interval() -> None:
    """No resample has another value. With 24 right of 24: 0.025^(1/24) = 0.858."""
    labels = np.arange(48) % 2
    measures = Measures(labels, np.eye(2)[labels])
    found = bootstrap(measures.values, 48, Resampling(100), shares=measures.shares)
    intervals = dict(zip(measures.names, found, strict=True))
    recall = intervals["recall", 0]
    assert recall.exact
    assert (recall.value, recall.high) == (1, 1)
    expected = stats.binomtest(24, 24).proportion_ci(method="exact")
    assert recall.low == pytest.approx(expected.low)
    assert recall.low == pytest.approx(0.858, abs=1e-3)
    # Two images of a patient count once.
    measures = Measures(labels, np.eye(2)[labels], np.arange(48) // 4)
    found = bootstrap(measures.values, 12, Resampling(100), shares=measures.shares)
    assert found[measures.names.index(("recall", 0))].low == pytest.approx(0.025 ** (1 / 12))


def test_one_patient_has_no_interval(make_table) -> None:
    table = make_table(4, patients=np.full(4, "p"))
    found = estimate(table, resampling=Resampling(10))
    accuracy = found.overall["accuracy"]
    assert accuracy.value == (table.predicted("raw") == table.labels).mean()
    for name in ("nll", "ece"):
        measure = found.overall[name]
        assert measure.value > 0
        assert math.isnan(measure.low)
        assert math.isnan(measure.high)
        assert measure.undefined == 0
    error = compare(table, table, resampling=Resampling(10)).overall["nll"]
    assert (error.value, error.undefined) == (0, 0)
    assert math.isnan(error.p_value)


def test_no_images(make_table) -> None:
    empty = make_table().side("external")
    with pytest.raises(DataError, match="run: no images here"):
        estimate(empty)
    with pytest.raises(DataError, match="run: no images here"):
        compare(empty, empty)


def test_resampling_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="at least one resample"):
        Resampling(0)
    with pytest.raises(ValueError, match="level between"):
        Resampling(level=95)


@pytest.mark.parametrize("method", ["bca", "percentile"])
def test_p_values_are_uniform_without_a_difference(method) -> None:
    rng = np.random.default_rng(0)
    found = []
    for seed in range(200):
        statistic = mean_of(rng.normal(size=60))
        (difference,) = bootstrap_differences(statistic, 60, Resampling(400, seed, method=method))
        found.append(difference.p_value)
        # The interval says the same, but at its very end.
        if abs(difference.p_value - 0.05) > 0.01:
            assert (difference.p_value < 0.05) == (not difference.low <= 0 <= difference.high)
    assert stats.kstest(found, "uniform").pvalue > 0.01
    (far,) = bootstrap_differences(mean_of(rng.normal(1, 0.5, 60)), 60, Resampling(400))
    assert far.p_value == pytest.approx(2 / 401)


def test_comparison_pairs_the_images(make_table) -> None:
    """Models that err on the same images differ less than two that err on others."""
    table = make_table(200, skill=1.5)
    rng = np.random.default_rng(5)
    near = table.probabilities + 0.02 * rng.random((200, 3))
    near /= near.sum(axis=1, keepdims=True)
    twin = make_table(200, skill=1.5, name="twin", probabilities=near)
    other = make_table(200, skill=1.5, name="other", probabilities=table.refined_probabilities)
    resampling = Resampling(300)
    paired = {each.name: compare(table, each, resampling=resampling) for each in (twin, other)}
    for name in ("accuracy", "auroc", "nll"):
        alone = estimate(table, resampling=resampling).overall[name]
        ends = [paired[each].overall[name] for each in ("twin", "other")]
        assert ends[0].high - ends[0].low < 0.5 * (ends[1].high - ends[1].low)
        theirs = estimate(twin, resampling=resampling).overall[name]
        assert ends[0].value == pytest.approx(alone.value - theirs.value)
    # Raw against refined of one table is the same comparison.
    kinds = compare(table, table, ("raw", "refined"), resampling)
    assert kinds.overall == paired["other"].overall
    assert kinds.auroc == paired["other"].auroc


def test_a_model_does_not_differ_from_itself(make_table) -> None:
    table = make_table(60)
    found = compare(table, table, resampling=Resampling(50))
    error = found.overall.pop("ece")
    assert error.value == 0
    for difference in (*found.overall.values(), *found.per_class["a"].values()):
        assert (difference.value, difference.low, difference.high) == (0, 0, 0)
        assert difference.p_value == 1
    assert found.auroc["a"].p_value == 1


def test_a_difference_of_calibration_errors_is_not_tested(make_table) -> None:
    """Resamples of two that are truly 0 leave out 0 in a third of the sets."""
    table = make_table(60)
    other = replace(table, probabilities=table.refined_probabilities)
    error = compare(table, other, resampling=Resampling(20)).overall["ece"]
    errors = [estimate(each, resampling=Resampling(1)).overall["ece"] for each in (table, other)]
    assert error.value == pytest.approx(errors[0].value - errors[1].value)
    assert all(map(math.isnan, (error.low, error.high, error.p_value)))


def test_tables_that_were_not_aligned(make_table) -> None:
    table = make_table()
    with pytest.raises(ValueError, match="check_comparable"):
        compare(table, table.rows(np.arange(12)[::-1]))


def test_chance_alone_is_less_of_a_calibration_error() -> None:
    """Of calibrated probabilities; percentiles of an error that chance makes never reach 0."""
    rng = np.random.default_rng(0)
    reach = {"reversed": 0, "percentile": 0}
    for run in range(60):
        probability = rng.uniform(0.5, 1, 200)
        labels = (rng.random(200) > probability).astype(np.int64)
        measures = Measures(labels, np.stack([probability, 1 - probability], axis=1))
        resampling = Resampling(200, seed=run, method="percentile")
        for name, biased in (("reversed", measures.biased), ("percentile", None)):
            found = bootstrap(measures.values, 200, resampling, biased=biased)
            error = found[measures.names.index(("ece", None))]
            assert error.value > 0.01
            reach[name] += error.low < 0.005
    assert reach["percentile"] == 0
    assert reach["reversed"] > 30
