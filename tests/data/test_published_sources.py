"""Readers of public data sets, each on a small made copy of the published layout."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import cv2
import numpy as np
import pytest
from scipy.io import savemat

from magsd.data import Source, load_cache, open_source
from magsd.errors import DataError


def write_images(folder: Path, names: Iterable[str], size: tuple[int, int] = (64, 48)) -> None:
    """Images of (height, width) that are all different."""
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        random = np.random.default_rng(number)
        cv2.imwrite(str(path), random.integers(0, 256, (*size, 3)).astype(np.uint8))


def write(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def sides(source: Source) -> dict[str, tuple[str, str | None]]:
    """Key -> (label, side)."""
    return {record.key: (record.label, record.split) for record in source.records}


class TestNih:
    HEADER = (
        "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,"
        "View Position,OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y],"
    )

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        rows = [
            ("00000001_000.png", "Cardiomegaly", 1, "PA"),
            ("00000001_001.png", "Cardiomegaly|Emphysema", 1, "PA"),
            ("00000002_000.png", "No Finding", 2, "AP"),
            ("00000003_000.png", "Infiltration", 3, "PA"),
            ("00000001_002.png", "No Finding", 1, "AP"),
        ]
        entries = [
            f"{name},{label},0,{patient},058Y,M,{view},2682,2749,0.143,0.143,"
            for name, label, patient, view in rows
        ]
        write(tmp_path / "Data_Entry_2017.csv", self.HEADER, *entries)
        write(
            tmp_path / "BBox_List_2017.csv",
            "Image Index,Finding Label,Bbox [x,y,w,h],,,",
            "00000003_000.png,Infiltrate,256.0,512,128.5,64,,,",
            "00000003_000.png,Mass,0,0,1024,1024,,,",
        )
        write(tmp_path / "train_val_list.txt", *(rows[i][0] for i in (0, 1, 4)))
        write(tmp_path / "test_list.txt", rows[2][0], rows[3][0])
        write_images(tmp_path / "images_001" / "images", [row[0] for row in rows[:2]], (64, 64))
        write_images(tmp_path / "images_002" / "images", [row[0] for row in rows[2:]], (64, 64))
        return tmp_path

    def test_records(self, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
        source = open_source(f"nih:{folder}")
        assert sides(source) == {
            "00000001_000.png": ("Cardiomegaly", "train"),
            "00000002_000.png": ("No Finding", "test"),
            "00000003_000.png": ("Infiltration", "test"),
            "00000001_002.png": ("No Finding", "train"),
        }
        assert [record.patient for record in source.records] == ["1", "2", "3", "1"]
        assert dict(source.records[1].extra) == {
            "Patient Age": "058Y", "Patient Gender": "M", "View Position": "AP",
        }  # fmt: skip
        assert all(source.read_image(record).shape == (64, 64, 3) for record in source.records)
        assert "1 images with several findings are left out" in caplog.text

    def test_boxes_of_the_own_finding_are_the_mask(self, folder: Path) -> None:
        source = open_source(f"nih:{folder}")
        record = source.records[2]
        assert [r.mask_kind for r in source.records] == [None, None, "lesion", None]
        mask = source.read_mask(record)
        expected = np.zeros((64, 64), bool)
        expected[32:36, 16:25] = True  # the image is a sixteenth of the published size
        np.testing.assert_array_equal(mask, expected)
        before = source.fingerprint(record)
        path = folder / "BBox_List_2017.csv"
        path.write_text(path.read_text().replace("256.0", "255.0"))
        again = open_source(f"nih:{folder}")
        assert again.fingerprint(again.records[2]) != before

    def test_view(self, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
        labels = [r.label for r in open_source(f"nih:{folder},view=AP").records]
        assert labels == ["No Finding", "No Finding"]
        assert "3 images that are not of the view AP are left out" in caplog.text

    def test_what_is_missing(self, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
        (folder / "images_001" / "images" / "00000001_000.png").unlink()
        assert len(open_source(f"nih:{folder}")) == 4
        assert "1 of 4 listed images are not there" in caplog.text
        assert "nihcc.app.box.com" in caplog.text
        (folder / "test_list.txt").unlink()
        with pytest.raises(DataError, match=r"only train_val_list\.txt is there; both"):
            open_source(f"nih:{folder}")
        (folder / "train_val_list.txt").unlink()
        assert {r.split for r in open_source(f"nih:{folder}").records} == {None}
        (folder / "Data_Entry_2017.csv").unlink()
        (folder / "Data_Entry_2017.csv").mkdir()
        with pytest.raises(DataError, match=r"Data_Entry_2017\.csv: cannot be read"):
            open_source(f"nih:{folder}")
        (folder / "Data_Entry_2017.csv").rmdir()
        with pytest.raises(DataError, match=r"no Data_Entry_2017\.csv .*nihcc\.app\.box\.com"):
            open_source(f"nih:{folder}")

    def test_lists_under_other_names_and_images_anywhere(self, folder: Path) -> None:
        """As passed on with the images reduced to 224 x 224."""
        for name in ("train_val_list", "test_list"):
            (folder / f"{name}.txt").rename(folder / f"{name}_NIH.txt")
        (folder / "BBox_List_2017.csv").rename(folder / "BBox_List_2017_Official_NIH.csv")
        (folder / "images-224").mkdir()
        (folder / "images_001" / "images").rename(folder / "images-224" / "images-224")
        records = open_source(f"nih:{folder}").records
        assert [(r.split, r.mask_kind) for r in records] == [
            ("train", None), ("test", None), ("test", "lesion"), ("train", None),
        ]  # fmt: skip
        assert all(r.path is not None and r.path.is_file() for r in records)

    @pytest.mark.parametrize("place", ["", "sample", "archive/sample"])
    def test_sample(self, tmp_path: Path, place: str) -> None:
        """The sample of Kaggle, whose archive holds a second copy in a folder of the same name."""
        root = tmp_path / place
        write(
            root / "sample_labels.csv",
            "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,"
            "View Position,OriginalImageWidth,OriginalImageHeight,"
            "OriginalImagePixelSpacing_x,OriginalImagePixelSpacing_y",
            "00000013_005.png,Emphysema|Infiltration,005,00000013,060Y,M,AP,3056,2544,0.1,0.1",
            "00000013_026.png,Hernia,026,00000013,057Y,M,AP,2500,2048,0.1,0.1",
            "00000017_001.png,No Finding,001,00000017,077Y,M,AP,2500,2048,0.1,0.1",
        )
        names = ["00000013_005.png", "00000013_026.png", "00000017_001.png"]
        write_images(root / "sample" / "sample" / "images", names)
        if not place:
            write_images(root / "sample" / "images", names)
            write(root / "sample" / "sample_labels.csv", "not, read")
        records = open_source(f"nih:{tmp_path}").records
        assert [(r.key, r.label, r.patient, r.split) for r in records] == [
            ("00000013_026.png", "Hernia", "00000013", None),
            ("00000017_001.png", "No Finding", "00000017", None),
        ]
        assert all(r.path is not None and r.path.is_file() for r in records)


class TestCohen:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        rows = [
            ("2", "Pneumonia/Viral/COVID-19", "PA", "X-ray", "images", "a.jpg"),
            ("2", "Pneumonia/Viral/COVID-19", "AP Supine", "X-ray", "images", "b.jpg"),
            ("3", "Pneumonia/Viral/SARS", "AP Erect", "X-ray", "images", "c.jpg"),
            ("4", "Pneumonia/Bacterial/Klebsiella", "PA", "X-ray", "images", "d.jpg"),
            ("5", "No Finding", "PA", "X-ray", "images", "e.jpg"),
            ("6", "Pneumonia/Fungal/Pneumocystis", "PA", "X-ray", "images", "f.jpg"),
            ("7", "Tuberculosis", "PA", "X-ray", "images", "g.jpg"),
            ("2", "Pneumonia/Viral/COVID-19", "L", "X-ray", "images", "lateral.jpg"),
            ("2", "Pneumonia/Viral/COVID-19", "Axial", "CT", "volumes", "v.nii.gz"),
            ("8", "Pneumonia", "PA", "X-ray", "images", "unnamed.jpg"),
            ("9", "todo", "PA", "X-ray", "images", "todo.jpg"),
            ("5", "No Finding", "PA", "X-ray", "images", "e.jpg"),
        ]
        header = "patientid,finding,view,modality,folder,filename,clinical_notes"
        write(tmp_path / "metadata.csv", header, *(",".join(row) + ',"a, b"' for row in rows))
        write_images(tmp_path / "images", [row[-1] for row in rows if row[4] == "images"])
        return tmp_path

    def test_records(self, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
        source = open_source(f"cohen:{folder}")
        assert [(r.key, r.label, r.patient, r.split) for r in source.records] == [
            ("images/a.jpg", "COVID-19", "2", None),
            ("images/b.jpg", "COVID-19", "2", None),
            ("images/c.jpg", "Viral Pneumonia", "3", None),
            ("images/d.jpg", "Bacterial Pneumonia", "4", None),
            ("images/e.jpg", "No Finding", "5", None),
            ("images/f.jpg", "Fungal Pneumonia", "6", None),
            ("images/g.jpg", "Tuberculosis", "7", None),
        ]
        assert "2 images that are no radiographs of the view frontal" in caplog.text
        assert "2 images whose finding has no class" in caplog.text
        ap = open_source(f"cohen:{folder},view=AP")
        assert [Path(r.key).stem for r in ap.records] == ["b", "c"]

    def test_first_table(self, tmp_path: Path) -> None:
        """The first versions named the columns and findings otherwise, and had no modality."""
        write(
            tmp_path / "metadata.csv",
            "Patientid,offset,finding,view,filename, url",
            '1,0,"COVID-19, ARDS",PA,a.png,',
            "2,,SARS,PA,b.png,",
            "3,,Streptococcus,PA,c.png,",
            "4,,ARDS,PA,d.png,",
            "1,3,COVID-19,CT,e.png,",
        )
        write_images(tmp_path / "images", ["a.png", "b.png", "c.png"])
        labels = [r.label for r in open_source(f"cohen:{tmp_path}").records]
        assert labels == ["COVID-19", "Viral Pneumonia", "Bacterial Pneumonia"]

    def test_current_table(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        """The header of the last version, which ends in a comma; volumes, and rows of no file."""
        header = (
            "patientid,offset,sex,age,finding,RT_PCR_positive,survival,intubated,"
            "intubation_present,went_icu,in_icu,needed_supplemental_O2,extubated,temperature,"
            "pO2_saturation,leukocyte_count,neutrophil_count,lymphocyte_count,view,modality,date,"
            "location,folder,filename,doi,url,license,clinical_notes,other_notes,"
        )
        row = (
            '{},0,M,65,{},Y,Y,N,N,N,N,Y,,,,,,,{},{},"January 22, 2020","Ho Chi Minh City",{},{},'
            '10.1/a,https://a,CC BY,"Fever, cough",,'
        )
        covid = "Pneumonia/Viral/COVID-19"
        write(
            tmp_path / "covid-chestxray-dataset" / "metadata.csv",
            header,
            row.format("324a", covid, "AP Supine", "X-ray", "images", "a.jpeg"),
            row.format("324a", covid, "PA", "X-Ray", "images", "b.jpeg"),
            row.format("7", "Pneumonia/Viral/Herpes ", "PA", "X-ray", "images", "c.jpeg"),
            row.format("8", covid, "PA", "X-ray", "volumes", "d.nii.gz"),
            row.format("9", covid, "Axial", "CT", "volumes", "e.nii.gz"),
            row.format("10", covid, "PA", "X-ray", "images", ""),
            row.format("11", covid, "PA", "X-ray", "images", ""),
        )
        write_images(tmp_path / "covid-chestxray-dataset", ["b.jpeg", "images/a.jpeg"])
        write_images(tmp_path / "covid-chestxray-dataset" / "images", ["c.jpeg"])
        records = open_source(f"cohen:{tmp_path}").records
        assert [(Path(r.key).name, r.label, r.patient) for r in records] == [
            ("a.jpeg", "COVID-19", "324a"), ("b.jpeg", "COVID-19", "324a"),
            ("c.jpeg", "Viral Pneumonia", "7"),
        ]  # fmt: skip
        assert all(r.path is not None and r.path.is_file() for r in records)
        assert dict(records[1].extra) == {"sex": "M", "age": "65", "view": "PA"}
        assert "2 images that are no radiographs" in caplog.text
        assert "2 images without a file name are left out" in caplog.text

    def test_what_is_missing(self, folder: Path) -> None:
        for path in (folder / "images").iterdir():
            path.unlink()
        with pytest.raises(DataError, match=r"7 of 7 listed .*github\.com/ieee8023"):
            open_source(f"cohen:{folder}")


class TestCovidx:
    TRAIN = (
        "1 a.png COVID-19 cohen", "1 b.png COVID-19 cohen", "1 c.png pneumonia fig1",
        "d0 d.png normal rsna",
    )  # fmt: skip
    TEST = ("9 e.png COVID-19 ricord", "d1 f.png normal rsna", "d2 g.png pneumonia rsna")

    def make(self, folder: Path, train: str, test: str) -> Path:
        write(folder / train, *self.TRAIN)
        write(folder / test, *self.TEST)
        write_images(folder / "train", [line.split()[1] for line in self.TRAIN])
        write_images(folder / "test", [line.split()[1] for line in self.TEST])
        return folder

    def test_records(self, tmp_path: Path) -> None:
        source = open_source(f"covidx:{self.make(tmp_path, 'train.txt', 'test.txt')}")
        assert source.classes == ("COVID-19", "normal", "pneumonia")
        assert [(r.key, r.split) for r in source.records[::4]] == [
            ("train/a.png", "train"), ("test/e.png", "test"),
        ]  # fmt: skip
        patients = [r.patient for r in source.records[:3]]
        assert patients == ["cohen/1", "cohen/1", "fig1/1"]  # numbers are the source's own

    def test_a_row_without_its_patient_is_no_class(self, tmp_path: Path) -> None:
        self.make(tmp_path, "train.txt", "test.txt")
        write(tmp_path / "train.txt", *self.TRAIN, "a.png normal rsna")
        with pytest.raises(DataError, match=r"train\.txt: 'a\.png normal rsna' names no image"):
            open_source(f"covidx:{tmp_path}")

    def test_patients_of_several_words_and_images_listed_twice(self, tmp_path: Path) -> None:
        self.make(tmp_path, "train.txt", "test.txt")
        lines = ("COVID 1 a.png COVID-19 sirm", "x b.png normal rsna", "y b.png normal rsna")
        write(tmp_path / "train.txt", *lines, "y c.png pneumonia rsna")
        records = open_source(f"covidx:{tmp_path}").records[:3]
        assert [Path(r.key).name for r in records] == ["a.png", "b.png", "c.png"]
        assert records[0].patient == "sirm/COVID 1"
        assert records[1].patient == records[2].patient == "rsna/x"

    def test_versions(self, tmp_path: Path) -> None:
        self.make(tmp_path, "labels/train_COVIDx9A.txt", "labels/test_COVIDx8A.txt")
        assert len(open_source(f"covidx:{tmp_path}")) == 7
        write(tmp_path / "labels" / "train_COVIDx_CXR-3A.txt", *self.TRAIN[2:])
        with pytest.raises(DataError, match=r"2 lists are meant .*train_COVIDx9A\.txt"):
            open_source(f"covidx:{tmp_path}")
        with pytest.raises(DataError, match=r"0 lists are meant by list=4"):
            open_source(f"covidx:{tmp_path},list=4")
        assert len(open_source(f"covidx:{tmp_path},list=3A")) == 5
        write(tmp_path / "labels" / "test_COVIDx_CXR-3A.txt", self.TEST[0])
        assert len(open_source(f"covidx:{tmp_path},list=3A")) == 3
        assert len(open_source(f"covidx:{tmp_path},list=3A,test=8A")) == 5

    def test_a_val_list_is_a_side_of_its_own(self, tmp_path: Path) -> None:
        self.make(tmp_path, "train.txt", "test.txt")
        write(tmp_path / "val.txt", "7 v.png normal rsna")
        write_images(tmp_path / "val", ["v.png"])
        records = open_source(f"covidx:{tmp_path}").records
        assert [(r.key, r.split) for r in records if r.split != "train"] == [
            ("val/v.png", "validation"), ("test/e.png", "test"), ("test/f.png", "test"),
            ("test/g.png", "test"),
        ]  # fmt: skip
        test = open_source(f"covidx:{tmp_path},part=test")
        assert [r.key for r in test.records] == ["test/e.png", "test/f.png", "test/g.png"]
        (tmp_path / "test.txt").unlink()
        records = open_source(f"covidx:{tmp_path}").records
        assert {r.split for r in records} == {"train", "validation"}

    def test_versions_of_three_lists(self, tmp_path: Path) -> None:
        """test= names the test list; the val list of the training list's version is taken."""
        self.make(tmp_path, "labels/train_COVIDx9A.txt", "labels/test_COVIDx8A.txt")
        for version in ("9A", "9B"):
            write(tmp_path / "labels" / f"val_COVIDx{version}.txt", f"7 {version}.png normal rsna")
            write_images(tmp_path / "val", [f"{version}.png"])
        records = open_source(f"covidx:{tmp_path},test=8A").records
        assert [r.key for r in records if r.split == "validation"] == ["val/9A.png"]
        assert sum(r.split == "test" for r in records) == 3

    def test_first_lists_have_no_source(self, tmp_path: Path) -> None:
        self.make(tmp_path, "train.txt", "test.txt")
        write(tmp_path / "test.txt", "9 e.png COVID-19")
        assert open_source(f"covidx:{tmp_path},part=test").records[0].label == "COVID-19"
        write(tmp_path / "test.txt", "9 e.png")
        with pytest.raises(DataError, match=r"test\.txt, line 1: 3 words expected"):
            open_source(f"covidx:{tmp_path}")

    @pytest.mark.parametrize(
        ("row", "patient", "file", "label"),
        [
            ("3 SARS-10.1148rg.242035193-Fig8a.jpeg pneumonia cohen",
             "cohen/3", "SARS-10.1148rg.242035193-Fig8a.jpeg", "pneumonia"),
            ("ANON218 CR.1.2.840.113564.1003000225002.png COVID-19 actmed",
             "actmed/ANON218", "CR.1.2.840.113564.1003000225002.png", "COVID-19"),
            ("COVID 216 COVID(216).png COVID-19 sirm",
             "sirm/COVID 216", "COVID(216).png", "COVID-19"),
            ("COVID 216 COVID(216).png COVID-19", "unnamed/COVID 216", "COVID(216).png",
             "COVID-19"),
            ("a b c d.JPG COVID-19 sirm", "sirm/a b c", "d.JPG", "COVID-19"),
            ("COVID 7 COVID-19 (7).png COVID-19 sirm", "sirm/COVID 7", "COVID-19 (7).png",
             "COVID-19"),
            ("47c78742-4998 47c78742-4998.png normal", "unnamed/47c78742-4998",
             "47c78742-4998.png", "normal"),
            ("419639-003251 MIDRC-RICORD-1C-419639-003251-46647-0.png positive ricord",
             "ricord/419639-003251", "MIDRC-RICORD-1C-419639-003251-46647-0.png", "positive"),
            ("440808-000020 MIDRC-RICORD-1C-440808-000020-8.458-0.png positive ricord",
             "ricord/440808-000020", "MIDRC-RICORD-1C-440808-000020-8.458-0.png", "positive"),
            ("P 1 noname positive site", "site/P 1", "noname", "positive"),
        ],
    )  # fmt: skip
    def test_rows(self, tmp_path: Path, row: str, patient: str, file: str, label: str) -> None:
        """Rows as the lists of the versions 2 to 9 and their copies have them."""
        write(tmp_path / "train.txt", row)
        write(tmp_path / "test.txt", "zz z.png normal rsna")
        write_images(tmp_path / "train", [file if "." in file else "other.png"])
        write_images(tmp_path / "test", ["z.png"])
        record = open_source(f"covidx:{tmp_path}").records[0]
        assert (record.patient, record.key, record.label) == (patient, f"train/{file}", label)

    def test_rows_without_a_source_may_be_of_a_named_one(self, tmp_path: Path) -> None:
        """In the lists of version 7 the source is lacking in some rows of the test list."""
        self.make(tmp_path, "labels/train_COVIDx7A.txt", "labels/test_COVIDx7A.txt")
        write(tmp_path / "labels" / "test_COVIDx7A.txt", "1 e.png normal", "d1 f.png normal")
        patients = {Path(r.key).name: r.patient for r in open_source(f"covidx:{tmp_path}").records}
        assert patients["a.png"] == patients["e.png"] == "unnamed/1"
        assert patients["d.png"] == "rsna/d0"

    def test_an_image_of_two_patients(self, tmp_path: Path) -> None:
        """As in version 4, where 000001-27.jpg is of 287 and of 340."""
        self.make(tmp_path, "labels/train_COVIDx4.txt", "labels/test_COVIDx4.txt")
        rows = ("287 a.png pneumonia cohen", "340 a.png pneumonia cohen")
        write(tmp_path / "labels" / "train_COVIDx4.txt", *rows, "340 b.png normal cohen")
        train = [r for r in open_source(f"covidx:{tmp_path}").records if r.split == "train"]
        assert [(r.key, r.patient) for r in train] == [
            ("train/a.png", "cohen/287"), ("train/b.png", "cohen/287"),
        ]  # fmt: skip

    @pytest.mark.parametrize("place", ["data/{}", "{0}/{0}", "covidx-cxr2/{}"])
    def test_where_images_lie(self, tmp_path: Path, place: str) -> None:
        root = tmp_path / "covidx-cxr2" if "cxr2" in place else tmp_path
        self.make(root, "train.txt", "test.txt")
        for part in ("train", "test"):
            (root / part).rename(root / f"{part}0")
            target = tmp_path / place.format(part)
            target.parent.mkdir(exist_ok=True)
            (root / f"{part}0").rename(target)
        assert all(r.path and r.path.is_file() for r in open_source(f"covidx:{tmp_path}").records)


class TestCub:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        root = tmp_path / "CUB_200_2011"
        names = ["001.Albatross/a.jpg", "001.Albatross/b.jpg", "002.Auk/c.jpg", "002.Auk/d.jpg"]
        write(root / "images.txt", *(f"{i} {name}" for i, name in enumerate(names, 1)))
        write(root / "classes.txt", "1 001.Albatross", "2 002.Auk")
        write(root / "image_class_labels.txt", "1 1", "2 1", "3 2", "4 2")
        write(root / "train_test_split.txt", "1 1", "2 0", "3 1", "4 0")
        write(root / "bounding_boxes.txt", *(f"{i} 10.0 20.0 5.0 30.0" for i in range(1, 5)))
        write_images(root / "images", names)
        return tmp_path

    @pytest.mark.parametrize("within", ["", "CUB_200_2011"])
    def test_records(self, folder: Path, within: str) -> None:
        source = open_source(f"cub:{folder / within}")
        assert source.classes == ("001.Albatross", "002.Auk")
        assert list(sides(source).values()) == [
            ("001.Albatross", "train"), ("001.Albatross", "test"),
            ("002.Auk", "train"), ("002.Auk", "test"),
        ]  # fmt: skip
        expected = np.zeros((64, 48), bool)
        expected[20:50, 10:15] = True
        np.testing.assert_array_equal(source.read_mask(source.records[0]), expected)
        assert source.records[0].mask_kind == "object"

    def test_a_folder_within_a_folder_of_its_name(self, folder: Path, tmp_path: Path) -> None:
        outer = tmp_path / "archive" / "CUB_200_2011"
        outer.mkdir(parents=True)
        (folder / "CUB_200_2011").rename(outer / "CUB_200_2011")
        records = open_source(f"cub:{tmp_path / 'archive'}").records
        assert len(records) == 4
        assert all(r.path is not None and r.path.is_file() for r in records)

    def test_what_is_missing(self, folder: Path) -> None:
        root = folder / "CUB_200_2011"
        write(root / "train_test_split.txt", "1 1", "2 0", "3 1")
        with pytest.raises(DataError, match="image 4 lacks an entry"):
            open_source(f"cub:{folder}")
        (root / "train_test_split.txt").unlink()
        with pytest.raises(DataError, match=r"no CUB_200_2011/train_test_split\.txt .*caltech"):
            open_source(f"cub:{folder}")

    def test_color_survives_the_cache(self, folder: Path, tmp_path: Path) -> None:
        """Three channels, and CLAHE on the lightness alone: hue stays where it was."""
        path = folder / "CUB_200_2011" / "images" / "001.Albatross" / "a.jpg"
        blue, green, red = 40, 60, 200
        cv2.imwrite(str(path), np.full((64, 48, 3), (blue, green, red), np.uint8))
        source = open_source(f"cub:{folder}")
        plain = load_cache(source, image_size=32, channels=3, cache_dir=tmp_path / "c")
        assert plain.images.shape == (4, 32, 32, 3)
        assert np.abs(plain.images[0, 16, 16].astype(int) - (red, green, blue)).max() <= 3
        clahe = load_cache(
            source, image_size=32, channels=3, clahe=(4.0, 4), cache_dir=tmp_path / "c"
        )
        before, after = (
            cv2.cvtColor(np.array(cache.images[3]), cv2.COLOR_RGB2LAB).astype(int)
            for cache in (plain, clahe)
        )
        color = np.abs(before - after)[..., 1:].mean()
        assert np.abs(before - after)[..., 0].mean() > 4 * color


class TestAircraft:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        data = tmp_path / "fgvc-aircraft-2013b" / "data"
        write(data / "variants.txt", "707-320", "Yak-42", "A330 (big)")
        write(data / "families.txt", "Boeing 707", "Yak-42")
        write(data / "images_variant_trainval.txt", "0000001 707-320", "0000002 A330 (big)")
        write(data / "images_variant_test.txt", "0000003 707-320", "0000004 A330 (big)")
        write(data / "images_family_trainval.txt", "0000001 Boeing 707")
        write(data / "images_family_test.txt", "0000003 Yak-42")
        write_images(data / "images", [f"000000{i}.jpg" for i in range(1, 5)])
        return tmp_path

    @pytest.mark.parametrize(
        ("moved", "within"),
        [("", ""), ("", "fgvc-aircraft-2013b"), ("", "fgvc-aircraft-2013b/data"), ("FGVC", ""),
         ("FGVC/fgvc-aircraft-2013b", ""), ("FGVC/fgvc-aircraft-2013b", "FGVC")],
    )  # fmt: skip
    def test_records(self, folder: Path, moved: str, within: str) -> None:
        if moved:
            (folder / "fgvc-aircraft-2013b").rename(folder / "x")
            (folder / moved).parent.mkdir(exist_ok=True)
            (folder / "x").rename(folder / moved)
        source = open_source(f"aircraft:{folder / within}")
        assert sides(source) == {
            "data/images/0000001.jpg": ("707-320", "train"),
            "data/images/0000002.jpg": ("A330 (big)", "train"),
            "data/images/0000003.jpg": ("707-320", "test"),
            "data/images/0000004.jpg": ("A330 (big)", "test"),
        }

    def test_banner_is_cut_off(self, folder: Path) -> None:
        source = open_source(f"aircraft:{folder}")
        whole = cv2.imread(str(source.records[1].path))[..., ::-1]
        np.testing.assert_array_equal(source.read_image(source.records[1]), whole[:44])

    def test_level(self, folder: Path) -> None:
        source = open_source(f"aircraft:{folder},level=family")
        assert source.classes == ("Boeing 707", "Yak-42")

    def test_what_is_missing(self, folder: Path) -> None:
        with pytest.raises(DataError, match=r"images_manufacturer_trainval|manufacturers\.txt"):
            open_source(f"aircraft:{folder},level=manufacturer")
        with pytest.raises(
            DataError, match=r"no data/images_variant_.* there; .*robots\.ox\.ac\.uk"
        ):
            open_source(f"aircraft:{folder / 'fgvc-aircraft-2013b' / 'data' / 'images'}")
        (folder / "fgvc-aircraft-2013b" / "data" / "images").rename(folder / "elsewhere")
        with pytest.raises(DataError, match=r"no fgvc-aircraft-2013b/data/images there"):
            open_source(f"aircraft:{folder}")

    def test_two_training_lists(self, folder: Path) -> None:
        data = folder / "fgvc-aircraft-2013b" / "data"
        (data / "images_variant_trainval.txt").unlink()
        write(data / "images_variant_train.txt", "0000001 707-320")
        write(data / "images_variant_val.txt", "0000002 A330 (big)")
        assert [r.split for r in open_source(f"aircraft:{folder}").records] == [
            "train", "train", "test", "test",
        ]  # fmt: skip

    @pytest.mark.parametrize("nested", [True, False])
    def test_tables(self, tmp_path: Path, nested: bool) -> None:
        """The copy of Kaggle names files and classes in tables."""
        place = "fgvc-aircraft-2013b/fgvc-aircraft-2013b/data/images" if nested else "images"
        write_images(tmp_path / place, [f"000000{i}.jpg" for i in range(1, 4)])
        for part, row in (
            ("train", "0000001.jpg,707-320,0"), ("val", "0000002.jpg,Yak-42,1"),
            ("test", "0000003.jpg,707-320,0"),
        ):  # fmt: skip
            write(tmp_path / f"{part}.csv", "filename,Classes,Labels", row)
        source = open_source(f"aircraft:{tmp_path}")
        assert sides(source) == {
            "data/images/0000001.jpg": ("707-320", "train"),
            "data/images/0000002.jpg": ("Yak-42", "train"),
            "data/images/0000003.jpg": ("707-320", "test"),
        }
        assert source.read_image(source.records[0]).shape == (44, 48, 3)
        with pytest.raises(DataError, match="images_family_trainval"):
            open_source(f"aircraft:{tmp_path},level=family")


class TestCars:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        root = tmp_path / "stanford_cars"
        (root / "devkit").mkdir(parents=True)
        names = np.array(["AM General Hummer SUV 2000", "Ram C/V Cargo Van 2012"], dtype=object)
        savemat(root / "devkit" / "cars_meta.mat", {"class_names": names})
        fields = [("class", "u1"), ("fname", "O")]
        for path, classes in (
            ("devkit/cars_train_annos.mat", (1, 2, 2)), ("cars_test_annos_withlabels.mat", (2, 1)),
        ):  # fmt: skip
            annotations = [(number, f"{i:05d}.jpg") for i, number in enumerate(classes, 1)]
            savemat(root / path, {"annotations": np.array(annotations, dtype=fields)})
        write_images(root / "cars_train", [f"{i:05d}.jpg" for i in range(1, 4)])
        write_images(root / "cars_test", [f"{i:05d}.jpg" for i in range(1, 3)])
        return tmp_path

    def test_records(self, folder: Path) -> None:
        source = open_source(f"cars:{folder}")
        assert sides(source) == {
            "cars_train/00001.jpg": ("AM General Hummer SUV 2000", "train"),
            "cars_train/00002.jpg": ("Ram C/V Cargo Van 2012", "train"),
            "cars_train/00003.jpg": ("Ram C/V Cargo Van 2012", "train"),
            "cars_test/00001.jpg": ("Ram C/V Cargo Van 2012", "test"),
            "cars_test/00002.jpg": ("AM General Hummer SUV 2000", "test"),
        }
        assert source.read_image(source.records[0]).shape == (64, 48, 3)

    @pytest.mark.parametrize("root", ["stanford_cars", "cars", "x/y"])
    def test_other_folders(self, folder: Path, root: str) -> None:
        """As copies have it: other names, doubled folders, the labels in the devkit."""
        (folder / "stanford_cars").rename(folder / "z")
        (folder / root).parent.mkdir(exist_ok=True)
        (folder / "z").rename(folder / root)
        for part in ("cars_train", "cars_test"):
            (folder / root / part).rename(folder / "inner")
            (folder / root / part).mkdir()
            (folder / "inner").rename(folder / root / part / part)
        (folder / root / "car_devkit").mkdir()
        (folder / root / "devkit").rename(folder / root / "car_devkit" / "devkit")
        name = "cars_test_annos_withlabels.mat"
        (folder / root / name).rename(folder / root / "car_devkit" / "devkit" / name)
        source = open_source(f"cars:{folder}")
        assert list(sides(source))[::2] == [
            "cars_train/00001.jpg", "cars_train/00003.jpg", "cars_test/00002.jpg",
        ]  # fmt: skip
        assert all(r.path is not None and r.path.is_file() for r in source.records)

    @pytest.fixture
    def whole(self, tmp_path: Path) -> Path:
        """Both sides in one folder, told apart by a flag."""
        fields = [("relative_im_path", "O"), ("bbox_x1", "u1"), ("class", "u1"), ("test", "u1")]
        rows = [
            (f"car_ims/00000{i}.jpg", 1, number, test)
            for i, number, test in ((1, 1, 0), (2, 1, 1), (3, 2, 0))
        ]
        names = np.array(["AM General Hummer SUV 2000", "Ram C/V Cargo Van 2012"], dtype=object)
        savemat(
            tmp_path / "cars_annos.mat",
            {"annotations": np.array(rows, dtype=fields), "class_names": names},
        )
        write_images(tmp_path / "car_ims", [f"00000{i}.jpg" for i in (1, 2, 3)])
        return tmp_path

    def test_one_folder_for_both_sides(self, whole: Path) -> None:
        expected = {
            "car_ims/000001.jpg": ("AM General Hummer SUV 2000", "train"),
            "car_ims/000002.jpg": ("AM General Hummer SUV 2000", "test"),
            "car_ims/000003.jpg": ("Ram C/V Cargo Van 2012", "train"),
        }
        assert sides(open_source(f"cars:{whole}")) == expected
        (whole / "car_ims").rename(whole / "x")
        (whole / "car_ims").mkdir()
        (whole / "x").rename(whole / "car_ims" / "car_ims")
        assert sides(open_source(f"cars:{whole}")) == expected

    def test_numbers_of_another_folder(self, whole: Path) -> None:
        """Lists for car_ims/ beside the images of cars_train/, whose numbers differ."""
        (whole / "car_ims").rename(whole / "cars_train")
        with pytest.raises(DataError, match=r"numbers the images of car_ims/, not those of"):
            open_source(f"cars:{whole}")

    def test_what_is_missing(self, folder: Path) -> None:
        root = folder / "stanford_cars"
        (root / "devkit" / "cars_meta.mat").write_bytes(b"no matrices")
        with pytest.raises(DataError, match=r"cars_meta\.mat: not the list"):
            open_source(f"cars:{folder}")
        savemat(root / "devkit" / "cars_meta.mat", {"class_names": np.array(["x"], dtype=object)})
        with pytest.raises(DataError, match=r"annos\.mat: there is no class 2"):
            open_source(f"cars:{folder}")
        (root / "cars_test_annos_withlabels.mat").unlink()
        with pytest.raises(DataError, match=r"no stanford_cars/cars_test_annos_withlabels\.mat"):
            open_source(f"cars:{folder}")
        names = np.array(["x", "y"], dtype=object)
        savemat(root / "devkit" / "cars_meta.mat", {"class_names": names})
        fields = [("bbox_x1", "u1"), ("fname", "O")]  # the devkit's own list has no classes
        annotations = np.array([(1, "00001.jpg"), (2, "00002.jpg")], dtype=fields)
        savemat(root / "cars_test_annos_withlabels.mat", {"annotations": annotations})
        with pytest.raises(DataError, match=r"annotations has no class"):
            open_source(f"cars:{folder}")


class TestDogs:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        lists = {
            "train": ["n02085620-Chihuahua/a.jpg", "n02110958-pug/b.jpg"],
            "test": ["n02085620-Chihuahua/c.jpg", "n02105641-Old_English_sheepdog/d.jpg"],
        }
        (tmp_path / "lists").mkdir()
        for part, names in lists.items():
            column = np.array([[name] for name in names], dtype=object)
            savemat(tmp_path / "lists" / f"{part}_list.mat", {"file_list": column})
            write_images(tmp_path / "Images", names)
        return tmp_path

    def test_records(self, folder: Path) -> None:
        source = open_source(f"dogs:{folder}")
        assert sides(source) == {
            "n02085620-Chihuahua/a.jpg": ("Chihuahua", "train"),
            "n02110958-pug/b.jpg": ("pug", "train"),
            "n02085620-Chihuahua/c.jpg": ("Chihuahua", "test"),
            "n02105641-Old_English_sheepdog/d.jpg": ("Old_English_sheepdog", "test"),
        }
        assert source.read_image(source.records[0]).shape == (64, 48, 3)

    @pytest.mark.parametrize("place", ["Images", "images/Images", "Images/Images", "y/images"])
    def test_without_lists(
        self, folder: Path, place: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        """As copies have it, with boxes in a folder for each breed, too."""
        for path in (folder / "lists").iterdir():
            path.unlink()
        (folder / "Images").rename(folder / "x")
        (folder / place).parent.mkdir(exist_ok=True)
        (folder / "x").rename(folder / place)
        write(folder / "annotations" / "Annotation" / "n02110958-pug" / "n02110958_1", "<xml>")
        source = open_source(f"dogs:{folder}")
        assert sides(source) == {
            "n02085620-Chihuahua/a.jpg": ("Chihuahua", None),
            "n02085620-Chihuahua/c.jpg": ("Chihuahua", None),
            "n02105641-Old_English_sheepdog/d.jpg": ("Old_English_sheepdog", None),
            "n02110958-pug/b.jpg": ("pug", None),
        }
        assert "no train_list.mat and no test_list.mat" in caplog.text
        assert sides(open_source(f"dogs:{folder / place}")) == sides(source)

    def test_lists_beside_nested_images(self, folder: Path) -> None:
        (folder / "Images").rename(folder / "x")
        (folder / "images").mkdir()
        (folder / "x").rename(folder / "images" / "Images")
        records = open_source(f"dogs:{folder}").records
        assert {r.split for r in records} == {"train", "test"}
        assert all(r.path is not None and r.path.is_file() for r in records)

    def test_what_is_missing(self, folder: Path) -> None:
        for damaged in (b"no matrices", b"", b"\xff\xfe\0"):
            (folder / "lists" / "train_list.mat").write_bytes(damaged)
            with pytest.raises(DataError, match=r"train_list\.mat: not the list"):
                open_source(f"dogs:{folder}")
        (folder / "lists" / "train_list.mat").unlink()
        with pytest.raises(DataError, match=r"no lists/train_list\.mat .*ImageNetDogs"):
            open_source(f"dogs:{folder}")
