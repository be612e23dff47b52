"""`v7:DIR`: images with Darwin JSON, as exported from V7."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from magsd.data.darwin import DarwinAnnotation, read_darwin
from magsd.data.record import MaskKind, Record
from magsd.data.sources.base import FileSource, Options, merge_patients
from magsd.data.sources.files import find_files, find_images
from magsd.data.sources.names import PATIENT_IN_NAME
from magsd.errors import DataError

_log = logging.getLogger(__name__)
_WHERE = (
    "the V7 COVID-19 X-ray set is to be had from https://github.com/v7labs/covid-19-xray-dataset"
)

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

    Of an export with releases/NAME/annotations those of one release are read: option ``release``,
    else "latest", else the only one. An annotation's image is the one named in it, in its folder
    where several have that name, or else the one of its own stem. Class from the tags, lungs from
    the polygons, patient from the tag "PatientID:N" or from names such as person1_virus_6.jpeg and
    IM-0115-0001.jpeg. Images without a class tag are left out, with a warning that counts them.
    """

    options: ClassVar[Options] = {"release": ()}

    def __init__(
        self,
        folder: Path,
        *,
        classes: Sequence[str] | None = None,
        limit: int | None = None,
        release: str = "",
    ) -> None:
        self.spec = f"v7:{folder}" + (f",release={release}" if release else "")
        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder; {_WHERE}")
        place = _release_folder(folder, release)
        annotations = [read_darwin(path) for path in find_files(place, frozenset({".json"}))]
        if not annotations:
            raise DataError(f"{place}: no annotations (*.json) found; {_WHERE}")
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
            identities.append(annotation.patients + _patients_in_names(annotation))
        if untagged:
            _log.warning("%s: %d images without a class tag are left out", folder, untagged)
        return records, identities

    def mask_path(self, record: Record) -> Path | None:
        """The annotation's file."""
        return self._annotations[record.key].path

    def read_mask(self, record: Record) -> NDArray[np.bool_] | None:
        """The lungs, or None where there are none or where the image was cropped."""
        if record.mask_kind is None:
            return None
        return self._annotations[record.key].lung_mask(*self._upright_size(record))


def class_of(annotation: DarwinAnnotation) -> str | None:
    """The class that the tags name, or None."""
    return next((name for tag, name in CLASS_OF_TAG.items() if tag in annotation.tags), None)


def _patients_in_names(annotation: DarwinAnnotation) -> tuple[str, ...]:
    found = (PATIENT_IN_NAME.match(PurePosixPath(name).name) for name in annotation.names)
    return tuple(match[1] or match[2] for match in found if match)


def _release_folder(folder: Path, release: str) -> Path:
    """Where the annotations are: those of a release, or the whole folder where there is none."""
    releases = folder / "releases"
    if not releases.is_dir():
        if release:
            raise DataError(f"{folder}: release={release}: no folder releases there")
        return folder
    names = sorted(path.name for path in releases.iterdir() if path.is_dir())
    if not release:
        release = "latest" if "latest" in names or len(names) != 1 else names[0]
    if release not in names:
        raise DataError(
            f"{releases}: no release {release!r}; choose one by release=:"
            f" {', '.join(names) or 'there is none'}"
        )
    place = releases / release
    # "latest" may be a link: annotations are named by where they are.
    return (place / "annotations" if (place / "annotations").is_dir() else place).resolve()


class _ImageIndex:
    """Images of a folder by file name and by stem."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._by_name: dict[str, list[Path]] = {}
        self._by_stem: dict[str, list[Path]] = {}
        images = folder / "images"  # beside it, an export may hold masks of the same names
        for path in find_images(images if images.is_dir() else folder):
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
            name = names[0] if names else f"{annotation.path.stem}.png"
            return self._folder / annotation.folder / name
        if len(paths) > 1:
            ending = f"/{annotation.folder}"
            paths = [p for p in paths if p.parent.as_posix().endswith(ending)] or paths
        if len(paths) > 1:
            raise DataError(
                f"{annotation.path}: its image may be {paths[0]} or {paths[1]}; names must differ"
            )
        return paths[0]
