"""Patients instead of images, and subgroups."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from magsd.errors import DataError
from magsd.reporting.bootstrap import Resampling
from magsd.reporting.estimates import estimate
from magsd.reporting.groups import NONE, OTHERS, aggregate, subgroups
from magsd.reporting.predictions import PredictionTable

FEW = Resampling(20)
SCORES = [[0.2, 0.8], [0.6, 0.4], [0.9, 0.1], [0.5, 0.5], [0.3, 0.7]]


def table_of(patients, labels, splits=None, **extra) -> PredictionTable:
    rows = len(patients)
    return PredictionTable(
        name="run",
        classes=("a", "b"),
        keys=np.arange(rows).astype(np.str_),
        patients=np.array(patients),
        splits=np.array(splits or ["test"] * rows),
        labels=np.array(labels),
        probabilities=np.array(SCORES[:rows]),
        refined_probabilities=np.array(SCORES[:rows])[:, ::-1],
        extra={name: np.array(cells) for name, cells in extra.items()},
    )


def test_a_patient_is_the_mean_or_the_maximum_of_its_images() -> None:
    table = table_of(["x", "y", "x", "y", "z"], [0, 1, 0, 1, 1], sex=list("fmfmf"))
    for how, expected in (
        ("mean", [[0.55, 0.45], [0.55, 0.45], [0.3, 0.7]]),
        ("max", [[0.9 / 1.7, 0.8 / 1.7], [0.6 / 1.1, 0.5 / 1.1], [0.3, 0.7]]),
    ):
        found = aggregate(table, how=how)
        assert (found.left_out, found.left_out_images) == ((), 0)
        assert found.table.keys.tolist() == found.table.patients.tolist() == ["x", "y", "z"]
        assert found.table.labels.tolist() == [0, 1, 1]
        assert found.table.extra["sex"].tolist() == ["f", "m", "f"]
        np.testing.assert_allclose(found.table.probabilities, expected)
        np.testing.assert_allclose(found.table.refined_probabilities, np.array(expected)[:, ::-1])
        np.testing.assert_allclose(found.table.logits_of("raw"), np.log(expected))
    assert estimate(found.table, resampling=FEW).patients == 3


def test_images_that_disagree_are_left_out_and_sides_are_apart() -> None:
    table = table_of(
        ["x", "x", "y", "y", "z"], [0, 1, 1, 0, 0], ["test", "test", "test", "validation", "test"]
    )
    found = aggregate(table)
    assert (found.left_out, found.left_out_images) == (("x",), 2)
    rows = zip(found.table.keys, found.table.splits, found.table.labels, strict=True)
    assert sorted((str(key), str(split), int(label)) for key, split, label in rows) == [
        ("y", "test", 1),
        ("y", "validation", 0),
        ("z", "test", 0),
    ]


def test_studies_of_a_column_and_empty_cells() -> None:
    """The image with the key 3 has no study; another study is named 3."""
    table = table_of(["x"] * 5, [0] * 5, study=["s", "s", "3", " ", "3"])
    found = aggregate(table, "study").table
    assert sorted(found.keys.tolist()) == ["3", "3", "s"]
    assert found.patients.tolist() == ["x"] * 3
    with pytest.raises(DataError, match="no column 'exam'; it has patient, split, label, study"):
        aggregate(table, "exam")


def test_texts_are_groups_and_empty_cells_are_one(make_table) -> None:
    table = make_table(60, extra={"view": np.array(["PA", "AP", ""])[np.arange(60) % 3]})
    found = subgroups(table, "view", kind="refined", resampling=FEW)
    assert [each.name for each in found] == ["AP", "PA", NONE]
    for each, remainder in zip(found, (1, 0, 2), strict=True):
        rows = table.rows(np.arange(60) % 3 == remainder)
        assert each.images == 20
        assert each.patients == rows.num_patients
        assert each.estimates == estimate(rows, "refined", FEW)
        assert sum(each.class_images.values()) == 20
        assert each.class_images == each.estimates.class_images
        assert each.small == ""


def test_none_is_a_text_and_no_number(make_table) -> None:
    for values, names in ((["none", "Asthma", "nan"], ["Asthma", "none", NONE]),
                          (["none", "-", "7"], ["7", NONE])):  # fmt: skip
        table = make_table(60, extra={"column": np.array(values)[np.arange(60) % 3]})
        assert [each.name for each in subgroups(table, "column", resampling=FEW)] == names


def test_small_groups_are_marked_and_kept(make_table) -> None:
    cells = np.array(["many"] * 57 + ["three"] * 3)
    labels = np.arange(60) % 3
    labels[57:] = 1
    found = subgroups(make_table(60, labels=labels, extra={"site": cells}), "site", resampling=FEW)
    assert [(each.name, each.images, each.small) for each in found] == [
        ("many", 57, ""),
        ("three", 3, "fewer than 10 patients; no images of a, c"),
    ]
    assert found[1].patients == 2
    assert 0 <= found[1].estimates.overall["accuracy"].value <= 1


def test_numbers_are_cut_at_quartiles_or_edges(make_table) -> None:
    ages = np.arange(60)
    cells = ages.astype(np.str_)
    for empty in ("nan", "NA", ""):
        cells[7] = empty
        table = make_table(60, extra={"age": cells})
        found = subgroups(table, "age", resampling=FEW)
        assert len(found) == 5
    assert np.quantile(np.delete(ages, 7), [0.25, 0.5, 0.75]).tolist() == [15.5, 30, 44.5]
    assert [(each.name, each.images) for each in found] == [
        ("below 15.5", 15),
        ("15.5 to below 30", 14),
        ("30 to below 44.5", 15),
        ("44.5 and above", 15),
        (NONE, 1),
    ]
    found = subgroups(table, "age", [18.0, 65.0], resampling=FEW)
    assert [(each.name, each.images) for each in found] == [
        ("below 18", 17),
        ("18 to below 65", 42),
        (NONE, 1),
    ]
    # Bins without images are left out.
    assert len(subgroups(table, "age", [100.0], resampling=FEW)) == 2


def test_few_different_numbers_are_groups_in_their_order(make_table) -> None:
    cells = np.array(["10", "9", "-1"])[np.arange(60) % 3]
    found = subgroups(make_table(60, extra={"n": cells}), "n", resampling=FEW)
    assert [each.name for each in found] == ["-1", "9", "10"]


def test_the_rarest_of_many_texts_are_one_group(make_table) -> None:
    cells = np.array([f"{k:02}x" for k in range(30)] + ["29x"] * 30)
    found = subgroups(make_table(60, extra={"site": cells}), "site", resampling=Resampling(2))
    assert len(found) == 20
    assert (found[-1].name, found[-1].images) == (OTHERS, 11)
    assert ("29x", 31) in [(each.name, each.images) for each in found]


@pytest.mark.parametrize("column", ["patient", "split", "label"])
def test_own_columns_make_groups(make_table, column) -> None:
    table = make_table(12)
    found = subgroups(table, column, resampling=Resampling(2))
    expected = {"patient": 6, "split": 2, "label": 3}
    assert len(found) == expected[column]


def test_columns_that_cannot_be_cut(make_table) -> None:
    table = make_table(extra={"sex": np.array(["f", "m"] * 6), "age": np.array(["3", "4"] * 6)})
    with pytest.raises(DataError, match="no column 'height'; it has patient, split, label, sex"):
        subgroups(table, "height")
    message = r"'sex' has edges, but not only numbers: that of images/0\.png is 'f' \(12 such"
    with pytest.raises(DataError, match=message):
        subgroups(table, "sex", [1.0])
    with pytest.raises(DataError, match="'none' has edges, but only empty cells"):
        subgroups(make_table(extra={"none": np.full(12, "nan")}), "none", [1.0])
    for edges in ([], [2.0, 1.0], [1.0, 1.0], [float("nan"), 1.0]):
        with pytest.raises(DataError, match="of 'age' do not rise"):
            subgroups(table, "age", edges)
    with pytest.raises(DataError, match="no images here"):
        subgroups(table.side("external"), "sex")


def test_no_logits_are_made_up(make_table) -> None:
    found = aggregate(replace(make_table(), patients=np.full(12, "p")))
    assert found.table.logits is None
    assert found.table.refined_logits is None
