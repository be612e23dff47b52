"""`csv:FILE`: a table of files and labels."""

from __future__ import annotations

import dataclasses
import logging
import posixpath
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from magsd.data.darwin import DarwinAnnotation, read_darwin
from magsd.data.images import read_image_file, to_gray
from magsd.data.record import Record
from magsd.data.sources.base import FileSource, merge_patients
from magsd.data.sources.rows import read_rows
from magsd.errors import DataError

_REQUIRED = ("file", "label")
#: Spellings of the patient column, without what is neither letter nor digit, the first one found.
_PATIENT = (
    "patient",
    "patientid",
    "patientno",
    "patientnumber",
    "subject",
    "subjectid",
    "personid",
)
#: A column with one of these in its name may hold patients, too.
_LIKE_PATIENT = ("patient", "subject", "person", "mrn")
#: What stands for no patient.
_NOBODY = {"", "nan", "na", "n/a", "none", "null"}
_ADVICE = " (file and label are needed, patient and mask may follow)"
_log = logging.getLogger(__name__)


class TableSource(FileSource):
    """Images listed in a CSV with the columns file, label and optional patient, mask.

    patient: under any usual spelling (patient_id, PatientID, subject ...), which is said; nan, NA,
    None and empty stand for no patient: the image is its own.

    file, mask: paths relative to the CSV's folder, or absolute. mask: an image that is above 0
    in the lesion, or Darwin JSON with the lungs. Without a mask column, ``lungs/<stem>.json``
    next to the CSV is that image's annotation. Without a patient column each image is its own
    patient. Images whose annotations name the same patient become one patient.
    """

    def __init__(
        self, path: Path, *, classes: Sequence[str] | None = None, limit: int | None = None
    ) -> None:
        self.spec = f"csv:{path}"
        rows = read_rows(path, _REQUIRED, advice=_ADVICE)
        self._masks: dict[str, Path] = {}
        self._annotations: dict[str, DarwinAnnotation] = {}
        self._patient = _patient_column(path, list(rows[0][1]))
        records, identities = [], []
        for line, row in rows:
            record = self._record(path, line, row)
            records.append(record)
            annotation = self._annotations.get(record.key)
            identities.append(annotation.patients if annotation else ())
        merged = merge_patients(records, identities)
        changed = sum(a.patient != b.patient for a, b in zip(records, merged, strict=True))
        if changed:
            _log.info("%s: %d images joined to the patient that their tag names", path, changed)
        self._set_records(merged, origin=str(path), classes=classes, limit=limit)

    def _record(self, table: Path, line: int, row: dict[str, str]) -> Record:
        file, label = row["file"].strip(), row["label"].strip()
        if not file or not label:
            raise DataError(f"{table}, line {line}: file or label is empty")
        if "\n" in file or "\n" in label:
            raise DataError(f"{table}, line {line}: file or label has several lines")
        # One file has one key, however it is written.
        key = posixpath.normpath(file.replace("\\", "/"))
        patient = row.get(self._patient, "").strip()
        if patient.lower() in _NOBODY:
            patient = key
        record = Record(key, label, patient, table.parent / key)
        try:
            mask = self._find_mask(table, row, key)
        except OSError as error:
            raise DataError(f"{table}, line {line}: {file[:50]}: {error.strerror}") from error
        if mask is None:
            return record
        self._masks[key] = mask
        if mask.suffix.lower() != ".json":
            return dataclasses.replace(record, mask_kind="lesion")
        annotation = self._annotations[key] = read_darwin(mask)
        return dataclasses.replace(record, mask_kind="lungs") if annotation.lungs else record

    @staticmethod
    def _find_mask(table: Path, row: dict[str, str], key: str) -> Path | None:
        if "mask" in row:
            name = (row["mask"] or "").strip()
            return table.parent / name if name else None
        beside = table.parent / "lungs" / f"{PurePosixPath(key).stem}.json"
        return beside if beside.is_file() else None

    def mask_path(self, record: Record) -> Path | None:
        """The file of the record's mask."""
        return self._masks.get(record.key)

    def read_mask(self, record: Record) -> NDArray[np.bool_] | None:
        """Lesion or lungs; None where there are none or where the image was cropped."""
        if record.mask_kind is None:
            return None
        height, width = self.read_image(record).shape[:2]
        if (annotation := self._annotations.get(record.key)) is not None:
            return annotation.lung_mask(height, width)
        mask = to_gray(read_image_file(self._masks[record.key])) > 0
        if mask.shape != (height, width):
            raise DataError(
                f"{self._masks[record.key]}: mask of {mask.shape[1]}x{mask.shape[0]} pixels for"
                f" an image of {width}x{height}"
            )
        return mask


def _patient_column(table: Path, columns: Sequence[str]) -> str:
    """The column of the patients; a warning names it, and columns that look like one."""
    plain = {"".join(filter(str.isalnum, name)): name for name in reversed(columns)}
    found = next((plain[name] for name in _PATIENT if name in plain), "patient")
    others = [
        name for name in columns if name != found and any(word in name for word in _LIKE_PATIENT)
    ]
    if found not in columns:
        taken = "each image is its own patient"
    else:
        taken = f"patients are taken from the column {found}"
    if others:
        _log.warning("%s: %s; not used: %s", table, taken, ", ".join(others))
    elif found in columns and found != "patient":
        _log.warning("%s: %s", table, taken)
    return found
