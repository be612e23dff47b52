"""Sources of images, opened by a short string."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from magsd.data.sources.base import Source
from magsd.data.sources.darwin import DarwinSource
from magsd.data.sources.folder import FolderSource
from magsd.data.sources.phantom import PhantomSource
from magsd.data.sources.table import TableSource
from magsd.errors import DataError

__all__ = [
    "DarwinSource",
    "FolderSource",
    "PhantomSource",
    "Source",
    "TableSource",
    "open_source",
]


def open_source(
    spec: str, *, classes: Sequence[str] | None = None, limit: int | None = None
) -> Source:
    """Open the images that `spec` names.

    spec: ``folder:DIR`` (a class a folder), ``csv:FILE`` (columns file, label and optional
        patient, mask), ``v7:DIR`` (images with Darwin JSON), ``phantom`` or
        ``phantom:n=480,seed=0,size=224`` (drawn).
    classes: the classes that labels must come from, in the order of a model's outputs; None
        takes those found, sorted.
    limit: keep at most so many images, taken in turn from every class.

    Raises DataError where the spec, a file or a label is not usable.
    """
    kind, _, rest = spec.partition(":")
    if kind == "phantom":
        return PhantomSource(rest, classes=classes, limit=limit)
    if kind not in ("folder", "csv", "v7") or not rest:
        raise DataError(
            f"data source {spec!r} is not known; use folder:DIR, csv:FILE, v7:DIR or phantom"
        )
    path = Path(rest).expanduser()
    if kind == "folder":
        return FolderSource(path, classes=classes, limit=limit)
    if kind == "csv":
        return TableSource(path, classes=classes, limit=limit)
    return DarwinSource(path, classes=classes, limit=limit)
