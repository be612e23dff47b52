"""Splits by patient."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from magsd.data import (
    Record,
    Split,
    choose_split,
    hold_out,
    open_source,
    read_split,
    split_by_patient,
    split_of_rest,
    write_split,
)
from magsd.errors import DataError


def make_records(patients: dict[str, int], images: int = 2) -> list[Record]:
    return [
        Record(f"{label}/{patient}-{image}", label, f"{label}{patient}")
        for label, count in patients.items()
        for patient in range(count)
        for image in range(1 + (patient % images))
    ]


@settings(max_examples=25, deadline=None)
@given(
    counts=st.lists(st.integers(5, 30), min_size=2, max_size=4),
    folds=st.integers(2, 5),
    seed=st.integers(0, 100),
)
def test_folds_partition_the_images_and_keep_patients_together(
    counts: list[int], folds: int, seed: int
) -> None:
    records = make_records({f"class{i}": count for i, count in enumerate(counts)})
    splits = [split_by_patient(records, folds=folds, fold=f, seed=seed) for f in range(folds)]
    seen = Counter(index for split in splits for index in split.validation)
    assert seen == dict.fromkeys(range(len(records)), 1)
    for split in splits:
        assert sorted(split.train + split.validation) == list(range(len(records)))
        train = {records[i].patient for i in split.train}
        assert not train & {records[i].patient for i in split.validation}


def test_stratified() -> None:
    records = make_records({"a": 100, "b": 40})
    split = split_by_patient(records, folds=5, fold=2, seed=1)
    overall, held = (Counter(r.label for r in rs) for rs in (
        records, [records[i] for i in split.validation]))  # fmt: skip
    for label in "ab":
        assert abs(held[label] / overall[label] - 0.2) < 0.05


@settings(max_examples=25, deadline=None)
@given(
    counts=st.lists(st.integers(5, 30), min_size=2, max_size=4),
    folds=st.integers(2, 5),
    seed=st.integers(0, 100),
)
def test_three_sides(counts: list[int], folds: int, seed: int) -> None:
    """The test sides are what two-sided folds validate on; the rest is divided by patient."""
    records = make_records({f"class{i}": count for i, count in enumerate(counts)})
    for fold in range(folds):
        how = {"folds": folds, "fold": fold, "seed": seed}
        split = choose_split(records, **how, test=True)
        assert split.test == split_by_patient(records, **how).validation
        assert sorted(split.train + split.validation + split.test) == list(range(len(records)))
        sides = [split.train, split.validation, split.test]
        patients = [{records[i].patient for i in side} for side in sides]
        assert len(set().union(*patients)) == sum(map(len, patients))
        labels = {record.label for record in records}
        assert all({records[i].label for i in side} == labels for side in sides)
        assert choose_split(records, **how, test=True) == split


def test_validation_is_about_as_large_as_the_test_side() -> None:
    split = choose_split(make_records({"a": 100, "b": 50}), test=True)
    sizes = [len(side) for side in (split.train, split.validation, split.test)]
    assert sizes == pytest.approx([135, 45, 45], abs=4)
    other = choose_split(make_records({"a": 100, "b": 50}), seed=1, test=True)
    assert other.validation != split.validation


def test_too_few_patients_for_three_sides() -> None:
    """Two sides are then what is left; three patients of a class are enough for three sides."""
    records = make_records({"a": 9, "b": 2}, images=1)
    with pytest.raises(DataError, match=r"'b' has one patient beside the test side.*test=none"):
        choose_split(records, folds=2, test=True)
    assert choose_split(records, folds=2).validation
    split = choose_split(make_records({"a": 9, "b": 3}, images=1), folds=3, test=True)
    assert [sum(i > 8 for i in side) for side in (split.train, split.validation)] == [1, 1]
    # Three patients of two classes each: whoever stands alone on a side lacks one.
    pairs = [
        Record(p + c, c, p) for p, held in zip("pqr", ("ab", "bc", "ac"), strict=True) for c in held
    ]
    with pytest.raises(DataError, match=r"no part .* another data\.split_seed"):
        hold_out(pairs, Split(list(range(6)), [], []), parts=4)


def test_seed() -> None:
    records = make_records({"a": 30, "b": 30})
    first = split_by_patient(records, seed=0)
    assert split_by_patient(records, seed=0) == first
    assert split_by_patient(records, seed=1) != first


def test_phantom_patients() -> None:
    records = open_source("phantom:n=96,size=32").records
    split = split_by_patient(records, folds=4)
    assert Counter(records[i].label for i in split.validation) == dict.fromkeys(
        ("normal", "focal", "diffuse", "ground-glass"), 6
    )


def test_too_few_patients_are_named() -> None:
    with pytest.raises(DataError, match="class 'b' has one patient only"):
        split_by_patient(make_records({"a": 9, "b": 1}), folds=2)
    with pytest.raises(DataError, match="class 'b' has 3 patients, fewer than the 5 folds"):
        split_by_patient(make_records({"a": 9, "b": 3}), folds=5)
    many_images_of_one = [Record(f"b/{i}", "b", "one") for i in range(10)]
    with pytest.raises(DataError, match="'b' has one patient"):
        split_by_patient(make_records({"a": 9}) + many_images_of_one, folds=2)
    with pytest.raises(DataError, match="two classes"):
        split_by_patient(make_records({"a": 9}))


@pytest.mark.parametrize(("folds", "fold"), [(1, 0), (5, 5), (5, -1)])
def test_fold_out_of_range(folds: int, fold: int) -> None:
    with pytest.raises(DataError, match="must"):
        split_by_patient(make_records({"a": 9, "b": 9}), folds=folds, fold=fold)


class TestPublished:
    RECORDS = tuple(
        Record(f"{label}{i}", label, f"{label}{i}", split="validation" if i == 2 else "train")
        for label in "ab"
        for i in range(3)
    )

    def test_choice(self) -> None:
        split = Split([0, 1, 3, 4], [2, 5])
        assert choose_split(self.RECORDS) == choose_split(self.RECORDS, how="published") == split
        assert choose_split(self.RECORDS, how="folds", folds=3) == split_by_patient(
            self.RECORDS, folds=3
        )
        assert choose_split(self.RECORDS, test=True) == split  # no test list, no test side
        plain = make_records({"a": 5, "b": 5})
        assert choose_split(plain, fold=2) == split_by_patient(plain, fold=2)

    def test_a_test_list(self, caplog: pytest.LogCaptureFixture) -> None:
        """It is the test side, and without one what is validated on."""
        named = {2: "test", 5: "test"}
        records = [dataclasses.replace(r, split=named.get(i, "train")) for i, r in enumerate(
            make_records({"a": 3, "b": 3}, images=1))]  # fmt: skip
        split = choose_split(records, test=True)
        assert split.test == [2, 5]
        assert {records[i].label for i in split.validation} == {"a", "b"}
        assert sorted(split.train + split.validation) == [0, 1, 3, 4]
        assert choose_split(records) == Split([0, 1, 3, 4], [2, 5])
        with pytest.raises(DataError, match="no training image here"):
            choose_split(records[2:3] + records[5:], test=True)
        three = [dataclasses.replace(r, split="validation") if i in (1, 4) else r
                 for i, r in enumerate(records)]  # fmt: skip
        assert choose_split(three, test=True) == Split([0, 3], [1, 4], [2, 5])
        assert choose_split(three) == Split([0, 3], [1, 4])
        assert not caplog.text
        shared = [dataclasses.replace(r, patient=r.label) for r in three]
        assert choose_split(shared, test=True) == Split([0, 3], [1, 4], [2, 5])
        assert "2 patients stand on several sides" in caplog.text

    def test_patients_on_both_sides(self, caplog: pytest.LogCaptureFixture) -> None:
        records = [dataclasses.replace(record, patient=record.label) for record in self.RECORDS]
        assert choose_split(records) == Split([0, 1, 3, 4], [2, 5])
        assert "2 patients stand on several sides of the published split, e.g. a" in caplog.text

    def test_refusals(self) -> None:
        with pytest.raises(DataError, match=r"fold 1 is asked for.*data\.split=folds"):
            choose_split(self.RECORDS, fold=1)
        with pytest.raises(DataError, match="10 of 10 images stand on no side"):
            choose_split(make_records({"a": 5, "b": 5}, images=1), how="published")
        some = [dataclasses.replace(self.RECORDS[0], split=None), *self.RECORDS[1:]]
        with pytest.raises(DataError, match=r"1 of 6 images stand on no side .* the first a0"):
            choose_split(some)
        train = [record for record in self.RECORDS if record.split == "train"]
        with pytest.raises(DataError, match="no validation image"):
            choose_split(train)
        with pytest.raises(DataError, match="no training image of class b"):
            choose_split([*self.RECORDS[:3], self.RECORDS[5]])
        with pytest.raises(DataError, match="two classes"):
            choose_split(self.RECORDS[:3])


def test_what_cannot_be_read_leaves_its_side_and_moves_nothing() -> None:
    records, split = TestPublished.RECORDS, Split([0, 1, 3, 4], [2, 5])
    rest = [record for record in records if record.key not in ("a1", "b2")]
    assert split_of_rest(records, split, records) == split
    assert split_of_rest(records, split, rest) == Split([0, 2, 3], [1])
    with pytest.raises(DataError, match=r"2 of 6 .* no training image of class b is left"):
        split_of_rest(records, split, [r for r in records if r.key not in ("b0", "b1")])
    with pytest.raises(DataError, match="no validation image is left"):
        split_of_rest(records, split, [r for r in records if r.split == "train"])
    tested = Split([0, 3], [1, 4], [2, 5])
    assert split_of_rest(records, tested, rest) == Split([0, 2], [3], [1])
    with pytest.raises(DataError, match="no test image is left"):
        split_of_rest(records, tested, [r for r in records if r.split == "train"])


def test_write_and_read(tmp_path: Path) -> None:
    records = make_records({"a": 10, "b, c": 10})
    split = split_by_patient(records)
    write_split(tmp_path / "split.csv", records, split)
    assert [p.name for p in tmp_path.iterdir()] == ["split.csv"]
    assert read_split(tmp_path / "split.csv", records) == split
    # The order of the data may change, its content may not.
    turned = records[::-1]
    again = read_split(tmp_path / "split.csv", turned)
    assert {turned[i].key for i in again.train} == {records[i].key for i in split.train}


def test_read_of_other_data(tmp_path: Path, caplog) -> None:
    records = make_records({"a": 5, "b": 5})
    path = tmp_path / "split.csv"
    write_split(path, records, split_by_patient(records))
    split = read_split(path, records)
    key = records[0].key
    assert not caplog.text
    with pytest.raises(DataError, match=rf"1 listed images are not among.* first {key}"):
        read_split(path, records[1:])
    rest = read_split(path, records[1:], complete=False)
    assert len(rest.train) + len(rest.validation) == len(records) - 1
    assert f"1 listed images are not among the data, the first {key}" in caplog.text
    assert read_split(path, [*records, Record("new", "c", "new")]) == split
    assert "1 images of the data are not listed, and left out, the first new" in caplog.text
    changed = [Record(key, "b", records[0].patient), *records[1:]]
    with pytest.raises(DataError, match="1 images have another label"):
        read_split(path, changed)
    assert read_split(path, changed, complete=False) == split
    assert f"1 images have another label in the data, the first {key}" in caplog.text
    assert read_split(path, [Record(key, records[0].label, "other"), *records[1:]]) == split
    assert "1 images have another patient" in caplog.text
    path.write_text(path.read_text().replace("validation", "tests"))
    with pytest.raises(DataError, match="unknown split 'tests'"):
        read_split(path, records)
    path.write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match="not a split file"):
        read_split(path, records)
    with pytest.raises(DataError, match="cannot be read"):
        read_split(tmp_path / "none.csv", records)


def test_write_and_read_three_sides(tmp_path: Path) -> None:
    records = make_records({"a": 10, "b": 10})
    split = choose_split(records, test=True)
    path = tmp_path / "split.csv"
    write_split(path, records, split)
    assert read_split(path, records) == split
    # A test side that is a source of its own may have the same keys.
    others = records[:3]
    write_split(path, records, Split(split.train, split.validation), test=("csv:x, y", others))
    assert read_split(path, records, complete=False) == Split(split.train, split.validation)
    assert read_split(path, others, other=True) == Split([], [], [0, 1, 2])
    with pytest.raises(DataError, match="1 listed images are not among the data"):
        read_split(path, others[1:], other=True)


def test_a_split_may_leave_images_out(tmp_path: Path) -> None:
    records = make_records({"a": 3, "b": 3}, images=1)
    write_split(tmp_path / "s.csv", records, Split([0, 3], [1, 4]))
    kept = [records[i] for i in (0, 1, 3, 4)]
    assert read_split(tmp_path / "s.csv", kept) == Split([0, 2], [1, 3])


def test_real_radiographs(shared_dir: Path) -> None:
    records = open_source(f"csv:{shared_dir / 'data' / 'cxr3' / 'labels.csv'}").records
    for fold in range(5):
        split = split_by_patient(records, fold=fold)
        assert 170 < len(split.validation) < 205
        train = {records[i].patient for i in split.train}
        assert not train & {records[i].patient for i in split.validation}
        held = Counter(records[i].label for i in split.validation)
        assert 15 <= held["covid-19"] <= 27


def test_a_rare_class_does_not_take_half_of_the_training_images():
    records = [Record(f"{i}", "a" if i < 200 else "b", f"p{i}") for i in range(202)]
    whole = Split(list(range(202)), [], [])
    split = hold_out(records, whole, parts=5)
    assert 38 <= len(split.validation) <= 44
    for side in (split.train, split.validation):
        assert {records[i].label for i in side} == {"a", "b"}
