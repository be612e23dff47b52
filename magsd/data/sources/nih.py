"""`nih:DIR`: NIH ChestX-ray14 (Wang et al., CVPR 2017)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from magsd.data.record import Record, Side
from magsd.data.sources.base import Options
from magsd.data.sources.published import Box, PublishedSource, read_box
from magsd.data.sources.radiographs import VIEWS, shows_view
from magsd.data.sources.rows import read_rows, read_words
from magsd.errors import DataError

_COLUMNS = ("image index", "finding labels", "patient id", "view position")
_LISTS: dict[Side, str] = {"train": "train_val_list.txt", "validation": "test_list.txt"}
# The list of boxes has other words for two of the findings.
_FINDING_OF_BOX = {"Infiltrate": "Infiltration", "Pleural Thickening": "Pleural_Thickening"}


class NihSource(PublishedSource):
    """The images with exactly one finding, or with "No Finding", which is a class, too.

    Images with several findings are left out, with a warning that counts them: a classifier here
    gives each image one class. Boxes of the image's own finding become its mask. The split is that
    of train_val_list.txt and test_list.txt, where both are there.
    """

    kind = "nih"
    name = "NIH ChestX-ray14"
    home = "https://nihcc.app.box.com/v/ChestXray-NIHCC"
    options: ClassVar[Options] = {"view": VIEWS}
    box_kind = "lesion"
    box_frame = 1024

    def _find(self) -> Iterator[Record]:
        table = self._need("Data_Entry_2017.csv", "Data_Entry_2017_v2020.csv")
        files, sides, boxes = self._find_files(), self._read_sides(), self._read_boxes()
        others = several = 0
        for _, row in read_rows(table, _COLUMNS):
            name, label = row["image index"].strip(), row["finding labels"].strip()
            if not shows_view(row["view position"], self.choice["view"]):
                others += 1
                continue
            if "|" in label:
                several += 1
                continue
            yield self._record(
                files.get(name, self.folder / "images" / name),
                label,
                key=name,
                patient=row["patient id"].strip(),
                split=sides.get(name),
                boxes=boxes.get((name, label), ()),
            )
        self._left_out(others, f"that are not of the view {self.choice['view']}")
        self._left_out(several, "with several findings")

    def _find_files(self) -> dict[str, Path]:
        """Name -> file in images/, or in the archives' images_001/images/ to images_012/images/."""
        folders = [self.folder / "images", *sorted(self.folder.glob("images_*/images"))]
        folders += sorted(self.folder.glob("images_*"))
        found = [folder for folder in folders if folder.is_dir()]
        if not found:
            self._need("images", "images_001")
        return {path.name: path for folder in found for path in folder.iterdir()}

    def _read_sides(self) -> dict[str, Side]:
        """Name -> side of the published split; empty where its lists are not there."""
        paths = {side: self.folder / name for side, name in _LISTS.items()}
        there = [path for path in paths.values() if path.is_file()]
        if len(there) == 1:
            raise DataError(
                f"{self.folder}: of the published split only {there[0].name} is there; both of"
                f" {' and '.join(_LISTS.values())} are needed, or none; {self._where()}"
            )
        return {
            words[0]: side for side, path in paths.items() if there for words in read_words(path, 1)
        }

    def _read_boxes(self) -> dict[tuple[str, str], list[Box]]:
        """(image, finding) -> boxes in the published images of 1024 x 1024 pixels."""
        path = self.folder / "BBox_List_2017.csv"
        boxes: dict[tuple[str, str], list[Box]] = {}
        if not path.is_file():
            return boxes
        names = ("bbox [x", "y", "w", "h]")
        for line, row in read_rows(path, ("image index", "finding label", *names)):
            finding = row["finding label"].strip()
            key = row["image index"].strip(), _FINDING_OF_BOX.get(finding, finding)
            box = read_box((row[name] for name in names), f"{path}, line {line}")
            boxes.setdefault(key, []).append(box)
        return boxes
