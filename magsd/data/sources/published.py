"""What the readers of public data sets share."""

from __future__ import annotations

import dataclasses
import logging
import math
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from magsd.data.images import upright
from magsd.data.record import NO_CELLS, Cells, MaskKind, Record, Side
from magsd.data.sources.base import FileSource, merge_patients
from magsd.errors import DataError

_log = logging.getLogger(__name__)


class Box(NamedTuple):
    """A rectangle in pixels; see `PublishedSource.box_frame` for whose."""

    left: float
    top: float
    width: float
    height: float


def read_box(words: Iterable[str], where: str) -> Box:
    """A box of four words; DataError naming `where` they stand if they are no four numbers."""
    try:
        left, top, width, height = (float(word) for word in words)
    except ValueError:
        raise DataError(f"{where}: a box is left, top, width and height") from None
    return Box(left, top, width, height)


def read_mat(path: Path | None, name: str, fields: Sequence[str] = ()) -> Any:
    """The variable of a name in a .mat file; DataError where it or a field is lacking."""
    from scipy.io import loadmat

    try:
        value = loadmat(path, squeeze_me=True)[name]
    except Exception as error:  # scipy raises many kinds where a file is damaged
        raise DataError(f"{path}: not the list of that set ({error})") from error
    lacking = [field for field in fields if field not in (value.dtype.names or ())]
    if lacking:
        raise DataError(f"{path}: {name} has no {' and no '.join(lacking)}")
    return value


class PublishedSource(FileSource):
    """A public data set in the layout that its authors publish.

    kind: the word that opens it, as in ``kind:DIR``. name, home: the set's name, and where it is to
    be had. box_kind: what the boxes show, which serve as masks. box_frame: side in pixels of the
    square in which the boxes are given; None where they are given in the image's own pixels.
    choice: the value of each option.
    """

    kind: ClassVar[str]
    name: ClassVar[str]
    home: ClassVar[str]
    box_kind: ClassVar[MaskKind] = "object"
    box_frame: ClassVar[int | None] = None

    def __init__(
        self,
        folder: Path,
        *,
        classes: Sequence[str] | None = None,
        limit: int | None = None,
        **options: str,
    ) -> None:
        given = "".join(f",{name}={value}" for name, value in options.items())
        self.spec = f"{self.kind}:{folder}{given}"
        self.folder = folder
        self.choice = {name: (*values, "")[0] for name, values in self.options.items()} | options
        self._boxes: dict[str, tuple[Box, ...]] = {}
        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder; {self._where()}")
        records = _one_per_image(self._find())
        self._report_missing(records)
        self._set_records(records, origin=str(folder), classes=classes, limit=limit)

    @abstractmethod
    def _find(self) -> Iterable[Record]:
        """The records in a stable order; `_record` makes each."""

    def _record(
        self,
        path: Path,
        label: str,
        *,
        key: str | None = None,
        patient: str = "",
        split: Side | None = None,
        boxes: Sequence[Box] = (),
        extra: Cells = NO_CELLS,
    ) -> Record:
        """A record; the key is the path within the folder, the patient the key, where not given."""
        key = key or path.relative_to(self.folder).as_posix()
        if boxes:
            self._boxes[key] = tuple(boxes)
        kind = self.box_kind if boxes else None
        return Record(key, label, patient or key, path, kind, split, extra)

    def _need(self, *names: str) -> Path:
        """The first of some paths within the folder that exists."""
        for name in names:
            if (path := self.folder / name).exists():
                return path
        raise DataError(
            f"{self.folder}: no {' and no '.join(names)} there; {self._where()};"
            " docs/data.md shows the layout"
        )

    def _where(self) -> str:
        return f"{self.name} is to be had from {self.home}"

    def _report_missing(self, records: Sequence[Record]) -> None:
        """Raise DataError where no image is there; warn where some are not."""
        missing = [r.path for r in records if r.path is not None and not r.path.is_file()]
        if not missing:
            return
        text = (
            f"{self.folder}: {len(missing)} of {len(records)} listed images are not there,"
            f" the first {missing[0]}; {self._where()}"
        )
        if len(missing) == len(records):
            raise DataError(text)
        _log.warning("%s", text)

    def _left_out(self, count: int, why: str) -> None:
        """Warn of listed images that are left out."""
        if count:
            _log.warning("%s: %d images %s are left out", self.folder, count, why)

    def read_mask(self, record: Record) -> NDArray[np.bool_] | None:
        """(H, W) bool, True within the record's boxes; None where it has none."""
        boxes = self._boxes.get(record.key)
        if boxes is None:
            return None
        height, width, orientation = self._upright_size(record)
        if orientation > 4:  # the boxes are of the image as it is stored
            height, width = width, height
        across = width / (self.box_frame or width)
        down = height / (self.box_frame or height)
        mask = np.zeros((height, width), bool)
        for box in boxes:
            left, right = box.left * across, (box.left + box.width) * across
            top, bottom = box.top * down, (box.top + box.height) * down
            rows = slice(max(0, math.floor(top)), max(0, math.ceil(bottom)))
            mask[rows, max(0, math.floor(left)) : max(0, math.ceil(right))] = True
        return upright(mask, orientation)

    def fingerprint(self, record: Record) -> str:
        """Identity of the image file and of the boxes."""
        return f"{super().fingerprint(record)}:{self._boxes.get(record.key, ())}"


def _one_per_image(records: Iterable[Record]) -> tuple[Record, ...]:
    """Some lists name an image twice: one record, whose patients are one.

    Records that differ in more than the patient both stay, for the error that names them.
    """
    first: dict[str, Record] = {}
    patients: dict[str, set[str]] = {}
    others = []
    for record in records:
        kept = first.setdefault(record.key, record)
        patients.setdefault(record.key, set()).add(record.patient)
        if dataclasses.replace(record, patient=kept.patient) != kept:
            others.append(record)
    found = [*first.values(), *others]
    return merge_patients(found, [patients[record.key] for record in found])
