"""`csv:FILE`: a table of files and labels."""

from __future__ import annotations

import dataclasses
import logging
import os
import posixpath
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from magsd.cells import MISSING
from magsd.data.darwin import DarwinAnnotation, read_darwin
from magsd.data.dicom_patient import dicom_patients
from magsd.data.images import IMAGE_SUFFIXES, read_image_file, to_gray
from magsd.data.record import SIDE_NAMES, Cells, Record
from magsd.data.sources.base import FileSource, Options, merge_patients
from magsd.data.sources.known_tables import mapping_hint
from magsd.data.sources.masks import turned_mask
from magsd.data.sources.rows import read_table
from magsd.errors import DataError
from magsd.paths import expand, file_identity

_ID = "(?:ids?|uid|identifier|no|nr|num|number|code|key)"
#: Spellings of the patient column, without what is neither letter nor digit, the first one found.
_PATIENT = (
    "patients?",
    f"patients?{_ID}",
    f"(?:subject|participant)s?{_ID}?",
    f"(?:persons?|pat|pt|subj){_ID}",
)
#: Such a column may hold patients, too.
_LIKE_PATIENT = re.compile("patient|subject|person|participant|individual|mrn|pacient|pazient")
#: And such a one, which is named where no column of patients is taken.
_MAY_BE_PATIENT = re.compile(f"(?:case|study|exam|record|client|donor|anon|pat|pt|subj?){_ID}?|pid")
#: A label that stands for a cell without one.
_NO_LABEL = {"", "nan", "#n/a", "#na", "<na>"}
_IMAGE_ON_A_LINE = re.compile(
    rf"[\r\n].*(?:{'|'.join(map(re.escape, sorted(IMAGE_SUFFIXES)))})\b", re.IGNORECASE
)
_SPLIT = "split"
_WINDOWS = re.compile(r"[A-Za-z]:[\\/]|\\\\")
_LONGEST_NAME = 255  # bytes, of the file systems of today
_log = logging.getLogger(__name__)


class TableSource(FileSource):
    """Images listed in a CSV with the columns file, label and optional patient, mask.

    options: names of columns, where they are others: ``csv:FILE,file=image,label=diagnosis``.

    split: train, validation (val) or test, of every image: sides that the set publishes.

    patient: under any usual spelling (patient_id, PatientID, subject ...), which is said; nan, NA,
    None and empty stand for no patient: the image is its own.

    file, mask: paths relative to the CSV's folder, or absolute. A file that is not there is looked
    for below that folder by its name, with or without its suffix. mask: an image that is above 0
    in the lesion, or Darwin JSON with the lungs. Without a mask column, ``lungs/<stem>.json``
    next to the CSV is that image's annotation. Where no column names a patient, that of a DICOM
    file is a hash of its PatientID, and any other image is its own. Images whose annotations name
    the same patient become one patient. A file on several rows that say the same is one image,
    with the further cells of the first. All other columns are each record's `extra`.
    """

    options: ClassVar[Options] = {"file": (), "label": (), "patient": (), "mask": ()}

    def __init__(
        self,
        path: Path,
        *,
        classes: Sequence[str] | None = None,
        limit: int | None = None,
        **options: str,
    ) -> None:
        self.spec = f"csv:{path}" + "".join(f",{name}={value}" for name, value in options.items())
        # As `read_table` returns them.
        self._columns = {name: value.strip().lower() for name, value in options.items()}
        needed = [*dict.fromkeys([self._column("file"), self._column("label")])]
        needed += [self._columns[name] for name in ("patient", "mask") if name in self._columns]
        rows, written = read_table(path, needed, advice=partial(_advice, path))
        self._files = _Files(path.absolute().parent)
        self._masks: dict[str, Path] = {}
        self._annotations: dict[str, DarwinAnnotation] = {}
        self._patient = self._columns.get("patient") or _patient_column(path, list(rows[0][1]))
        own = {*needed, self._column("mask"), self._patient}
        has_sides = _has_sides(path, rows)
        if has_sides:
            own.add(_SPLIT)
        others = {name: shown for name, shown in written.items() if name and name not in own}
        names = tuple(others.values())
        same: dict[str, str] = {}  # a cell that many rows have is kept once
        records: dict[object, Record] = {}
        lines: dict[object, int] = {}
        said: dict[object, object] = {}
        repeated = 0
        for line, row in rows:
            record = self._record(path, line, row)
            if has_sides:
                side = SIDE_NAMES[row[_SPLIT].strip().lower()]
                record = dataclasses.replace(record, split=side)
            file = record.path or Path()
            place = file_identity(file) or os.path.abspath(file)
            says = (
                record.label,
                None if record.patient == record.key else record.patient,
                self._masks[record.key] if record.mask_kind else None,
                record.split,
            )
            if place not in records:
                cells = tuple(same.setdefault(row[name], row[name]) for name in others)
                records[place] = dataclasses.replace(record, extra=Cells(names, cells))
                lines[place], said[place] = line, says
                continue
            first = records[place]
            if says != said[place]:
                raise DataError(
                    f"{path}, line {line}: {first.key} is listed more than once, on line"
                    f" {lines[place]} with another label, patient, mask or split; keep one of the"
                    " rows"
                )
            repeated += 1
        if repeated:
            _log.warning("%s: %d rows repeat an image of another row", path, repeated)
        found = list(records.values())
        alone = {r.key: r.path for r in found if r.path and r.patient == r.key}
        named = dicom_patients(alone, str(path))
        found = [dataclasses.replace(r, patient=named.get(r.key, r.patient)) for r in found]
        annotations = [self._annotations.get(record.key) for record in found]
        merged = merge_patients(found, [a.patients if a else () for a in annotations])
        changed = sum(a.patient != b.patient for a, b in zip(found, merged, strict=True))
        if changed:
            _log.info("%s: %d images joined to the patient that their tag names", path, changed)
        self._set_records(merged, origin=str(path), classes=classes, limit=limit)

    def _column(self, name: str) -> str:
        return self._columns.get(name, name)

    def _record(self, table: Path, line: int, row: dict[str, str]) -> Record:
        file, label = row[self._column("file")].strip(), row[self._column("label")].strip()
        if not file or label.lower() in _NO_LABEL:
            raise DataError(f"{table}, line {line}: file or label is empty")
        patient = row.get(self._patient, "").strip()
        if any(mark in text for text in (file, label) for mark in "\r\n"):
            raise DataError(f"{table}, line {line}: file or label has several lines")
        if any(mark in patient for mark in "\r\n"):
            raise DataError(
                f"{table}, line {line}: the patient has several lines; is a quote stray?"
            )
        if any(_IMAGE_ON_A_LINE.search(cell) for cell in row.values()):
            raise DataError(
                f"{table}, line {line}: a cell of several lines names images; is a quote stray?"
            )
        mask_name = row.get(self._column("mask"), "").strip()
        for name in (file, mask_name):
            if os.name != "nt" and _WINDOWS.match(name):
                raise DataError(
                    f"{table}, line {line}: {name} is a Windows path; write it relative to the"
                    " table"
                )
        key = posixpath.normpath(file.replace("\\", "/"))
        if max(len(os.fsencode(part)) for part in key.split("/")) > _LONGEST_NAME:
            raise DataError(f"{table}, line {line}: {file[:50]}...: the file name is too long")
        if patient.lower() in MISSING:
            patient = key
        try:
            record = Record(key, label, patient, self._files.find(key))
            mask = self._find_mask(table, row, key)
            if mask is not None and mask.suffix.lower() == ".json":
                self._annotations[key] = read_darwin(mask)
        except (OSError, DataError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise DataError(f"{table}, line {line}: {file[:50]}: {reason}") from error
        if mask is None:
            return record
        self._masks[key] = mask
        if mask.suffix.lower() != ".json":
            return dataclasses.replace(record, mask_kind="lesion")
        annotation = self._annotations[key]
        return dataclasses.replace(record, mask_kind="lungs") if annotation.lungs else record

    def _find_mask(self, table: Path, row: dict[str, str], key: str) -> Path | None:
        if self._column("mask") in row:
            name = row[self._column("mask")].strip().replace("\\", "/")
            return None if name.lower() in MISSING else table.parent / expand(name)
        beside = table.parent / "lungs" / f"{PurePosixPath(key).stem}.json"
        return beside if beside.is_file() else None

    def mask_path(self, record: Record) -> Path | None:
        """The file of the record's mask."""
        return self._masks.get(record.key)

    def read_mask(self, record: Record) -> NDArray[np.bool_] | None:
        """Lesion or lungs; None where there are none or where the image was cropped."""
        if record.mask_kind is None:
            return None
        height, width, orientation = self._upright_size(record)
        if (annotation := self._annotations.get(record.key)) is not None:
            return annotation.lung_mask(height, width, orientation)
        path = self._masks[record.key]
        mask = to_gray(read_image_file(path)) > 0
        mask = turned_mask(mask, path, height, width, orientation)
        if mask.shape != (height, width):
            raise DataError(
                f"{self._masks[record.key]}: mask of {mask.shape[1]}x{mask.shape[0]} pixels for"
                f" an image of {width}x{height}"
            )
        return mask


class _Files:
    """Finds the files that a table names."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._below: dict[str, list[Path]] | None = None

    def find(self, name: str) -> Path:
        """The file of a name; DataError where several files below the folder have it.

        A path that leads nowhere is returned as it is, for the error of reading it.
        """
        path = self._folder / expand(name)
        # Paths with folders and a suffix are meant as they stand; looking at each takes time.
        complete = "/" in name and path.suffix.lower() in IMAGE_SUFFIXES
        if complete or os.path.lexists(path):
            return path
        found = [
            other
            for other in self._named(PurePosixPath(name).name)
            if f"/{other.as_posix()}".endswith((f"/{name}", f"/{name}{other.suffix}"))
        ]
        if len(found) > 1:
            names = ", ".join(str(other) for other in found[:2])
            raise DataError(f"{len(found)} files have this name: {names}; write the path")
        return self._folder / found[0] if found else path

    def _named(self, name: str) -> list[Path]:
        """Images below the folder of a name, with or without its suffix, as relative paths."""
        if self._below is None:
            self._below = {}
            for top, _, names in os.walk(self._folder):
                for each in sorted(names):
                    path = Path(top, each).relative_to(self._folder)
                    if path.suffix.lower() in IMAGE_SUFFIXES:
                        for spelling in {path.name, path.stem}:
                            self._below.setdefault(spelling, []).append(path)
        return self._below.get(name, [])


def _advice(table: Path, columns: Sequence[str]) -> str:
    """How to name the columns of a table that lacks some."""
    hint = mapping_hint(columns) or ""
    if hint.startswith("file="):
        return f"; name them: csv:{table},{hint}"
    return (
        f"; name the columns: csv:{table},file=COLUMN,label=COLUMN, and perhaps patient=COLUMN,"
        f"mask=COLUMN{hint and f'. {hint}'}"
    )


def _has_sides(table: Path, rows: Sequence[tuple[int, dict[str, str]]]) -> bool:
    """Whether the column split names the side of every image; a warning where it does not."""
    if _SPLIT not in rows[0][1]:
        return False
    values = {row[_SPLIT].strip().lower() for _, row in rows}
    unknown = sorted(values - SIDE_NAMES.keys())
    if not unknown and "train" in {SIDE_NAMES[value] for value in values}:
        return True
    what = f"it holds {unknown[0]!r}" if unknown else "it names no training image"
    _log.warning(
        "%s: the column split is not used: %s; expected train, validation and test", table, what
    )
    return False


def _patient_column(table: Path, columns: Sequence[str]) -> str:
    """The column of the patients; a warning names it, and columns that look like one."""
    plain: dict[str, str] = {}
    for name in columns:
        plain.setdefault("".join(filter(str.isalnum, name)), name)
    found = next(
        (name for form in _PATIENT for text, name in plain.items() if re.fullmatch(form, text)),
        "patient",
    )
    others = [name for name in columns if name != found and _LIKE_PATIENT.search(name)]
    if found not in columns:
        others += [name for text, name in plain.items() if _MAY_BE_PATIENT.fullmatch(text)]
        taken = "each image is its own patient"
    else:
        taken = f"patients are taken from the column {found}"
    if others:
        _log.warning("%s: %s; not used: %s", table, taken, ", ".join(others))
    elif found in columns and found != "patient":
        _log.warning("%s: %s", table, taken)
    return found
