"""`folder:DIR`: one subfolder per class."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from magsd.data.images import IMAGE_SUFFIXES
from magsd.data.record import Record
from magsd.data.sources.base import FileSource
from magsd.errors import DataError


class FolderSource(FileSource):
    """Images in DIR/CLASS/..., at any depth; each image is its own patient."""

    def __init__(
        self, folder: Path, *, classes: Sequence[str] | None = None, limit: int | None = None
    ) -> None:
        self.spec = f"folder:{folder}"
        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder")
        records = list(self._find(folder))
        if not records:
            raise DataError(
                f"{folder}: no images found; it must hold one subfolder per class, with files of"
                f" {', '.join(sorted(IMAGE_SUFFIXES))}"
            )
        self._set_records(records, origin=str(folder), classes=classes, limit=limit)

    @staticmethod
    def _find(folder: Path) -> Iterator[Record]:
        for child in sorted(folder.iterdir()):
            if not child.is_dir() or child.name.startswith("."):
                continue
            for path in find_images(child):
                key = path.relative_to(folder).as_posix()
                yield Record(key=key, label=child.name, patient=key, path=path)


def find_images(folder: Path) -> list[Path]:
    """The image files under `folder`, sorted; hidden ones are left out."""
    return find_files(folder, IMAGE_SUFFIXES)


def find_files(folder: Path, suffixes: frozenset[str]) -> list[Path]:
    """The files under `folder` with one of the suffixes, sorted; hidden ones are left out."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in suffixes
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.is_file()
    )
