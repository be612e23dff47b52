"""Tables of predictions: files of ours and of others, and what is wrong with them."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.special import softmax

from magsd.errors import DataError
from magsd.reporting.comparable import check_comparable
from magsd.reporting.predictions import PredictionTable, read_predictions, write_predictions

ARRAYS = (
    "keys",
    "patients",
    "splits",
    "labels",
    "probabilities",
    "logits",
    "refined_probabilities",
    "refined_logits",
)
SMALL = "label,probability_a,probability_b\na,0.7,0.3\nb,0.2,0.8\na,0.4,0.6\n"


def assert_same(first: PredictionTable, second: PredictionTable) -> None:
    assert first.name == second.name
    assert first.classes == second.classes
    assert first.warnings == second.warnings
    assert list(first.extra) == list(second.extra)
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))
    for name, values in first.extra.items():
        np.testing.assert_array_equal(values, second.extra[name])


@pytest.fixture
def read(tmp_path: Path):
    def from_text(text: str) -> PredictionTable:
        path = tmp_path / "others.csv"
        path.write_text(text, encoding="utf-8")
        return read_predictions(path)

    return from_text


@pytest.mark.parametrize("refined", [True, False])
def test_a_written_table_reads_back_bit_for_bit(tmp_path, make_table, refined) -> None:
    table = make_table(refined=refined)
    write_predictions(tmp_path / "run" / "predictions.csv", table)
    assert_same(read_predictions(tmp_path / "run" / "predictions.csv"), table)


def test_columns_stand_in_the_documented_order(tmp_path, make_table) -> None:
    table = make_table(extra={"split": np.full(12, "x"), "age": np.full(12, "7")})
    write_predictions(tmp_path / "predictions.csv", table)
    header, first = (tmp_path / "predictions.csv").read_text(encoding="utf-8").splitlines()[:2]
    kinds = ("logit", "probability", "refined_logit", "refined_probability")
    columns = [f"{kind}_{name}" for kind in kinds for name in ("a", '"Überguss, links"', "c")]
    columns = [re.sub(r'(\w+_)"(.*)"', r'"\1\2"', name) for name in columns]
    assert header == ",".join(
        ["key", "patient", "split", "label", "prediction", *columns, "csv_split", "age"]
    )
    predicted = table.classes[table.refined_probabilities[0].argmax()]
    label = table.classes[table.labels[0]]
    cells = [f'"{name}"' if "," in name else name for name in (label, predicted)]
    assert first.startswith(f"images/0.png,p0,validation,{','.join(cells)},")


def test_three_images_of_others_need_labels_and_probabilities_alone(read) -> None:
    table = read(SMALL)
    assert (table.name, table.classes, table.kinds) == ("others", ("a", "b"), ("raw",))
    assert table.keys.tolist() == table.patients.tolist() == ["1", "2", "3"]
    assert table.splits.tolist() == ["test"] * 3
    assert table.labels.tolist() == [0, 1, 0]
    assert table.predicted("raw").tolist() == [0, 1, 1]
    assert table.logits is None
    np.testing.assert_allclose(softmax(table.logits_of("raw"), axis=1), table.probabilities)
    assert table.warnings == ()


def test_probabilities_are_the_softmax_of_logits(read) -> None:
    table = read("label,logit_a,logit_b\na,0,1\nb,-2,3.5\n")
    np.testing.assert_array_equal(table.probabilities, softmax([[0, 1], [-2, 3.5]], axis=1))


def test_logits_that_disagree_with_probabilities_are_a_warning(read) -> None:
    text = "label,logit_a,logit_b,probability_a,probability_b\na,0,0,{},{}\n"
    assert read(text.format(0.5004, 0.4996)).warnings == ()
    (warning,) = read(text.format(0.6, 0.4)).warnings
    assert "differ by up to 0.1 " in warning


def test_an_empty_patient_is_its_own(read) -> None:
    for empty in ("", "nan", " NA "):
        rows = f"2,a,1,0\n{empty},b,0,1\n{empty},b,0,1\n"
        table = read(f"patient,label,probability_a,probability_b\n{rows}")
        assert len(set(table.patients.tolist())) == 3
        assert table.unnamed == 2


def test_the_table_is_named_by_its_file_or_run(tmp_path) -> None:
    (tmp_path / "seed 3").mkdir()
    for name, expected in (("seed 3/predictions.csv", "seed 3"), ("theirs.csv", "theirs")):
        (tmp_path / name).write_text(SMALL)
        assert read_predictions(tmp_path / name).name == expected
    assert read_predictions(tmp_path / "theirs.csv", name="B").name == "B"


def test_rounded_probabilities_are_accepted(read) -> None:
    assert len(read("label,probability_a,probability_b,probability_c\na,0.333,0.333,0.333\n")) == 1


def test_a_patient_on_two_sides_is_a_warning(read) -> None:
    head = "patient,split,label,probability_a,probability_b\n"
    table = read(head + "x,train,a,1,0\nx,test,b,0,1\ny,test,b,0,1\ny,test,b,0,1\n")
    (warning,) = table.warnings
    assert warning.startswith("1 patients have images in more than one of train, test, the first x")
    assert table.side("test").warnings == table.warnings


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the table has no rows"),
        ("label,x\na,1\n", "no column probability_CLASS or logit_CLASS; it has label, x"),
        ("probability_a,probability_b\n1,0\n", "no column label; it has probability_a"),
        ("label;probability_a\na;1\n", "separate the cells by commas"),
        ("label,probability_a\na,1\n", "'a' is the only class"),
        ("label,probability_a,probability_b\n", "the table has no rows"),
        ("label,label,probability_a\n", "two columns are named 'label'"),
        ("label,probability_a,probability_b\na,1,0\nc,1,0\n", "line 3: the label 'c' has no"),
        ("label,probability_a,probability_b\na,1,0\na,1,0,0\n", "line 3: 4 cells under 3 columns"),
        ("label,probability_a,probability_b\na,0.6,0.398\n", "line 2: .* sum to 0.998, not to 1"),
        ("label,probability_a,probability_b\na,1.5,-0.5\n", "probability_a is 1.5, not within"),
        ("label,probability_a,probability_b\na,1,0\na,1,-2\n", "line 3: probability_b is -2"),
        ("label,probability_a,probability_b\na,nan,1\n", "line 2: probability_a is 'nan', not a"),
        ("label,probability_a,probability_b\na,1,\n", "line 2: probability_b is '', not a finite"),
        ("label,logit_a,logit_b\na,1,0\na,0,inf\n", "line 3: logit_b is 'inf', not a finite"),
        ("label,logit_a,logit_b\na,1,0\na,0,NaN\n", "line 3: logit_b is 'NaN', not a finite"),
        ("label,logit_a,logit_b\na,1,zero\n", "line 2: logit_b is 'zero', not a finite number"),
        ("label,logit_a,logit_b,probability_a\na,1,0,1\n", "no column probability_b; add it"),
        (
            "label,logit_a,probability_a,probability_b\na,1,1,0\n",
            "no column logit_b; add it",
        ),
        (
            "label,logit_a,logit_b,refined_logit_a,refined_logit_c\na,1,1,0,0\n",
            "no column refined_logit_b; add it",
        ),
        (
            "label,logit_a,logit_b,logit_c,probability_a,probability_b\na,0,0,0,1,0\n",
            "no column probability_c; add it",
        ),
        ("key,label,logit_a,logit_b\nx,a,1,0\ny,a,0,1\nx,b,0,1\n", "line 4: .* 'x' is on line 2"),
        ("key,label,logit_a,logit_b\n,a,1,0\n", "line 2: the key is empty"),
        ("split,label,logit_a,logit_b\nval,a,1,0\n", "line 2: unknown split 'val'; exp"),
        ('label,logit_a,logit_b\n"a,1,0\n', "no CSV"),
    ],
)  # fmt: skip
def test_errors_name_the_file_and_what_to_do(read, text, message) -> None:
    with pytest.raises(DataError, match=message) as error:
        read(text)
    assert "others.csv" in str(error.value)


def test_files_that_are_none(tmp_path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_predictions(tmp_path / "x.csv")
    with pytest.raises(DataError, match="cannot be read"):
        read_predictions(tmp_path)
    (tmp_path / "x.csv").write_bytes("label,logit_ä".encode("latin-1"))
    with pytest.raises(DataError, match="not UTF-8"):
        read_predictions(tmp_path / "x.csv")


def test_rows_keep_their_order_and_all_columns(make_table) -> None:
    table = make_table()
    chosen = table.rows([5, 2])
    assert chosen.keys.tolist() == ["images/5.png", "images/2.png"]
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(chosen, name), getattr(table, name)[[5, 2]])
    assert chosen.extra["sex"].tolist() == table.extra["sex"][[5, 2]].tolist()
    assert table.side("test").keys.tolist() == [f"images/{i}.png" for i in (2, 3, 6, 7, 10, 11)]
    assert len(table.side("external")) == 0


def test_a_table_checks_its_shapes(make_table) -> None:
    with pytest.raises(ValueError, match=r"labels: expected shape \(12,\), got \(11,\)"):
        make_table(labels=np.zeros(11, dtype=np.int64))
    with pytest.raises(ValueError, match=r"logits: expected shape \(12, 3\), got \(12, 2\)"):
        make_table(logits=np.zeros((12, 2)))


def test_refined_predictions_that_are_not_there(make_table) -> None:
    with pytest.raises(ValueError, match="no refined predictions"):
        make_table(refined=False).of("refined")


def test_tables_are_brought_to_one_order_of_images_and_classes(make_table) -> None:
    table = make_table()
    order = np.random.default_rng(1).permutation(12)
    other = table.rows(order)
    other = replace(
        other,
        name="other",
        classes=("c", "a", "Überguss, links"),
        labels=np.array([1, 2, 0])[other.labels],
        **{name: getattr(other, name)[:, [2, 0, 1]] for name in ARRAYS[4:]},
    )
    first, second = check_comparable([table, other], "test")
    assert_same(first, table.side("test"))
    assert_same(replace(second, name="run"), first)


def test_tables_of_other_images_labels_or_classes_are_not_compared(make_table) -> None:
    table = make_table()
    other = replace(table, name="other")
    two = replace(
        other, classes=("a", "c"), labels=np.zeros(12, dtype=np.int64),
        **{name: getattr(other, name)[:, :2] for name in ARRAYS[4:]},
    )  # fmt: skip
    with pytest.raises(DataError, match="run has the class 'Überguss, links', other has not"):
        check_comparable([table, two], "test")
    with pytest.raises(DataError, match="other has the class 'Überguss, links', run has not"):
        check_comparable([replace(two, name="run"), other], "test")
    with pytest.raises(DataError, match=r"1 of the 6 test images of run .* first images/11\.png"):
        check_comparable([table, other.rows(np.arange(11))], "test")
    relabeled = replace(other, labels=(other.labels + (np.arange(12) == 3)) % 3)
    with pytest.raises(DataError, match=r"1 images have different labels, the first images/3\.png"):
        check_comparable([table, relabeled], "test")
    assert len(check_comparable([table, relabeled], "validation")) == 2


def test_patients_of_the_first_table_count(make_table) -> None:
    table = make_table()
    first, second = check_comparable([table, replace(table, patients=table.keys)], "test")
    assert second.patients.tolist() == first.patients.tolist()
    assert "patients are those of run" in second.warnings[-1]
