"""`folder:DIR`: one subfolder per class."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from magsd.data.images import IMAGE_SUFFIXES
from magsd.data.record import Record, Side
from magsd.data.sources.base import FileSource
from magsd.errors import DataError

#: Folders of a published split, and the side on which each stands.
_SIDES: dict[str, Side] = {
    "train": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "validation",
}
#: The patient in the names of the radiographs of children (Kermany et al., 2018).
PATIENT_IN_NAME = re.compile(r"(person\d+)_|((?:NORMAL2-)?IM-\d+)-")
_log = logging.getLogger(__name__)


class FolderSource(FileSource):
    """Images in DIR/CLASS/..., at any depth; each image is its own patient.

    DIR/train/CLASS/..., DIR/val/CLASS/... and DIR/test/CLASS/... are a published split: the images
    of val are validated on, or those of test where there is no val. There names such as
    person1_virus_6.jpeg and IM-0115-0001.jpeg name the patient. What is no image is counted in a
    warning, and so are classes without any.
    """

    def __init__(
        self, folder: Path, *, classes: Sequence[str] | None = None, limit: int | None = None
    ) -> None:
        self.spec = f"folder:{folder}"
        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder")
        sides = _published_sides(folder)
        records = list(_find_split(folder, sides) if sides else _find(folder, folder))
        if not records:
            raise DataError(
                f"{folder}: no images found; it must hold one subfolder per class, with files of"
                f" {', '.join(sorted(IMAGE_SUFFIXES))}"
            )
        self._set_records(records, origin=str(folder), classes=classes, limit=limit)


def _subfolders(folder: Path) -> list[Path]:
    return [p for p in sorted(folder.iterdir()) if p.is_dir() and not p.name.startswith(".")]


def _published_sides(folder: Path) -> dict[Path, Side]:
    """The folders of a split and their sides, if these are all that there is; else nothing."""
    found = {path.name.lower(): path for path in _subfolders(folder)}
    if "train" not in found or len(found) < 2 or not found.keys() <= _SIDES.keys():
        return {}
    if len(found) > 2 and "test" in found:
        test = found.pop("test")
        _log.warning(
            "%s: a published split, validated on %s; the images of %s are left out (evaluate them"
            " with --data folder:%s)",
            folder, " and ".join(sorted(found.keys() - {"train"})), test.name, test,
        )  # fmt: skip
    return {path: _SIDES[name] for name, path in found.items()}


def _find_split(folder: Path, sides: dict[Path, Side]) -> Iterator[Record]:
    for path, side in sides.items():
        for record in _find(path, folder):
            name = PATIENT_IN_NAME.match(Path(record.key).name)
            patient = (name[1] or name[2]) if name else record.key
            yield dataclasses.replace(record, patient=patient, split=side)


def _find(folder: Path, root: Path) -> Iterator[Record]:
    """The images of the classes in a folder, with keys from `root` on."""
    others: Counter[str] = Counter()
    empty = []
    for child in _subfolders(folder):
        labeled = 0
        for path in _visible(child):
            if _is_file_of(path, IMAGE_SUFFIXES):
                labeled += 1
                key = path.relative_to(root).as_posix()
                yield Record(key=key, label=child.name, patient=key, path=path)
            elif not path.is_dir():
                others[path.suffix.lower() or "no suffix"] += 1
        if not labeled:
            empty.append(child.name)
    if others:
        kinds = ", ".join(f"{count} of {kind}" for kind, count in sorted(others.items()))
        _log.warning("%s: files that are no images are left out: %s", folder, kinds)
    if empty:
        _log.warning("%s: no image in the folders of classes %s", folder, ", ".join(empty))


def find_images(folder: Path) -> list[Path]:
    """The image files under `folder`, sorted; hidden ones are left out."""
    return find_files(folder, IMAGE_SUFFIXES)


def find_files(folder: Path, suffixes: frozenset[str]) -> list[Path]:
    """The files under `folder` with one of the suffixes, sorted; hidden ones are left out."""
    return [path for path in _visible(folder) if _is_file_of(path, suffixes)]


def _visible(folder: Path) -> list[Path]:
    """All that lies under a folder, sorted; what is hidden, or in a hidden folder, is left out."""
    return sorted(
        path
        for path in folder.rglob("*")
        if not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def _is_file_of(path: Path, suffixes: frozenset[str]) -> bool:
    return path.suffix.lower() in suffixes and path.is_file()
