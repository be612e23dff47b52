"""`folder:DIR`: one subfolder per class."""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from magsd.data.dicom_patient import dicom_patients
from magsd.data.images import IMAGE_SUFFIXES
from magsd.data.record import MaskKind, Record, Side
from magsd.data.sources.base import FileSource, Options, merge_patients
from magsd.data.sources.files import LeftOut, shown, walk, why_no_image
from magsd.data.sources.layout import find_classes
from magsd.data.sources.masks import read_mask_file, split_masks
from magsd.data.sources.names import patient_in_path
from magsd.errors import DataError
from magsd.paths import file_identity

_log = logging.getLogger(__name__)


class FolderSource(FileSource):
    """Images in DIR/CLASS/..., at any depth, linked files and folders too.

    DIR/train/CLASS/..., DIR/val/CLASS/... and DIR/test/CLASS/... are a published split. Masks in a
    folder masks beside the images are those of the lungs. Where DIR holds one folder alone, that
    may be meant.

    option ``patient``: what names the patient. ``name``: the file or a folder, as in
    person12_virus_6.jpeg, 00000013_005.png or patient00012/view1.png. ``image``: each image is its
    own. ``auto``: PatientID of DICOM files, of which a hash is kept; the names within a published
    split; else each image is its own, with a warning where names look as if images share one.

    What is left out is counted by the reason in one warning. A class without any image is a
    DataError, or under `skip_bad` a warning.
    """

    options: ClassVar[Options] = {"patient": ("auto", "name", "image")}
    takes_skip_bad = True

    def __init__(
        self,
        folder: Path,
        *,
        classes: Sequence[str] | None = None,
        limit: int | None = None,
        patient: str = "auto",
        skip_bad: bool = False,
    ) -> None:
        self.spec = f"folder:{folder}" + (f",patient={patient}" if patient != "auto" else "")
        self.folder = folder
        self._left_out = LeftOut()
        self._masks: dict[str, tuple[MaskKind, Path]] = {}
        if not _is_folder(folder):
            raise DataError(f"{folder}: no such folder")
        records: list[Record] = []
        empty: list[Path] = []
        found = find_classes(folder, classes, self._left_out)
        for path, side in found:
            images = self._find(path, side)
            records += images
            if not images:
                empty.append(path)
        published = any(side for _, side in found)
        self._report(records, empty, skip_bad)
        records, twice = self._one_per_file(records)
        patients = self._patients(records, patient, published)
        named = [
            dataclasses.replace(record, patient=patients.get(record.key) or record.key)
            for record in records
        ]
        self._set_records(
            merge_patients(named, twice), origin=str(folder), classes=classes, limit=limit
        )

    def mask_path(self, record: Record) -> Path | None:
        """The file of the record's mask."""
        return self._masks[record.key][1] if record.key in self._masks else None

    def read_mask(self, record: Record) -> NDArray[np.bool_] | None:
        """The mask resized to the image, or None where there is none; see `Source.read_mask`."""
        if (path := self.mask_path(record)) is None:
            return None
        return read_mask_file(path, *self._upright_size(record))

    def _find(self, folder: Path, side: Side | None) -> list[Record]:
        """The images of a class."""
        if shown(folder.name) != folder.name:
            raise DataError(
                f"{shown(folder)}: the name of a class must be UTF-8; rename the folder"
            )
        images = []
        for path in walk(folder, self._left_out):
            if (reason := why_no_image(path)) is None:
                images.append(path)
            else:
                self._left_out.add(path, reason)
        images, masks = split_masks(folder, images, self._left_out)
        records = []
        for path in images:
            key = path.relative_to(self.folder).as_posix()
            kind: MaskKind | None = None
            if path in masks:
                kind = masks[path][0]
                self._masks[key] = masks[path]
            records.append(Record(key, folder.name, key, path, kind, side))
        return records

    def _report(self, records: Sequence[Record], empty: Sequence[Path], skip_bad: bool) -> None:
        """Warn of what was left out; raise DataError where a class, or all, has no image."""
        if not records:
            left = f"; there are {self._left_out.text(self.folder)}" if self._left_out else ""
            raise DataError(
                f"{self.folder}: no images found; it must hold one subfolder per class, with files"
                f" of {', '.join(sorted(IMAGE_SUFFIXES))}{left}"
            )
        names = ", ".join(shown(path.relative_to(self.folder)) for path in empty)
        if empty and not skip_bad:
            there = "; ".join(
                part.text(self.folder) for path in empty if (part := self._left_out.within(path))
            )
            raise DataError(
                f"{self.folder}: no image in the folders of classes {names}"
                f" ({there or 'they are empty'}); remove these folders, or continue without"
                " them with data.skip_bad=true"
            )
        if self._left_out:
            _log.warning(
                "%s: files are left out: %s", self.folder, self._left_out.text(self.folder)
            )
        if empty:
            _log.warning("%s: no image in the folders of classes %s", self.folder, names)

    def _one_per_file(
        self, records: Sequence[Record]
    ) -> tuple[list[Record], list[tuple[str, ...]]]:
        """Records without files that a class holds under two names, and what files are the same.

        A file in two classes, or on two sides of a split, is two records of one patient.
        """
        first: dict[tuple[int, int], Record] = {}
        kept: list[Record] = []
        identities: list[tuple[str, ...]] = []
        again: list[Record] = []
        for record in records:
            identity = file_identity(record.path) if record.path else None
            before = first.setdefault(identity, record) if identity else record
            if before is not record:
                again.append(record)
                if (before.label, before.split) == (record.label, record.split):
                    continue
            kept.append(record)
            identities.append((f"file {identity}",) if identity else ())
        if again:
            _log.warning(
                "%s: %d files are there under two names, e.g. %s; in one class they count once, and"
                " in two they are one patient's",
                self.folder, len(again), shown(again[0].key),
            )  # fmt: skip
        return kept, identities

    def _patients(
        self, records: Sequence[Record], how: str, published: bool
    ) -> dict[str, str | None]:
        """Key -> patient, None or nothing where the image is its own."""
        if how == "image":
            return {}
        named = {r.key: patient_in_path(_within_class(r)) for r in records}
        header = dicom_patients({r.key: r.path for r in records if r.path}, str(self.folder))
        if how == "name":
            return {**header, **{key: name for key, name in named.items() if name}}
        unknown = {key: name for key, name in named.items() if key not in header}
        if published:
            return unknown | header
        self._suggest_names({key: name for key, name in unknown.items() if name})
        return {**header}

    def _suggest_names(self, named: dict[str, str]) -> None:
        """Warn where names look as if several images were of one patient."""
        counts = Counter(named.values())
        sharing = sum(count for count in counts.values() if count > 1)
        if not sharing or len(counts) < 2:
            return
        example = next(key for key, name in named.items() if counts[name] > 1)
        _log.warning(
            "%s: names such as %s look as if they named the patient, and %d images would share one;"
            " each image is its own patient now, so that one patient may be trained and validated"
            " on. Say folder:%s,patient=name if they do, patient=image if not",
            self.folder, shown(example), sharing, self.folder,
        )  # fmt: skip


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError as error:
        raise DataError(f"{path}: cannot be opened ({error.strerror})") from error


def _within_class(record: Record) -> str:
    """The part of the key after the class."""
    parts = record.key.split("/")
    return "/".join(parts[parts.index(record.label) + 1 :])
