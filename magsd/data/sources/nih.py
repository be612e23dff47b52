"""`nih:DIR`: NIH ChestX-ray14 (Wang et al., CVPR 2017)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from magsd.data.record import Cells, Record, Side
from magsd.data.sources.base import Options
from magsd.data.sources.files import find_images, holder
from magsd.data.sources.published import Box, PublishedSource, read_box
from magsd.data.sources.radiographs import VIEWS, shows_view
from magsd.data.sources.rows import read_rows, read_table, read_words
from magsd.errors import DataError

_COLUMNS = ("image index", "finding labels", "patient id", "view position")
# What predictions are told of an image.
_EXTRA = ("patient age", "patient gender", "view position")
_TABLES = ("Data_Entry_2017.csv", "Data_Entry_2017_v2020.csv", "sample_labels.csv")
# Copies that are passed on have the second names.
_LISTS: dict[Side, tuple[str, str]] = {
    "train": ("train_val_list.txt", "train_val_list_NIH.txt"),
    "test": ("test_list.txt", "test_list_NIH.txt"),
}
_BOXES = ("BBox_List_2017.csv", "BBox_List_2017_Official_NIH.csv")
# The list of boxes has other words for two of the findings.
_FINDING_OF_BOX = {"Infiltrate": "Infiltration", "Pleural Thickening": "Pleural_Thickening"}


class NihSource(PublishedSource):
    """The images with exactly one finding, or with "No Finding", which is a class, too.

    Images with several findings are left out, with a warning that counts them: a classifier here
    gives each image one class. Boxes of the image's own finding become its mask. The split is that
    of train_val_list.txt and test_list.txt, where both are there. Images lie in
    any folder beside the table. The sample of 5,606 images is read by its sample_labels.csv.
    """

    kind = "nih"
    name = "NIH ChestX-ray14"
    home = "https://nihcc.app.box.com/v/ChestXray-NIHCC"
    options: ClassVar[Options] = {"view": VIEWS}
    box_kind = "lesion"
    box_frame = 1024

    def _find(self) -> Iterator[Record]:
        place = holder(self.folder, *_TABLES) or self._need(*_TABLES).parent
        table = next(path for name in _TABLES if (path := place / name).exists())
        files, sides = self._find_files(place), self._read_sides(place)
        boxes = self._read_boxes(place)
        others = several = 0
        rows, written = read_table(table, _COLUMNS)
        extra = [name for name in _EXTRA if name in written]
        names = tuple(written[name] for name in extra)
        for _, row in rows:
            name, label = row["image index"].strip(), row["finding labels"].strip()
            if not shows_view(row["view position"], self.choice["view"]):
                others += 1
                continue
            if "|" in label:
                several += 1
                continue
            yield self._record(
                files.get(name, place / "images" / name),
                label,
                key=name,
                patient=row["patient id"].strip(),
                split=sides.get(name),
                boxes=boxes.get((name, label), ()),
                extra=Cells(names, tuple(row[name] for name in extra)),
            )
        self._left_out(others, f"that are not of the view {self.choice['view']}")
        self._left_out(several, "with several findings")

    def _find_files(self, place: Path) -> dict[str, Path]:
        """Name -> file; of two of one name that in fewer folders."""
        found = find_images(place)
        if not found:
            self._need("images", "images_001")
        found.sort(key=lambda path: len(path.parts), reverse=True)
        return {path.name: path for path in found}

    def _read_sides(self, place: Path) -> dict[str, Side]:
        """Name -> side of the published split; empty where its lists are not there."""
        lists = {
            side: path
            for side, names in _LISTS.items()
            if (path := next((p for name in names if (p := place / name).is_file()), None))
        }
        if len(lists) == 1:
            raise DataError(
                f"{self.folder}: of the published split only {next(iter(lists.values())).name} is"
                f" there; both of {' and '.join(names[0] for names in _LISTS.values())} are needed,"
                f" or none; {self._where()}"
            )
        return {words[0]: side for side, path in lists.items() for words in read_words(path, 1)}

    def _read_boxes(self, place: Path) -> dict[tuple[str, str], list[Box]]:
        """(image, finding) -> boxes in the published images of 1024 x 1024 pixels."""
        path = next((p for name in _BOXES if (p := place / name).is_file()), None)
        boxes: dict[tuple[str, str], list[Box]] = {}
        if path is None:
            return boxes
        names = ("bbox [x", "y", "w", "h]")
        for line, row in read_rows(path, ("image index", "finding label", *names)):
            finding = row["finding label"].strip()
            key = row["image index"].strip(), _FINDING_OF_BOX.get(finding, finding)
            box = read_box((row[name] for name in names), f"{path}, line {line}")
            boxes.setdefault(key, []).append(box)
        return boxes
