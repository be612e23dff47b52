"""`folder:` in the forms in which archives come."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest

from magsd.data import choose_split, load_cache, open_source
from magsd.data.images import IMAGE_SUFFIXES
from magsd.data.sources.files import LeftOut, walk, why_no_image
from magsd.data.sources.names import patient_in_path
from magsd.errors import DataError


def draw(path: Path, value: int = 100, size: tuple[int, int] = (20, 30)) -> Path:
    """An image of one gray value and of (height, width); its name may lack a suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    suffix = path.suffix if path.suffix.lower() in IMAGE_SUFFIXES else ".png"
    path.write_bytes(cv2.imencode(suffix.lower(), np.full(size, value, np.uint8))[1].tobytes())
    return path


def draw_all(folder: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        draw(folder / name, number)
    return folder


def keys(spec: str, **options: bool) -> list[str]:
    return [record.key for record in open_source(spec, **options).records]


class TestFiles:
    def test_every_suffix(self, tmp_path: Path, write_dicom) -> None:
        written = [s for s in sorted(IMAGE_SUFFIXES) if s not in (".jfif", ".gif")]
        for suffix in written:
            path = tmp_path / "a" / f"1{suffix.upper()}"
            if suffix in (".dcm", ".dicom", ".dic"):
                write_dicom(path, None)
            else:
                path.parent.mkdir(exist_ok=True)
                try:
                    draw(path)
                except cv2.error:  # opencv was built without it
                    path.write_bytes(b"x")
        assert len(keys(f"folder:{tmp_path}")) == len(written)

    @pytest.mark.parametrize("name", ["IM0001", "1.2.840.113", "scan.ima", "a b. c", "x.IMG", "7."])
    def test_dicom_by_content(self, tmp_path: Path, write_dicom, name: str) -> None:
        write_dicom(tmp_path / "a" / name, "7")
        source = open_source(f"folder:{tmp_path}")
        assert [r.key for r in source.records] == [f"a/{name}"]
        assert source.read_image(source.records[0]).shape == (8, 6)

    @pytest.mark.parametrize("name", ["scan", "1.2.840.114"])
    def test_other_formats_without_a_suffix(self, tmp_path: Path, name: str) -> None:
        draw(tmp_path / "a" / name)
        assert keys(f"folder:{tmp_path}") == [f"a/{name}"]
        assert why_no_image(draw(tmp_path / "a" / "slide.svs")) == "of .svs"

    def test_links_are_followed_once(self, tmp_path: Path, caplog) -> None:
        outside = draw_all(tmp_path / "outside", "d/1.png", "d/2.png", "3.png")
        folder = draw_all(tmp_path / "data", "a/0.png")
        (folder / "b").symlink_to(outside / "d")
        (folder / "a" / "3.png").symlink_to(outside / "3.png")
        (folder / "a" / "deep").symlink_to(outside / "d")
        (folder / "a" / "loop").symlink_to(folder / "a")
        (folder / "a" / "up").symlink_to(folder)
        (folder / "a" / "self").symlink_to(folder / "a" / "self")
        records = open_source(f"folder:{folder}").records
        assert [r.key for r in records] == [
            "a/0.png", "a/3.png", "a/deep/1.png", "a/deep/2.png", "b/1.png", "b/2.png",
        ]  # fmt: skip
        assert "2 linked twice (a/loop, a/up)" in caplog.text
        assert "1 behind a dangling link (a/self)" in caplog.text
        # What is in two classes is one patient's.
        patients = {r.key: r.patient for r in records}
        assert patients["a/deep/1.png"] == patients["b/1.png"] != patients["b/2.png"]
        assert "2 files are there under two names, e.g. b/1.png" in caplog.text

    def test_a_class_that_leads_back(self, tmp_path: Path) -> None:
        draw_all(tmp_path, "a/1.png", "b/1.png")
        (tmp_path / "all").symlink_to(tmp_path)
        with pytest.raises(DataError, match=r"classes all \(1 linked twice \(all\)\)"):
            open_source(f"folder:{tmp_path}")

    def test_a_file_under_two_names_in_a_class_is_one_image(self, tmp_path: Path, caplog) -> None:
        draw_all(tmp_path, "a/1.png", "b/1.png")
        (tmp_path / "a" / "2.png").symlink_to("1.png")
        os.link(tmp_path / "b" / "1.png", tmp_path / "b" / "3.png")
        assert keys(f"folder:{tmp_path}") == ["a/1.png", "b/1.png"]
        assert "2 files are there under two names" in caplog.text

    def test_one_warning_by_reason_for_all_sides(self, tmp_path: Path, caplog) -> None:
        for side in ("train", "test"):
            draw_all(tmp_path / side, "a/1.png", "b/1.png", "3.png")
            for name in ("a/x.txt", "b/y.TXT", "b/.z.png", "b/v.nii.gz"):
                (tmp_path / side / name).write_text("no image")
        draw(tmp_path / "beside.jpg")
        (tmp_path / "README.md").write_text("not in a class")
        (tmp_path / "train" / "a" / "gone.png").symlink_to("nowhere")
        open_source(f"folder:{tmp_path}")
        (warning,) = [m for m in caplog.messages if "left out" in m]
        for reason in (
            "4 of .txt (test/a/x.txt, test/b/y.TXT, train/a/x.txt, ...)",
            "2 hidden (test/b/.z.png, train/b/.z.png)",
            "2 of .nii.gz (test/b/v.nii.gz, train/b/v.nii.gz)",
            "1 behind a dangling link (train/a/gone.png)",
            "3 beside the folders of the classes (beside.jpg, test/3.png, train/3.png)",
        ):
            assert reason in warning
        assert "README" not in warning

    def test_junk_is_left_out_without_a_word(self, tmp_path: Path, caplog) -> None:
        draw_all(tmp_path, "a/1.png", "b/1.png", "__MACOSX/a/1.png", "a/._1.png", "@eaDir/x.png")
        for name in (".DS_Store", "Thumbs.db", "a/Thumbs.db", "a/desktop.ini", "b/.DS_Store"):
            (tmp_path / name).write_bytes(b"x")
        (tmp_path / "a" / ".ipynb_checkpoints").mkdir()
        assert keys(f"folder:{tmp_path}") == ["a/1.png", "b/1.png"]
        assert caplog.text == ""

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
    def test_what_may_not_be_opened(self, tmp_path: Path, caplog) -> None:
        draw_all(tmp_path, "a/1.png", "a/closed/2.png", "b/1.png")
        (tmp_path / "a" / "closed").chmod(0)
        try:
            assert keys(f"folder:{tmp_path}") == ["a/1.png", "b/1.png"]
        finally:
            (tmp_path / "a" / "closed").chmod(0o700)
        assert "1 that cannot be opened (a/closed)" in caplog.text

    def test_folders_that_cannot_be_opened(self, tmp_path: Path, caplog, monkeypatch) -> None:
        draw_all(tmp_path, "a/1.png", "a/closed/2.png", "b/1.png")
        scandir = os.scandir

        def refuse(path: str | Path):
            if "closed" in str(path):
                raise PermissionError(13, "Permission denied")
            return scandir(path)

        monkeypatch.setattr(os, "scandir", refuse)
        assert keys(f"folder:{tmp_path}") == ["a/1.png", "b/1.png"]
        assert "1 that cannot be opened (a/closed)" in caplog.text
        (tmp_path / "closed").mkdir()
        with pytest.raises(DataError, match=r"classes closed \(1 that cannot be opened"):
            open_source(f"folder:{tmp_path}")
        with pytest.raises(DataError, match="closed: cannot be opened"):
            open_source(f"folder:{tmp_path / 'closed'}")

    def test_pipes_and_names_in_other_encodings(self, tmp_path: Path, caplog) -> None:
        draw_all(tmp_path, "a/1.png", "b/1.png")
        os.mkfifo(tmp_path / "a" / "pipe")
        Path(os.fsdecode(os.fsencode(tmp_path / "b") + b"/neumon\xeda.png")).write_bytes(b"x")
        assert keys(f"folder:{tmp_path}") == ["a/1.png", "b/1.png"]
        assert "1 neither file nor folder (a/pipe)" in caplog.text
        assert "1 with a name that is no UTF-8 (b/neumon\\udceda.png)" in caplog.text
        draw(Path(os.fsdecode(os.fsencode(tmp_path) + b"/neumon\xeda")) / "1.png")
        with pytest.raises(DataError, match="must be UTF-8"):
            open_source(f"folder:{tmp_path}")

    def test_empty_files(self, tmp_path: Path, caplog) -> None:
        """An image without content is an unreadable image; any other file is left out."""
        draw_all(tmp_path, "a/1.png", "b/1.png")
        (tmp_path / "a" / "0.png").touch()
        (tmp_path / "a" / "none").touch()
        source = open_source(f"folder:{tmp_path}")
        assert len(source) == 3
        assert "1 of no suffix (a/none)" in caplog.text
        with pytest.raises(DataError, match=r"a/0\.png: the file is empty|0\.png.*empty"):
            load_cache(source, image_size=32, cache_dir=tmp_path / "c")

    def test_a_class_without_images(self, tmp_path: Path, caplog) -> None:
        draw_all(tmp_path, "a/1.png", "b/1.png")
        (tmp_path / "c").mkdir()
        (tmp_path / "d").mkdir()
        (tmp_path / "d" / "1.xyz").write_text("no image")
        with pytest.raises(DataError, match=r"classes c, d \(1 of \.xyz \(d/1\.xyz\)\).*skip_bad"):
            open_source(f"folder:{tmp_path}")
        assert keys(f"folder:{tmp_path}", skip_bad=True) == ["a/1.png", "b/1.png"]
        assert "no image in the folders of classes c, d" in caplog.text

    def test_what_is_beside_the_classes(self, tmp_path: Path, caplog) -> None:
        draw_all(tmp_path, "a/1.png", "b/1.png", ".cache/1.png")
        (tmp_path / "gone.png").symlink_to("nowhere.png")
        assert keys(f"folder:{tmp_path}") == ["a/1.png", "b/1.png"]
        assert "1 behind a dangling link (gone.png), 1 hidden (.cache)" in caplog.text
        (tmp_path / "c").symlink_to(tmp_path / "nowhere")
        with pytest.raises(DataError, match=r"classes c \(1 behind a dangling link \(c\)\)"):
            open_source(f"folder:{tmp_path}")
        assert len(keys(f"folder:{tmp_path}", skip_bad=True)) == 2

    def test_images_without_class_folders(self, tmp_path: Path) -> None:
        draw_all(tmp_path, "1.png", "2.png")
        with pytest.raises(DataError, match=r"no images found.*2 beside the folders"):
            open_source(f"folder:{tmp_path}")

    def test_the_walk_is_in_order(self, tmp_path: Path) -> None:
        draw_all(tmp_path, "b/1.png", "a/2.png", "a.png", "a/1/x.png")
        names = [path.relative_to(tmp_path).as_posix() for path in walk(tmp_path, LeftOut())]
        assert names == ["a/1/x.png", "a/2.png", "a.png", "b/1.png"]


class TestSides:
    def make(
        self, folder: Path, *sides: str, classes: tuple[str, ...] = ("NORMAL", "SICK")
    ) -> Path:
        for side in sides:
            draw_all(
                folder / side, *(f"{label}/{side[:2]}{i}.png" for label in classes for i in "12")
            )
        return folder

    @pytest.mark.parametrize(
        ("sides", "held"),
        [(("train", "test"), "test"), (("TRAIN", "Val"), "validation"),
         (("Training", "Testing"), "test"), (("train_set", "valid_set"), "validation"),
         (("trainset", "testset"), "test"), (("train-data", "dev"), "validation"),
         (("Train", "Validation"), "validation")],
    )  # fmt: skip
    def test_names(self, tmp_path: Path, sides: tuple[str, str], held: str) -> None:
        records = open_source(f"folder:{self.make(tmp_path, *sides)}").records
        assert {(r.key.partition("/")[0], r.split) for r in records} == {
            (sides[0], "train"), (sides[1], held),
        }  # fmt: skip
        assert {r.label for r in records} == {"NORMAL", "SICK"}
        choose_split(records)

    def test_the_archive_of_chest_xray(self, tmp_path: Path, caplog) -> None:
        """The split, the split again in a folder of its own, and what a Mac left behind."""
        root = tmp_path / "chest_xray"
        for folder in (root, root / "chest_xray", root / "__MACOSX" / "chest_xray"):
            self.make(folder, "train", "val", "test")
        for spec, start in ((root, ""), (tmp_path, "chest_xray/"), (root / "chest_xray", "")):
            caplog.clear()
            source = open_source(f"folder:{spec}")
            assert source.classes == ("NORMAL", "SICK")
            assert {r.key.removeprefix(start).partition("/")[0] for r in source.records} == {
                "train", "val", "test",
            }  # fmt: skip
            beside = "folders beside it, or without classes, are left out: chest_xray"
            assert (beside in caplog.text) == (spec != root / "chest_xray")

    def test_sides_in_sides_of_their_name(self, tmp_path: Path) -> None:
        self.make(tmp_path / "train", "train")
        self.make(tmp_path / "test", "test")
        records = open_source(f"folder:{tmp_path}").records
        assert {r.label for r in records} == {"NORMAL", "SICK"}
        assert {r.key[:11] for r in records} == {"train/train", "test/test/N", "test/test/S"}

    def test_sides_within_the_classes(self, tmp_path: Path, caplog) -> None:
        draw_all(tmp_path / "a", "sick/train/1.png", "sick/test/2.png", "well/1.png")
        records = open_source(f"folder:{tmp_path / 'a'}").records
        assert [(r.label, r.split) for r in records] == [("sick", None)] * 2 + [("well", None)]
        assert "sides test, train within a class are no published split" in caplog.text
        self.make(tmp_path / "two" / "first", "train", "test")
        self.make(tmp_path / "two" / "second", "train", "test")
        with pytest.raises(
            DataError, match=r"first: holds test, train .* it is a data set, not a class"
        ):
            open_source(f"folder:{tmp_path / 'two'}")

    def test_images_in_place_of_class_folders(self, tmp_path: Path) -> None:
        draw_all(tmp_path, "train/1.png", "test/1.png")
        with pytest.raises(DataError, match="train: a side of a split must hold one subfolder"):
            open_source(f"folder:{tmp_path}")

    def test_test_images_without_classes(self, tmp_path: Path, caplog) -> None:
        self.make(tmp_path, "train")
        draw_all(tmp_path / "test", "1.png", "2.png")
        records = open_source(f"folder:{tmp_path}").records
        assert {(r.label, r.split) for r in records} == {("NORMAL", None), ("SICK", None)}
        assert "or without classes, are left out: test" in caplog.text

    def test_no_training_side(self, tmp_path: Path) -> None:
        self.make(tmp_path, "val", "test")
        with pytest.raises(DataError, match=r"test and val look like .* there is no train"):
            open_source(f"folder:{tmp_path}")

    def test_classes_that_are_named_as_a_side(self, tmp_path: Path) -> None:
        draw_all(tmp_path, "train/1.png", "bus/1.png")
        assert open_source(f"folder:{tmp_path}").classes == ("bus", "train")
        draw_all(tmp_path, "test/1.png")
        assert open_source(f"folder:{tmp_path}").classes == ("bus", "test", "train")

    def test_a_folder_alone(self, tmp_path: Path, caplog) -> None:
        draw_all(tmp_path / "x" / "y", "a/1.png", "b/1.png")
        source = open_source(f"folder:{tmp_path}")
        assert source.classes == ("a", "b")
        assert "holds only the folder x" in caplog.text
        draw_all(tmp_path / "one" / "a", "p1/1.png", "p2/1.png")
        known = open_source(f"folder:{tmp_path / 'one'}", classes=["a", "b"])
        assert {r.label for r in known.records} == {"a"}


class TestMasks:
    def radiography(self, folder: Path) -> Path:
        """The COVID-19 Radiography Database: masks of 256 x 256 for images of 299 x 299."""
        for number, label in enumerate(("COVID", "Lung_Opacity", "Normal", "Viral Pneumonia")):
            for i in (1, 2):
                draw(folder / label / "images" / f"{label}-{i}.png", 50 * number, (299, 299))
                mask = np.zeros((256, 256, 3), np.uint8)
                mask[64:128, 32 : 32 + 64 * i] = 255
                path = folder / label / "masks" / f"{label}-{i}.png"
                path.parent.mkdir(exist_ok=True)
                cv2.imwrite(str(path), mask)
            (folder / f"{label}.metadata.xlsx").write_bytes(b"PK")
        (folder / "README.md.txt").write_text("text")
        return folder

    def test_lung_masks(self, tmp_path: Path, caplog) -> None:
        source = open_source(f"folder:{self.radiography(tmp_path / 'db')}")
        assert source.classes == ("COVID", "Lung_Opacity", "Normal", "Viral Pneumonia")
        assert len(source) == 8
        assert all("/images/" in r.key and r.mask_kind == "lungs" for r in source.records)
        assert caplog.text == ""
        mask = source.read_mask(source.records[1])
        assert mask is not None
        assert mask.shape == (299, 299)
        rows = np.nonzero(mask)[0]
        assert (rows.min(), rows.max() + 1) == (75, 150)  # 64..128 by 299/256, rounded
        assert abs(mask.mean() - 64 * 128 / 256**2) < 2e-3
        before = source.fingerprint(source.records[0])
        draw(tmp_path / "db" / "COVID" / "masks" / "COVID-1.png", 255, (256, 256))
        assert source.fingerprint(source.records[0]) != before
        cache = load_cache(source, image_size=32, cache_dir=tmp_path / "c")
        assert cache.has_mask.all()

    def test_first_release(self, tmp_path: Path) -> None:
        draw_all(tmp_path, "COVID-19/COVID-19 (1).png", "NORMAL/NORMAL (1).png")
        source = open_source(f"folder:{tmp_path}")
        assert [r.mask_kind for r in source.records] == [None, None]

    @pytest.mark.parametrize("name", ["masks", "Masks", "mask", "lung masks", "Lung_Mask"])
    def test_masks_beside_images_without_a_folder(self, tmp_path: Path, name: str, caplog) -> None:
        draw_all(tmp_path, "a/1.png", "a/2.png", f"a/{name}/1.png", f"a/{name}/3.png", "b/1.png")
        source = open_source(f"folder:{tmp_path}")
        assert [(r.key, r.mask_kind) for r in source.records] == [
            ("a/1.png", "lungs"), ("a/2.png", None), ("b/1.png", None),
        ]  # fmt: skip
        assert f"1 masks of no image there (a/{name}/3.png)" in caplog.text

    def test_two_kinds_of_masks(self, tmp_path: Path, caplog) -> None:
        draw_all(
            tmp_path, "a/images/1.png", "a/lung masks/1.png", "a/infection masks/1.png",
            "b/images/1.png", "b/infection masks/1_mask.png",
        )  # fmt: skip
        source = open_source(f"folder:{tmp_path}")
        assert [r.mask_kind for r in source.records] == ["lungs", "lesion"]
        assert "1 further masks of an image (a/infection masks/1.png)" in caplog.text

    def test_masks_among_the_images(self, tmp_path: Path, caplog) -> None:
        draw_all(
            tmp_path, "benign/benign (1).png", "benign/benign (1)_mask.png",
            "benign/benign (1)_mask_1.png", "mask/no_mask.png",
        )  # fmt: skip
        assert keys(f"folder:{tmp_path}") == ["benign/benign (1).png", "mask/no_mask.png"]
        assert "2 masks among the images" in caplog.text

    def test_masks_beside_the_classes_are_said_to_be_a_class(self, tmp_path: Path, caplog) -> None:
        draw_all(tmp_path, "a/1.png", "b/1.png", "masks/a/1.png")
        assert open_source(f"folder:{tmp_path}").classes == ("a", "b", "masks")
        assert "the folder masks is taken for a class" in caplog.text

    def test_images_and_masks_above_the_classes(self, tmp_path: Path) -> None:
        draw_all(tmp_path, "images/a/1.png", "images/b/1.png", "masks/a/1.png", "masks/b/1.png")
        assert open_source(f"folder:{tmp_path}").classes == ("a", "b")

    @pytest.mark.parametrize("side", ["", "train", "test"])
    def test_images_and_masks_of_no_class(self, tmp_path: Path, side: str) -> None:
        draw_all(tmp_path, "train/a/1.png", "test/a/1.png")
        root = tmp_path / side if side else tmp_path / "other"
        for path in list(root.iterdir()) if root.exists() else []:
            shutil.rmtree(path)
        draw_all(root, "images/1.png", "masks/1.png")
        with pytest.raises(DataError, match="holds images, masks, but no class folders"):
            open_source(f"folder:{tmp_path if side else root}")

    def test_a_mask_of_other_proportions(self, tmp_path: Path) -> None:
        draw(tmp_path / "a" / "1.png", size=(40, 60))
        draw(tmp_path / "a" / "masks" / "1.png", size=(40, 40))
        source = open_source(f"folder:{tmp_path}")
        with pytest.raises(DataError, match="mask of 40x40 pixels for an image of 60x40"):
            source.read_mask(source.records[0])


class TestPatients:
    @pytest.mark.parametrize(
        ("path", "patient"),
        [
            ("person12_bacteria_3.jpeg", "person12"),
            ("IM-0115-0001.jpeg", "IM-0115"),
            ("NORMAL2-IM-0115-0001.jpeg", "NORMAL2-IM-0115"),
            ("VIRUS-1003233-0001.jpeg", "VIRUS-1003233"),
            ("patient00012_study1_view1.jpg", "patient00012"),
            ("patient00012/study1/view1_frontal.jpg", "patient00012"),
            ("Patient-7 (2).png", "Patient-7"),
            ("p12_3.png", "p12"),
            ("P12.png", "P12"),
            ("00000013_005.png", "00000013"),
            ("16660_4_1.jpg", "16660"),
            ("subject12_a.png", "subject12"),
            ("covid_subj12_a.png", "subj12"),
            ("sub-S03047_ses-E06163_run-1.png", "sub-S03047"),
            ("case12-3.tif", "case12"),
            ("MIDRC-RICORD-1C-419639-003251-46647-0.png", "419639-003251"),
            ("0012/3.png", "0012"),
            ("p10000032/s50414267/1.jpg", "p10000032"),
            ("1.png", None),
            ("COVID-12.png", None),
            ("COVID-19 (12).png", None),
            ("Viral Pneumonia-1.png", None),
            ("2020/1.png", None),
            ("20200322_101.png", None),
            ("pneumonia12_3.png", None),
            ("subset1_3.png", None),
            ("apt12_3.png", None),
            ("1d435a4b.jpg", None),
            ("covid-19-pneumonia-30-PA.jpg", None),
        ],
    )
    def test_in_a_name(self, path: str, patient: str | None) -> None:
        assert patient_in_path(path) == patient

    def test_names_are_suggested_once(self, tmp_path: Path, caplog) -> None:
        names = [f"sick/person{i // 2}_virus_{i}.jpeg" for i in range(6)]
        draw_all(tmp_path, *names, "well/IM-0115-0001.jpeg", "well/IM-0117-0001.jpeg")
        plain = open_source(f"folder:{tmp_path}").records
        assert len({r.patient for r in plain}) == 8
        (warning,) = caplog.messages
        assert "sick/person0_virus_0.jpeg" in warning
        assert "6 images would share one" in warning
        assert f"folder:{tmp_path},patient=name" in warning
        caplog.clear()
        spec = f"folder:{tmp_path},patient=name"
        source = open_source(spec)
        assert source.spec == spec
        assert {r.patient for r in source.records} == {
            "person0", "person1", "person2", "IM-0115", "IM-0117",
        }  # fmt: skip
        open_source(f"folder:{tmp_path},patient=image")
        assert caplog.text == ""

    def test_no_word_where_no_image_shares(self, tmp_path: Path, caplog) -> None:
        draw_all(tmp_path, *(f"{'ab'[i % 2]}/person{i}_1.png" for i in range(6)))
        open_source(f"folder:{tmp_path}")
        assert caplog.text == ""

    def test_split_by_the_header(self, tmp_path: Path, write_dicom, caplog) -> None:
        for i in range(12):
            write_dicom(tmp_path / "ab"[i % 2] / f"{i}.dcm", f"MRN-{i // 4}{'ab'[i % 2]}")
        records = open_source(f"folder:{tmp_path}").records
        assert len({r.patient for r in records}) == 6
        assert not any("MRN" in r.patient for r in records)
        split = choose_split(records, folds=3)
        sides = [{records[i].patient for i in side} for side in (split.train, split.validation)]
        assert not sides[0] & sides[1]
        assert caplog.text == ""
        own = open_source(f"folder:{tmp_path},patient=image").records
        assert [r.patient for r in own] == [r.key for r in own]

    def test_patients_of_nobody(self, tmp_path: Path, write_dicom, caplog) -> None:
        for i in range(4):
            write_dicom(tmp_path / "ab"[i % 2] / f"{i}.dcm", "SITE-1")
        records = open_source(f"folder:{tmp_path}").records
        assert len({r.patient for r in records}) == 4
        assert "4 DICOM files have the same PatientID" in caplog.text
        assert "SITE-1" not in caplog.text
        caplog.clear()
        write_dicom(tmp_path / "a" / "4.dcm", "SITE-2")
        write_dicom(tmp_path / "a" / "5.dcm", "ANONYMOUS")
        write_dicom(tmp_path / "a" / "6", "")
        records = open_source(f"folder:{tmp_path}").records
        assert len({r.patient for r in records}) == 4
        assert "2 of 7 DICOM files have no PatientID" in caplog.text

    def test_names_and_headers(self, tmp_path: Path, write_dicom) -> None:
        """patient=name asks the header where the name says nothing."""
        for name, patient in (("p1_1", "x"), ("p1_2", "y"), ("other", "z"), ("more", "z")):
            write_dicom(tmp_path / "a" / f"{name}.dcm", patient)
        draw(tmp_path / "b" / "1.png")
        found = [r.patient for r in open_source(f"folder:{tmp_path},patient=name").records]
        assert found[0] == found[1] != "p1"
        assert found[2:] == ["p1", "p1", "b/1.png"]

    def test_within_a_published_split(self, tmp_path: Path, caplog) -> None:
        for side in ("train", "test"):
            draw_all(tmp_path / side, f"a/00000013_00{len(side)}.png", "b/1.png")
        records = open_source(f"folder:{tmp_path}").records
        assert {r.patient for r in records} == {"00000013", "train/b/1.png", "test/b/1.png"}
        choose_split(records)
        assert "1 patients stand on several sides" in caplog.text
        caplog.set_level(logging.WARNING)
        with pytest.raises(DataError, match="patient=x: expected auto or name or image"):
            open_source(f"folder:{tmp_path},patient=x")
