"""`v7:DIR`: images with Darwin JSON, as exported from V7."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from magsd.data.darwin import DarwinAnnotation, read_darwin
from magsd.data.record import MaskKind, Record
from magsd.data.sources.base import FileSource, merge_patients
from magsd.data.sources.folder import find_files, find_images
from magsd.errors import DataError

_log = logging.getLogger(__name__)

# The first tag found wins: images of COVID-19 carry "Viral Pneumonia" too.
CLASS_OF_TAG = {
    "COVID-19": "COVID-19",
    "Viral Pneumonia": "Viral Pneumonia",
    "Bacterial Pneumonia": "Bacterial Pneumonia",
    "Healthy": "Healthy",
    "No Pneumonia (healthy)": "Healthy",
}


class DarwinSource(FileSource):
    """Images and annotations under DIR, in folders of their own or side by side.

    An annotation's image is the one named in it, or else the one of its own stem. Class from
    the tags, lungs from the polygons, patient from the tag "PatientID:N". Images without a
    class tag are left out, with a warning that counts them.
    """

    def __init__(
        self, folder: Path, *, classes: Sequence[str] | None = None, limit: int | None = None
    ) -> None:
        self.spec = f"v7:{folder}"
        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder")
        files = find_files(folder, frozenset({".json"}))
        annotations = [read_darwin(path) for path in files]
        if not annotations:
            raise DataError(f"{folder}: no annotations (*.json) found")
        self._annotations: dict[str, DarwinAnnotation] = {}
        records = merge_patients(*self._match(folder, annotations))
        self._set_records(records, origin=str(folder), classes=classes, limit=limit)

    def _match(
        self, folder: Path, annotations: Sequence[DarwinAnnotation]
    ) -> tuple[list[Record], list[tuple[str, ...]]]:
        index = _ImageIndex(folder)
        records: list[Record] = []
        identities: list[tuple[str, ...]] = []
        untagged = 0
        for annotation in annotations:
            label = class_of(annotation)
            if label is None:
                untagged += 1
                continue
            path = index.find(annotation)
            key = path.relative_to(folder).as_posix()
            if key in self._annotations:
                raise DataError(f"{annotation.path}: {key} has another annotation already")
            self._annotations[key] = annotation
            kind: MaskKind | None = "lungs" if annotation.lungs else None
            records.append(Record(key, label, key, path, kind))
            identities.append(annotation.patients)
        if untagged:
            _log.warning("%s: %d images without a class tag are left out", folder, untagged)
        return records, identities

    def mask_path(self, record: Record) -> Path | None:
        """The annotation's file."""
        return self._annotations[record.key].path

    def read_mask(self, record: Record) -> np.ndarray | None:
        """The lungs, or None where there are none or where the image was cropped."""
        if record.mask_kind is None:
            return None
        height, width = self.read_image(record).shape[:2]
        return self._annotations[record.key].lung_mask(height, width)


def class_of(annotation: DarwinAnnotation) -> str | None:
    """The class that the tags name, or None."""
    return next((name for tag, name in CLASS_OF_TAG.items() if tag in annotation.tags), None)


class _ImageIndex:
    """Images of a folder by file name and by stem."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._by_name: dict[str, list[Path]] = {}
        self._by_stem: dict[str, list[Path]] = {}
        for path in find_images(folder):
            self._by_name.setdefault(path.name, []).append(path)
            self._by_stem.setdefault(path.stem, []).append(path)

    def find(self, annotation: DarwinAnnotation) -> Path:
        """The annotated image, which may be missing: reading it then reports it as such."""
        names = [PurePosixPath(name).name for name in annotation.names]
        stems = [annotation.path.stem, *(PurePosixPath(name).stem for name in names)]
        found = [self._by_name.get(name) for name in names]
        found += [self._by_stem.get(stem) for stem in stems]
        paths = next((paths for paths in found if paths), None)
        if paths is None:
            return self._folder / (names[0] if names else f"{annotation.path.stem}.png")
        if len(paths) > 1:
            raise DataError(
                f"{annotation.path}: its image may be {paths[0]} or {paths[1]}; names must differ"
            )
        return paths[0]
