"""Sources that read files."""

from __future__ import annotations

import csv
import json
import logging
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from magsd.cli.common import SOURCES
from magsd.data import load_cache, open_source
from magsd.data.sources import _FILES
from magsd.errors import DataError


def write_image(path: Path, height: int = 40, width: int = 60, value: int = 100) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.full((height, width), value, np.uint8))
    return path


def write_table(path: Path, rows: list[dict[str, str]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_darwin(
    path: Path,
    *tags: str,
    size: tuple[int, int] = (400, 600),
    name: str = "",
    box: tuple[int, int, int, int] | None = (100, 50, 200, 300),
) -> Path:
    """box: left, top, right, bottom of the lung, in pixels of an image of size (height, width)."""
    image: dict[str, Any] = {"height": size[0], "width": size[1], "filename": name}
    annotations: list[dict[str, Any]] = [{"name": tag, "tag": {}} for tag in tags]
    if box is not None:
        left, top, right, bottom = box
        corners = [(left, top), (right, top), (right, bottom), (left, bottom)]
        points = [{"x": x, "y": y} for x, y in corners]
        annotations.append({"name": "Lung", "polygon": {"path": points}})
        annotations.append({"name": "Ignore", "polygon": {"path": [{"x": 0, "y": 0}] * 3}})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"dataset": "x", "image": image, "annotations": annotations}))
    return path


class TestOpen:
    @pytest.mark.parametrize("spec", ["", "folder", "csv:", "zip:/x", "/data", "phantom2"])
    def test_unknown_spec(self, spec: str) -> None:
        with pytest.raises(DataError, match=r"use folder:DIR, csv:FILE, v7:DIR, .* or phantom"):
            open_source(spec)

    def test_the_command_names_every_kind(self) -> None:
        assert [kind for kind in _FILES if f"{kind}:" not in SOURCES] == []

    @pytest.mark.parametrize("kind", _FILES)
    def test_missing_path(self, kind: str, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="no such"):
            open_source(f"{kind}:{tmp_path / 'none'}")

    def test_options_follow_the_path(self, tmp_path: Path) -> None:
        folder = tmp_path / "a,b=c"
        write_image(folder / "images" / "1.png")
        write_table(
            folder / "metadata.csv",
            [{"patientid": "1", "finding": "Unknown", "view": "PA", "filename": "1.png"}],
        )
        with pytest.raises(DataError, match="no images found"):  # the path was understood
            open_source(f"cohen:{folder},view=PA")
        with pytest.raises(DataError, match="view=L: expected frontal or PA or AP"):
            open_source(f"cohen:{folder},view=L")
        with pytest.raises(DataError, match="the option 'views' is not known; it has view"):
            open_source(f"cohen:{folder},views=PA")
        with pytest.raises(DataError, match="it has none"):
            open_source(f"cub:{tmp_path},x=1")


class TestFolder:
    def test_a_class_a_folder(self, tmp_path: Path) -> None:
        for name in ("sick/b.png", "sick/deep/a.JPG", "well/a.png", ".hidden/a.png"):
            write_image(tmp_path / name)
        (tmp_path / "sick" / "notes.txt").write_text("no image")
        source = open_source(f"folder:{tmp_path}")
        assert source.classes == ("sick", "well")
        assert [r.key for r in source.records] == ["sick/b.png", "sick/deep/a.JPG", "well/a.png"]
        assert [r.label for r in source.records] == ["sick", "sick", "well"]
        assert len({r.patient for r in source.records}) == 3
        assert source.read_image(source.records[0]).shape == (40, 60)
        assert source.read_mask(source.records[0]) is None

    def test_what_is_left_out_is_counted(self, tmp_path: Path, caplog) -> None:
        for name in ("sick/a.bmp", "sick/b.tif", "well/a.webp"):
            write_image(tmp_path / name)
        for name in ("sick/a.xyz", "sick/b.xyz", "odd/notes"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).touch()
        (tmp_path / "well" / "gone.png").symlink_to(tmp_path / "nowhere.png")
        with pytest.raises(
            DataError, match=r"classes odd \(1 of no suffix \(odd/notes\)\).*skip_bad"
        ):
            open_source(f"folder:{tmp_path}")
        assert len(open_source(f"folder:{tmp_path}", skip_bad=True)) == 3
        for reason in (
            "1 behind a dangling link (well/gone.png)", "1 of no suffix (odd/notes)",
            "2 of .xyz (sick/a.xyz, sick/b.xyz)",
        ):  # fmt: skip
            assert reason in caplog.text
        assert "no image in the folders of classes odd" in caplog.text

    @pytest.mark.parametrize("sides", [("train", "test"), ("train", "val", "test")], ids=str)
    def test_folders_of_a_published_split(
        self, tmp_path: Path, sides: tuple[str, ...], caplog
    ) -> None:
        for side in sides:
            write_image(tmp_path / side / "NORMAL" / f"IM-0115-{side}.png")
            write_image(tmp_path / side / "PNEUMONIA" / f"person3_virus_{side}.png")
        source = open_source(f"folder:{tmp_path}")
        assert source.classes == ("NORMAL", "PNEUMONIA")
        named = {"train": "train", "val": "validation", "test": "test"}
        assert {(r.key.partition("/")[0], r.split) for r in source.records} == {
            (side, named[side]) for side in sides
        }
        assert {r.patient for r in source.records} == {"IM-0115", "person3"}
        assert caplog.text == ""

    def test_unknown_label_is_named(self, tmp_path: Path) -> None:
        write_image(tmp_path / "sick" / "a.png")
        write_image(tmp_path / "odd" / "a.png")
        with pytest.raises(DataError, match=r"'odd' of odd/a\.png .* classes well, sick"):
            open_source(f"folder:{tmp_path}", classes=["well", "sick"])

    def test_given_classes_keep_their_order(self, tmp_path: Path) -> None:
        write_image(tmp_path / "sick" / "a.png")
        assert open_source(f"folder:{tmp_path}", classes=["well", "sick"]).classes == (
            "well", "sick",
        )  # fmt: skip

    def test_empty(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="no images"):
            open_source(f"folder:{tmp_path}")

    def test_limit_takes_from_every_class(self, tmp_path: Path) -> None:
        for number in range(10):
            write_image(tmp_path / "a" / f"{number}.png")
        for number in range(2):
            write_image(tmp_path / "b" / f"{number}.png")
        source = open_source(f"folder:{tmp_path}", limit=6)
        labels = [r.label for r in source.records]
        assert labels == ["a"] * 4 + ["b"] * 2


class TestTable:
    def test_patients_and_order(self, tmp_path: Path) -> None:
        rows = [
            {"file": "x/2.png", "label": "b", "patient": "p1", "more": "1"},
            {"file": "x/1.png", "label": "a", "patient": "", "more": "1"},
        ]
        source = open_source(f"csv:{write_table(tmp_path / 't.csv', rows)}")
        assert source.classes == ("a", "b")
        assert [(r.key, r.patient) for r in source.records] == [
            ("x/2.png", "p1"), ("x/1.png", "x/1.png"),
        ]  # fmt: skip
        assert source.records[0].path == tmp_path / "x" / "2.png"

    def test_without_the_columns(self, tmp_path: Path) -> None:
        path = write_table(tmp_path / "t.csv", [{"image": "a.png", "class": "a"}])
        with pytest.raises(
            DataError, match=r"no column file and no column label; it has image, class"
        ):
            open_source(f"csv:{path}")

    def test_bad_rows(self, tmp_path: Path) -> None:
        path = write_table(
            tmp_path / "t.csv", [{"file": "a.png", "label": "a"}, {"file": "b.png", "label": ""}]
        )
        with pytest.raises(DataError, match="line 3: file or label is empty"):
            open_source(f"csv:{path}")
        rows = [{"file": "a.png", "label": label} for label in "ab"]
        path = write_table(tmp_path / "t.csv", rows)
        with pytest.raises(DataError, match=r"a\.png is listed more than once"):
            open_source(f"csv:{path}")
        path.write_text("file,label\n")
        with pytest.raises(DataError, match="no rows"):
            open_source(f"csv:{path}")

    def test_mask_column(self, tmp_path: Path) -> None:
        write_image(tmp_path / "a.png")
        write_image(tmp_path / "b.png")
        lesion = np.zeros((40, 60), np.uint8)
        lesion[5:10, 20:40] = 1
        cv2.imwrite(str(tmp_path / "a-mask.png"), lesion)
        write_darwin(tmp_path / "b.json", box=(100, 50, 200, 300))
        rows = [
            {"file": "a.png", "label": "a", "mask": "a-mask.png"},
            {"file": "b.png", "label": "a", "mask": "b.json"},
            {"file": "c.png", "label": "b", "mask": ""},
        ]
        source = open_source(f"csv:{write_table(tmp_path / 't.csv', rows)}")
        assert [r.mask_kind for r in source.records] == ["lesion", "lungs", None]
        np.testing.assert_array_equal(source.read_mask(source.records[0]), lesion > 0)
        lungs = source.read_mask(source.records[1])
        assert lungs is not None
        rows_of, columns = np.nonzero(lungs)
        # A tenth of the annotated size: 5..30 in y, 10..20 in x.
        assert (rows_of.min(), rows_of.max() + 1) in {(5, 30), (4, 30), (5, 31), (4, 31)}
        assert (columns.min(), columns.max() + 1) in {(10, 20), (9, 20), (10, 21), (9, 21)}
        assert source.read_mask(source.records[2]) is None

    def test_mask_of_another_size(self, tmp_path: Path) -> None:
        write_image(tmp_path / "a.png")
        write_image(tmp_path / "m.png", 20, 20)
        rows = [{"file": "a.png", "label": "a", "mask": "m.png"}]
        source = open_source(f"csv:{write_table(tmp_path / 't.csv', rows)}")
        with pytest.raises(DataError, match="mask of 20x20 pixels for an image of 60x40"):
            source.read_mask(source.records[0])

    @pytest.mark.parametrize(
        "column", ["patient_id", "PatientID", "patientid", "Patient ID", "subject", "subject_id"]
    )
    def test_spellings_of_the_patient(self, tmp_path: Path, column: str, caplog) -> None:
        rows = [
            {"file": f"{i}.png", "label": "ab"[i % 2], column: patient}
            for i, patient in enumerate(["p1", "p1", "", "NaN", "N/A", "p2"])
        ]
        records = open_source(f"csv:{write_table(tmp_path / 'l.csv', rows)}").records
        found = [r.patient for r in records]
        assert found == ["p1", "p1", "2.png", "3.png", "4.png", "p2"]
        assert f"patients are taken from the column {column.lower()}" in caplog.text

    def test_columns_that_look_like_a_patient_are_named(self, tmp_path: Path, caplog) -> None:
        row = {"file": "1.png", "label": "a", "patient_age": "3", "MRN": "7"}
        open_source(f"csv:{write_table(tmp_path / 'l.csv', [row])}")
        assert "each image is its own patient; not used: patient_age, mrn" in caplog.text
        caplog.clear()
        open_source(f"csv:{write_table(tmp_path / 'm.csv', [row | {'patient': 'x'}])}")
        assert "from the column patient; not used: patient_age, mrn" in caplog.text

    @pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
    @pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "latin-1"])
    def test_delimiters_and_encodings(
        self, tmp_path: Path, delimiter: str, encoding: str, caplog
    ) -> None:
        rows = [("file", "label", "", ""), ("1.png", "neumonía", "", ""), ("2.png", "sano", "", "")]
        text = "\r\n".join(delimiter.join(row) for row in rows) + "\r\n"
        for prefix in ("", f"sep={delimiter}\r\n"):
            (tmp_path / "l.csv").write_bytes((prefix + text).encode(encoding))
            source = open_source(f"csv:{tmp_path / 'l.csv'}")
            assert [r.label for r in source.records] == ["neumonía", "sano"]
        assert ("read as Latin-1" in caplog.text) == (encoding == "latin-1")

    def test_a_header_with_other_delimiters_in_its_names(self, tmp_path: Path) -> None:
        (tmp_path / "l.csv").write_text('"file";"label";"a, b, c, d"\n1.png;x;y\n')
        (record,) = open_source(f"csv:{tmp_path / 'l.csv'}").records
        assert (record.key, record.label) == ("1.png", "x")

    @pytest.mark.parametrize(
        ("rows", "message"),
        [
            ('1.png,a,p\n2.png,a,"p\n3.png,b,q\n', "line 3: no CSV .*quote"),
            ('1.png,a,"p"q\n', "line 2: no CSV .*quote"),
            ("1.png,a,p\n2.png,a,p,x\n", "line 3: 4 cells under 3 columns"),
            ("1.png,a,p\n\0.png,a,p\n", "line 3: a NUL byte"),
            ('1.png,"a\nb",p\n', "line 3: file or label has several lines"),
            ("x/1.png,a,p\nx/../x/1.png,b,q\n", "x/1.png is listed more than once"),
            (f"{'n' * 300}.png,a,p\n", "line 2: n+...: the file name is too long"),
        ],
        ids=["open quote", "stray quote", "long row", "NUL", "two lines", "one file", "long name"],
    )
    def test_rows_that_are_wrong(self, tmp_path: Path, rows: str, message: str) -> None:
        (tmp_path / "l.csv").write_text(f"file,label,patient\n{rows}")
        (tmp_path / "lungs").mkdir()
        with pytest.raises(DataError, match=rf"l\.csv.*{message}"):
            open_source(f"csv:{tmp_path / 'l.csv'}")

    def test_two_columns_of_one_name(self, tmp_path: Path) -> None:
        (tmp_path / "l.csv").write_text("file,label,Label\n1.png,a,b\n")
        with pytest.raises(DataError, match="two columns are named 'label'"):
            open_source(f"csv:{tmp_path / 'l.csv'}")

    def test_the_made_table_that_leaked(self, shared_dir: Path) -> None:
        table = shared_dir / "trials" / "csv" / "patient_id.csv"
        if not table.is_file():
            pytest.skip(f"no made table at {table}")
        records = open_source(f"csv:{table}").records
        assert len({r.patient for r in records}) < len(records)

    def test_lungs_folder_and_patients_joined_by_tag(self, tmp_path: Path) -> None:
        rows = [
            {"file": f"images/{name}.png", "label": "a", "patient": patient}
            for name, patient in [("1", "p1"), ("2", "p2"), ("3", "p3"), ("4", "p3"), ("5", "p5")]
        ]
        for name, tag in [("1", "13"), ("2", "13"), ("4", "7"), ("5", "8")]:
            write_darwin(tmp_path / "lungs" / f"{name}.json", f"PatientID:{tag}")
        write_darwin(tmp_path / "lungs" / "3.json", "PatientID:13", box=None)
        for row in rows:
            write_image(tmp_path / row["file"])
        source = open_source(f"csv:{write_table(tmp_path / 't.csv', rows)}")
        # 1, 2 and 3 share the tag 13, and 4 shares p3 with 3.
        assert [r.patient for r in source.records] == ["p1", "p1", "p1", "p1", "p5"]
        assert [r.mask_kind for r in source.records] == ["lungs", "lungs", None, "lungs", "lungs"]

    def test_cropped_image_goes_without_its_mask(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        write_image(tmp_path / "a.png", 40, 60)
        write_image(tmp_path / "b.png", 40, 50)
        for name in "ab":
            write_darwin(tmp_path / "lungs" / f"{name}.json", size=(400, 600))
        rows = [{"file": f"{name}.png", "label": "x"} for name in "ab"]
        source = open_source(f"csv:{write_table(tmp_path / 't.csv', rows)}")
        with caplog.at_level(logging.WARNING):
            cache = load_cache(source, image_size=32, cache_dir=tmp_path / "cache")
        assert cache.has_mask.tolist() == [True, False]
        assert "1 of 2 annotated images" in caplog.text

    def test_damaged_annotation(self, tmp_path: Path) -> None:
        write_image(tmp_path / "a.png")
        (tmp_path / "lungs").mkdir()
        path = write_table(tmp_path / "t.csv", [{"file": "a.png", "label": "x"}])
        for text in ("{", "[]", '{"image": {}, "annotations": []}'):
            (tmp_path / "lungs" / "a.json").write_text(text)
            with pytest.raises(DataError, match=r"a\.json: not"):
                open_source(f"csv:{path}")


class TestDarwin:
    def test_class_from_tags(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        tags = {
            "1": ("Viral Pneumonia", "COVID-19", "PatientID:4"),
            "2": ("Viral Pneumonia", "PatientID:4"),
            "3": ("Bacterial Pneumonia", "PatientID:5"),
            "4": ("No Pneumonia (healthy)",),
            "5": ("Healthy",),
            "6": ("Age:70",),
        }
        for name, given in tags.items():
            write_image(tmp_path / "images" / f"scan{name}.png")
            write_darwin(tmp_path / "annotations" / f"{name}.json", *given, name=f"scan{name}.png")
        with caplog.at_level(logging.WARNING):
            source = open_source(f"v7:{tmp_path}")
        assert [r.label for r in source.records] == [
            "COVID-19", "Viral Pneumonia", "Bacterial Pneumonia", "Healthy", "Healthy",
        ]  # fmt: skip
        assert source.records[0].key == "images/scan1.png"
        patients = [r.patient for r in source.records]
        assert patients[0] == patients[1]
        assert len(set(patients)) == 4
        assert "1 images without a class tag" in caplog.text
        mask = source.read_mask(source.records[0])
        assert mask is not None
        assert mask.shape == (40, 60)
        assert abs(float(mask.mean()) - 250 / 2400) < 0.03

    def test_side_by_side_by_stem(self, tmp_path: Path) -> None:
        write_image(tmp_path / "a.jpg")
        write_darwin(tmp_path / "a.json", "COVID-19", name="00001.jpeg", box=None)
        source = open_source(f"v7:{tmp_path}")
        assert source.records[0].key == "a.jpg"
        assert source.records[0].mask_kind is None

    def test_missing_image_is_reported_when_read(self, tmp_path: Path) -> None:
        write_darwin(tmp_path / "a.json", "COVID-19", name="00001.jpeg")
        source = open_source(f"v7:{tmp_path}")
        with pytest.raises(DataError, match=r"00001\.jpeg: no such file"):
            source.read_image(source.records[0])

    def test_hidden_files_of_an_export_are_left_out(self, tmp_path: Path) -> None:
        write_image(tmp_path / "a.png")
        write_darwin(tmp_path / "a.json", "COVID-19", name="a.png")
        (tmp_path / ".v7").mkdir()
        (tmp_path / ".v7" / "metadata.json").write_text("{}")
        assert len(open_source(f"v7:{tmp_path}")) == 1

    def test_no_annotations(self, tmp_path: Path) -> None:
        write_image(tmp_path / "a.png")
        with pytest.raises(DataError, match="no annotations"):
            open_source(f"v7:{tmp_path}")

    def test_full_export(self, tmp_path: Path) -> None:
        """Releases beside one another, images in folders of the same names, masks beside them."""
        for folder, tag, value in (("a", "COVID-19", 10), ("b/c", "Healthy", 20)):
            write_image(tmp_path / "images" / folder / "1.jpeg", value=value)
            annotation = tmp_path / "releases" / "all" / "annotations" / folder / "1.json"
            write_darwin(annotation, tag, name="1.jpeg")
            content = json.loads(annotation.read_text())
            content["image"]["path"] = f"/{folder}"
            annotation.write_text(json.dumps(content))
        write_image(tmp_path / "releases" / "all" / "masks" / "a" / "1.jpeg")
        write_darwin(tmp_path / "releases" / "old" / "annotations" / "1.json", "Healthy")
        with pytest.raises(DataError, match=r"no release 'latest'.* all, old"):
            open_source(f"v7:{tmp_path}")
        (tmp_path / "releases" / "latest").symlink_to("all")
        for spec in (f"v7:{tmp_path}", f"v7:{tmp_path},release=all"):
            source = open_source(spec)
            assert source.spec == spec
            found = {r.key: (r.label, int(source.read_image(r)[0, 0])) for r in source.records}
            assert found == {
                "images/a/1.jpeg": ("COVID-19", 10), "images/b/c/1.jpeg": ("Healthy", 20),
            }  # fmt: skip

    def test_patients_in_names(self, tmp_path: Path) -> None:
        names = ["person1_virus_6", "person1_bacteria_2", "person12_virus_6", "IM-0115-0001",
                 "IM-0115-0002", "NORMAL2-IM-0115-0001"]  # fmt: skip
        for name in names:
            write_image(tmp_path / f"{name}.jpeg")
            write_darwin(tmp_path / f"{name}.json", "Viral Pneumonia", name=f"{name}.jpeg")
        records = {Path(r.key).stem: r.patient for r in open_source(f"v7:{tmp_path}").records}
        groups = [
            {records[name] for name in names[a:b]} for a, b in ((0, 2), (2, 3), (3, 5), (5, 6))
        ]
        assert [len(group) for group in groups] == [1] * 4
        assert len(set.union(*groups)) == 4

    def test_version_2_format(self, tmp_path: Path) -> None:
        write_image(tmp_path / "a.png")
        path = [{"x": x, "y": y} for x, y in ((0, 0), (300, 0), (300, 400), (0, 400))]
        content = {
            "version": "2.0",
            "item": {"name": "a.png", "slots": [{"width": 600, "height": 400}]},
            "annotations": [
                {"name": "COVID-19", "tag": {}},
                {"name": "Lung", "polygon": {"paths": [path]}},
            ],
        }
        (tmp_path / "a.json").write_text(json.dumps(content))
        source = open_source(f"v7:{tmp_path}")
        mask = source.read_mask(source.records[0])
        assert mask is not None
        assert mask[:, :29].all()
        assert not mask[:, 31:].any()


class TestFingerprint:
    def test_follows_image_and_mask(self, tmp_path: Path) -> None:
        image = write_image(tmp_path / "a.png")
        mask = write_image(tmp_path / "m.png")
        rows = [{"file": "a.png", "label": "a", "mask": "m.png"}]
        source = open_source(f"csv:{write_table(tmp_path / 't.csv', rows)}")
        record = source.records[0]
        seen = {source.fingerprint(record)}
        assert source.fingerprint(record) in seen
        write_image(image, value=101)
        seen.add(source.fingerprint(record))
        write_image(mask, value=0)
        seen.add(source.fingerprint(record))
        image.unlink()
        seen.add(source.fingerprint(record))
        assert len(seen) == 4


class TestRealRadiographs:
    def test_records(self, shared_dir: Path) -> None:
        source = open_source(f"csv:{shared_dir / 'data' / 'cxr3' / 'labels.csv'}")
        assert source.classes == ("covid-19", "no-finding", "pneumonia")
        assert len(source) == 938
        annotated = [r for r in source.records if r.mask_kind == "lungs"]
        assert {r.label for r in annotated} == {"covid-19"}
        assert len(annotated) == 104

    def test_patients_of_one_tag_are_one(self, shared_dir: Path) -> None:
        folder = shared_dir / "data" / "cxr3"
        source = open_source(f"csv:{folder / 'labels.csv'}")
        patients: dict[str, set[str]] = {}
        for record in source.records:
            annotation = folder / "lungs" / f"{Path(record.key).stem}.json"
            if annotation.is_file():
                for item in json.loads(annotation.read_text(errors="replace"))["annotations"]:
                    if item["name"].startswith("PatientID:"):
                        patients.setdefault(item["name"], set()).add(record.patient)
        assert len(patients) > 30
        assert all(len(names) == 1 for names in patients.values())

    def test_lung_masks_lie_on_the_lungs(self, shared_dir: Path) -> None:
        """Lungs are darker than the rest of the picture, and cover a plausible share of it."""
        source = open_source(f"csv:{shared_dir / 'data' / 'cxr3' / 'labels.csv'}")
        darker = []
        for record in [r for r in source.records if r.mask_kind][::5]:
            mask = source.read_mask(record)
            if mask is None:
                continue
            image = source.read_image(record)
            assert mask.shape == image.shape[:2]
            assert 0.1 < mask.mean() < 0.7
            middle = np.zeros_like(mask)
            height, width = mask.shape
            middle[height // 8 : -height // 8, width // 8 : -width // 8] = True
            darker.append(image[mask].mean() < image[middle & ~mask].mean())
        assert len(darker) >= 8
        assert np.mean(darker) > 0.9
