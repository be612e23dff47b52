"""Tables as people have them: other columns, spellings, ids, paths and file formats."""

from __future__ import annotations

import dataclasses
import logging
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

from magsd.data import open_source
from magsd.errors import DataError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six images in im/, and a table is to be written beside it."""
    (tmp_path / "im").mkdir()
    for n in range(6):
        cv2.imwrite(str(tmp_path / "im" / f"{n}.png"), np.full((8, 8), 40 * n, np.uint8))
    return tmp_path


def table(folder: Path, *lines: str, options: str = "") -> str:
    """The spec of a table of these lines."""
    path = folder / "t.csv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return f"csv:{path}{options}"


class TestMapping:
    def test_any_columns(self, folder: Path) -> None:
        cv2.imwrite(str(folder / "m.png"), np.full((8, 8), 255, np.uint8))
        spec = table(
            folder,
            "Image Index,Finding Labels,Who,Area,label",
            "im/0.png,a,x,m.png,9",
            "im/1.png,b,x,,9",
            options=",file=Image Index,label=finding labels,patient=WHO,mask=Area",
        )
        source = open_source(spec)
        assert [(r.key, r.label, r.patient) for r in source.records] == [
            ("im/0.png", "a", "x"),
            ("im/1.png", "b", "x"),
        ]
        mask = source.read_mask(source.records[0])
        assert mask is not None
        assert mask.all()
        assert source.records[1].mask_kind is None
        assert open_source(source.spec).records == source.records

    def test_further_columns_travel(self, folder: Path) -> None:
        """Under their own names; they say nothing of whether a row repeats an image."""
        spec = table(
            folder,
            "file,Label,patient,Sex, Age ,,mask,box",
            'im/0.png,a,x,f,"1,5",,,1',
            "im/0.png,a,x,f,15,,,2",
            "im/1.png,b,y,,70",
        )
        first, second = open_source(spec).records
        assert dict(first.extra) == {"Sex": "f", "Age": "1,5", "box": "1"}
        assert dict(second.extra) == {"Sex": "", "Age": "70", "box": ""}
        assert len({first, second, dataclasses.replace(first)}) == 2
        assert pickle.loads(pickle.dumps(first)).extra == first.extra
        with pytest.raises(KeyError):
            first.extra["age"]

    def test_a_mapped_patient_is_not_warned_of(self, folder: Path, caplog) -> None:
        table(folder, "file,label,subject_id,doctor", "im/0.png,a,1,x", "im/1.png,b,2,x")
        source = open_source(f"csv:{folder / 't.csv'},patient=doctor")
        assert {record.patient for record in source.records} == {"x"}
        assert "subject_id" not in caplog.text

    @pytest.mark.parametrize("name", ["file", "label", "patient", "mask"])
    def test_a_column_that_is_not_there(self, name: str, folder: Path) -> None:
        spec = table(folder, "file,label", "im/0.png,a", options=f",{name}=nowhere")
        with pytest.raises(DataError, match=r"no column nowhere; it has file, label; name the"):
            open_source(spec)

    def test_the_error_shows_how_columns_are_named(self, folder: Path) -> None:
        spec = table(folder, "image,class", "im/0.png,a")
        with pytest.raises(DataError, match=r"t\.csv,file=image,label=class$"):
            open_source(spec)
        assert len(open_source(f"{spec},file=image,label=class")) == 1
        with pytest.raises(DataError, match=r"t\.csv,file=COLUMN,label=COLUMN"):
            open_source(table(folder, "one,two", "im/0.png,a"))

    def test_an_option_that_is_not_known(self, folder: Path) -> None:
        spec = table(folder, "file,label", "im/0.png,a", options=",path=file")
        with pytest.raises(DataError, match="file, label, patient, mask"):
            open_source(spec)


class TestFiles:
    @pytest.mark.parametrize("name", ["0.png", "0", "im/0"])
    def test_found_below_the_table(self, name: str, folder: Path) -> None:
        source = open_source(table(folder, "file,label", f"{name},a", "im/1.png,b"))
        assert source.read_image(source.records[0]).shape == (8, 8)
        assert source.records[0].key == name

    def test_several_of_one_name(self, folder: Path) -> None:
        (folder / "masks").mkdir()
        cv2.imwrite(str(folder / "masks" / "0.png"), np.zeros((8, 8), np.uint8))
        spec = table(folder, "file,label", "0.png,a", "im/1.png,b")
        with pytest.raises(DataError, match=r"line 2: 0\.png: 2 files have this name.*write the"):
            open_source(spec)

    def test_a_path_that_leads_nowhere_is_not_replaced_by_another(self, folder: Path) -> None:
        source = open_source(table(folder, "file,label", "other/0.png,a", "im/1.png,b"))
        with pytest.raises(DataError, match=r"other/0\.png: no such file"):
            source.read_image(source.records[0])

    def test_home(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", str(folder))
        source = open_source(table(folder, "file,label", "~/im/0.png,a", "im/1.png,b"))
        assert source.read_image(source.records[0]).shape == (8, 8)
        assert open_source("csv:~/t.csv").records == source.records

    @pytest.mark.parametrize("name", ["~x.png", "~$x.png", "~nobody-of-this-name/x.png"])
    def test_a_name_that_starts_like_a_home(self, name: str, folder: Path) -> None:
        spec = table(folder, "file,label,mask", f"{name},a,", f"im/1.png,b,{name}")
        source = open_source(spec)
        assert source.records[0].path == folder / name
        with pytest.raises(DataError, match="no such file or folder"):
            open_source(f"csv:{name}")

    def test_paths_of_windows_to_masks(self, folder: Path) -> None:
        cv2.imwrite(str(folder / "im" / "m.png"), np.full((8, 8), 255, np.uint8))
        source = open_source(table(folder, "file,label,mask", "im/0.png,a,im\\m.png"))
        assert source.mask_path(source.records[0]) == folder / "im" / "m.png"
        with pytest.raises(DataError, match=r"line 2: C:\\m\.png is a Windows path"):
            open_source(table(folder, "file,label,mask", r"im/0.png,a,C:\m.png"))

    def test_a_mask_that_is_not_there_names_the_line(self, folder: Path) -> None:
        with pytest.raises(DataError, match=r"t\.csv, line 2: .*no\.json: no such file"):
            open_source(table(folder, "file,label,mask", "im/0.png,a,no.json"))

    @pytest.mark.parametrize("how", [os.symlink, os.link])
    def test_a_linked_file_is_one_image(self, how: Callable[..., None], folder: Path) -> None:
        how(folder / "im" / "0.png", folder / "link.png")
        rows = ["file,label,patient", "im/0.png,a,p", "im/1.png,b,q"]
        assert len(open_source(table(folder, *rows, "link.png,a,p"))) == 2
        with pytest.raises(DataError, match=r"line 4: im/0\.png is listed more than once"):
            open_source(table(folder, *rows, "link.png,a,other"))

    def test_one_file_on_two_rows_without_patients(self, folder: Path) -> None:
        rows = ["file,label", "im/0.png,a", "im/1.png,b", "0,a", f"{folder}/im/0.png,a"]
        assert len(open_source(table(folder, *rows))) == 2

    def test_one_file_with_two_masks(self, folder: Path) -> None:
        rows = ["file,label,mask", "im/0.png,a,im/1.png", "im/0.png,a,im/2.png"]
        with pytest.raises(DataError, match=r"line 3: .*another label, patient, mask or split"):
            open_source(table(folder, *rows))

    @pytest.mark.parametrize("kind", ["csv", "folder"])
    def test_a_source_whose_name_is_too_long(self, kind: str) -> None:
        for place in ("x" * 300, "/tmp/" + "x" * 300):
            with pytest.raises(DataError, match="xxx: "):
                open_source(f"{kind}:{place}")

    @pytest.mark.parametrize("path", [r"C:\data\0.png", "d:/data/0.png", r"\\server\share\0.png"])
    def test_paths_of_windows(self, path: str, folder: Path) -> None:
        with pytest.raises(DataError, match=r"line 2: .*Windows path; write it relative"):
            open_source(table(folder, "file,label", f"{path},a"))

    def test_backslashes_are_slashes(self, folder: Path) -> None:
        source = open_source(table(folder, "file,label", "im\\0.png,a", "im/1.png,b"))
        assert source.records[0].key == "im/0.png"

    @pytest.mark.parametrize("again", ["im/0.png", "./im//0.png", "im/../im/0.png", "{}/im/0.png"])
    def test_one_file_on_two_rows(self, again: str, folder: Path, caplog) -> None:
        again = again.format(folder)
        rows = ["file,label,patient", "im/0.png,a,p", "im/1.png,b,q"]
        source = open_source(table(folder, *rows, f"{again},a,p"))
        assert len(source) == 2
        assert "1 rows repeat an image" in caplog.text
        for other in (f"{again},b,p", f"{again},a,q"):
            with pytest.raises(DataError, match=r"line 4: .*listed more than once, on line 2"):
                open_source(table(folder, *rows, other))


class TestPatients:
    @pytest.mark.parametrize(
        "column",
        ["patients", "Patient Nr", "patient_key", "PatID", "pat_id", "pt_id", "subj-id",
         "person_no", "Participant ID"],
    )  # fmt: skip
    def test_other_spellings_are_taken(self, column: str, folder: Path, caplog) -> None:
        source = open_source(table(folder, f"file,label,{column}", "im/0.png,a,x", "im/1.png,b,x"))
        assert {record.patient for record in source.records} == {"x"}
        assert f"patients are taken from the column {column.lower()}" in caplog.text

    @pytest.mark.parametrize("column", ["case_id", "PID", "study_id", "sub", "individual", "pt"])
    def test_columns_that_may_be_patients_are_named(
        self, column: str, folder: Path, caplog
    ) -> None:
        open_source(table(folder, f"file,label,{column}", "im/0.png,a,x", "im/1.png,b,x"))
        assert f"each image is its own patient; not used: {column.lower()}" in caplog.text

    def test_studies_are_not_named_beside_patients(self, folder: Path, caplog) -> None:
        open_source(table(folder, "file,label,patient,study_id", "im/0.png,a,x,1"))
        assert not caplog.text

    @pytest.mark.parametrize(
        "nobody",
        ["", "nan", "NaN", "NA", "n/a", "None", "NULL", " ", "<NA>", "#N/A", "-"],
    )
    def test_nobody(self, nobody: str, folder: Path) -> None:
        lines = ["file,label,patient", f"im/0.png,a,{nobody}", f"im/1.png,b,{nobody}"]
        source = open_source(table(folder, *lines))
        assert [r.patient for r in source.records] == ["im/0.png", "im/1.png"]

    def test_of_dicom_files_where_no_cell_names_one(
        self, folder: Path, write_dicom: Callable[..., Path]
    ) -> None:
        for n, who in enumerate(["J. Doe", "J. Doe", "M. Roe", None]):
            write_dicom(folder / f"{n}.dcm", who)
        rows = ["file,label,patient", "0.dcm,a,", "1.dcm,b,nan", "2.dcm,a,", "3.dcm,b,q"]
        first, second, third, fourth = open_source(table(folder, *rows)).records
        assert first.patient == second.patient != third.patient
        assert "Doe" not in first.patient
        assert fourth.patient == "q"
        rows = ["file,label", *(f"{n}.dcm,{'ab'[n % 2]}" for n in range(4))]
        patients = [record.patient for record in open_source(table(folder, *rows)).records]
        assert patients == [first.patient, first.patient, third.patient, "3.dcm"]

    @pytest.mark.parametrize(
        ("first", "second"),
        [
            ("1", "1.0"),
            ("1", "001"),
            ("p1", "P1"),
            ("p 1", "p  1"),
            ("p_1", "p-1"),
            ("\u00e9", "e\u0301"),
        ],
    )
    def test_near_equal_ids_are_text_and_warned_of(
        self, first: str, second: str, folder: Path, caplog
    ) -> None:
        lines = ["file,label,patient", f"im/0.png,a,{first}", f"im/1.png,b,{second}"]
        source = open_source(table(folder, *lines))
        assert [r.patient for r in source.records] == [first, second]
        assert "patients that differ only in spelling" in caplog.text
        assert repr(first) in caplog.text
        assert repr(second) in caplog.text

    def test_others_are_not_warned_of(self, folder: Path, caplog) -> None:
        ids = ["1", "10", "1.5", "p1", "p11", "1-1"]
        lines = [f"im/{n}.png,{'ab'[n % 2]},{who}" for n, who in enumerate(ids)]
        open_source(table(folder, "file,label,patient", *lines))
        assert not caplog.text


def test_a_column_without_a_name_is_passed_over(folder: Path) -> None:
    """A header that ends with a comma, as in a public table, and notes of a few rows under it."""
    source = open_source(table(folder, ",file,label,", "0,im/0.png,a,", "1,im/1.png,b,a note"))
    assert source.classes == ("a", "b")
    with pytest.raises(DataError, match="line 2: 5 cells under 4 columns"):
        open_source(table(folder, ",file,label,", "0,im/0.png,a,x,y"))


class TestLabels:
    @pytest.mark.parametrize(
        ("first", "second"),
        [
            ("COVID-19", "Covid-19"),
            ("Viral Pneumonia", "Viral  Pneumonia"),
            ("1", "1.0"),
            ("ﬁbrosis", "fibrosis"),
            ("covid_19", "covid-19"),
        ],
    )
    def test_near_equal_classes_are_warned_of(
        self, first: str, second: str, folder: Path, caplog
    ) -> None:
        source = open_source(table(folder, "file,label", f"im/0.png,{first}", f"im/1.png,{second}"))
        assert set(source.classes) == {first, second}
        assert "classes that differ only in spelling" in caplog.text
        assert repr(first) in caplog.text

    def test_of_folders_too(self, folder: Path, caplog) -> None:
        for name in ("Normal", "normal "):
            (folder / "set" / name).mkdir(parents=True)
            data = (folder / "im" / "0.png").read_bytes()
            (folder / "set" / name / "x.png").write_bytes(data)
        open_source(f"folder:{folder / 'set'}")
        assert "'Normal', 'normal '" in caplog.text

    @pytest.mark.parametrize("label", ["nan", "NaN", "#N/A", ""])
    def test_a_cell_without_a_label(self, label: str, folder: Path) -> None:
        with pytest.raises(DataError, match="line 2: file or label is empty"):
            open_source(table(folder, "file,label", f"im/0.png,{label}"))

    def test_none_is_a_finding(self, folder: Path) -> None:
        source = open_source(table(folder, "file,label", "im/0.png,None", "im/1.png,b"))
        assert source.classes == ("None", "b")


class TestLines:
    ROWS = ("im/0.png,a,p", "im/1.png,b,q")

    @pytest.mark.parametrize("start", ['"sep=,"', "sep=,,,", "", "  "])
    def test_before_the_header(self, start: str, folder: Path) -> None:
        source = open_source(table(folder, start, "file,label,patient", *self.ROWS))
        assert [record.patient for record in source.records] == ["p", "q"]

    def test_lines_of_spaces_are_empty(self, folder: Path) -> None:
        rows = ["file,label,patient", "   ", *self.ROWS, " , ,"]
        assert len(open_source(table(folder, *rows))) == 2

    def test_spaces_before_quotes(self, folder: Path) -> None:
        rows = ['file, "label", "patient"', 'im/0.png, "a, b", "p, x"', "im/1.png, b, q"]
        source = open_source(table(folder, *rows))
        assert [(r.label, r.patient) for r in source.records] == [("a, b", "p, x"), ("b", "q")]

    def test_lines_that_are_quoted_as_a_whole(self, folder: Path) -> None:
        with pytest.raises(DataError, match="it has file,label; it is quoted as a whole"):
            open_source(table(folder, '"file,label"', '"im/0.png,a"'))

    def test_a_short_row_is_warned_of(self, folder: Path, caplog) -> None:
        open_source(table(folder, "file,label,patient", *self.ROWS, "im/2.png,b"))
        assert "1 rows have fewer cells than the header, the first on line 4" in caplog.text
        caplog.clear()
        open_source(table(folder, "file,label,patient,", *self.ROWS))  # nothing is lacking
        assert not caplog.text

    @pytest.mark.parametrize(
        ("rows", "what"),
        [
            (["im/0.png,a,p,", 'im/1.png,b,"q,', "im/2.png,a,r,", 'im/3.png,b,s",'], "the patient"),
            (["im/0.png,a,p,", 'im/1.png,b,q,"x', "im/2.png,a,r,", 'im/3.png,b,s,y"'], "a cell of"),
        ],
    )
    def test_two_stray_quotes_swallow_no_rows(
        self, rows: list[str], what: str, folder: Path
    ) -> None:
        with pytest.raises(DataError, match=rf"t\.csv, line 5: {what} .*is a quote stray"):
            open_source(table(folder, "file,label,patient,note", *rows))

    def test_notes_of_several_lines_are_read(self, folder: Path) -> None:
        rows = ["file,label,note", 'im/0.png,a,"clear, large', 'heart"', "im/1.png,b,"]
        assert len(open_source(table(folder, *rows))) == 2

    def test_a_file_of_one_long_line(self, folder: Path) -> None:
        for text in ('{"images": [' + '{"id": 1, "n": "x"}, ' * 20000, "name," * 20000):
            with pytest.raises(DataError, match=r"t\.csv") as error:
                open_source(table(folder, text))
            assert len(str(error.value)) < 1500


@pytest.mark.parametrize(
    ("start", "what"),
    [
        (b"PK\x03\x04\x14\x00", "Excel"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1", "Excel"),
        (b"\x1f\x8b\x08", "gzip"),
        (b"PAR1\x15", "Parquet"),
    ],
)
def test_what_is_no_text_names_the_remedy(start: bytes, what: str, tmp_path: Path) -> None:
    for name in ("t.csv", "t.xlsx"):
        (tmp_path / name).write_bytes(start + bytes(100))
        with pytest.raises(DataError, match=rf"{what}.*save the table as CSV"):
            open_source(f"csv:{tmp_path / name}")


@pytest.mark.parametrize("name", ["semicolon", "latin1", "nul", "stray_quote", "same_file_twice"])
def test_the_tables_that_failed(name: str, shared_dir: Path, caplog) -> None:
    caplog.set_level(logging.WARNING)
    path = shared_dir / "trials" / "csv" / f"{name}.csv"
    if name in ("semicolon", "latin1"):  # read, with a word of the patients, or of the encoding
        assert len(open_source(f"csv:{path}")) >= 1
        assert path.name in caplog.text
        return
    with pytest.raises(DataError, match=rf"{name}\.csv, line \d+"):
        open_source(f"csv:{path}")


def test_the_long_name(shared_dir: Path) -> None:
    path = shared_dir / "trials" / "csv_lungs" / "long_name.csv"
    with pytest.raises(DataError, match=r"long_name\.csv, line 2"):
        open_source(f"csv:{path}")


@pytest.mark.parametrize("column", [("Train", "val", "TEST"), ("train", "dev", "fold 3")])
def test_a_column_of_splits(column: tuple[str, ...], tmp_path: Path, caplog) -> None:
    """Images that a table keeps for the test are not trained on."""
    rows = "".join(f"{i}.png,x,{side}\n" for i, side in enumerate(column))
    (tmp_path / "labels.csv").write_text(f"file,label,Split\n{rows}")
    for i in range(3):
        cv2.imwrite(str(tmp_path / f"{i}.png"), np.full((4, 4), i, np.uint8))
    records = open_source(f"csv:{tmp_path / 'labels.csv'}").records
    if column[2] == "TEST":
        assert [record.split for record in records] == ["train", "validation", "test"]
        assert all("Split" not in record.extra for record in records)
    else:
        assert [record.split for record in records] == [None] * 3
        assert [record.extra["Split"] for record in records] == list(column)
        assert "the column split is not used: it holds 'fold 3'" in caplog.text
