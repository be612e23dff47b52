"""Sources of images, opened by a short string."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from magsd.data.sources.base import FileSource, Options, Source
from magsd.data.sources.birds import CubSource
from magsd.data.sources.cohen import CohenSource
from magsd.data.sources.covidx import CovidxSource
from magsd.data.sources.darwin import DarwinSource
from magsd.data.sources.dogs import DogsSource
from magsd.data.sources.folder import FolderSource
from magsd.data.sources.nih import NihSource
from magsd.data.sources.phantom import PhantomSource
from magsd.data.sources.published import PublishedSource
from magsd.data.sources.table import TableSource
from magsd.data.sources.vehicles import AircraftSource, CarsSource
from magsd.errors import DataError
from magsd.paths import expand

__all__ = [
    "DarwinSource",
    "FolderSource",
    "PhantomSource",
    "PublishedSource",
    "Source",
    "TableSource",
    "open_source",
]

_PUBLISHED: tuple[type[PublishedSource], ...] = (
    NihSource, CohenSource, CovidxSource, CubSource, AircraftSource, CarsSource, DogsSource,
)  # fmt: skip
_FILES: dict[str, Any] = {
    "folder": FolderSource,
    "csv": TableSource,
    "v7": DarwinSource,
    **{source.kind: source for source in _PUBLISHED},
}


def open_source(
    spec: str,
    *,
    classes: Sequence[str] | None = None,
    limit: int | None = None,
    skip_bad: bool = False,
) -> Source:
    """Open the images that `spec` names.

    spec: ``folder:DIR`` (one subfolder per class), ``csv:FILE`` (columns file, label and optional
        patient, mask), ``v7:DIR`` (images with Darwin JSON), a public set in its published layout
        (``cub:DIR`` and others, see docs/data.md), ``phantom`` or
        ``phantom:n=480,seed=0,size=224`` (drawn). Options follow a path as ``,name=value``.
    classes: the classes that labels must come from, in the order of a model's outputs; None
        takes those found, sorted.
    limit: keep at most so many images, taken in turn from every class.
    skip_bad: warn of what cannot be used, such as a class without images, where an error would tell
        of it.

    Raises DataError where the spec, a file or a label is not usable.
    """
    kind, _, rest = spec.partition(":")
    if kind == "phantom":
        return PhantomSource(rest, classes=classes, limit=limit)
    if kind == "shards":
        raise DataError(
            f"{spec}: shards are streamed by `magsd train` and `magsd evaluate` alone, which take"
            " data.source and data.validation, or --data"
        )
    if kind not in _FILES or not rest:
        places = ", ".join(f"{name}:{'FILE' if name == 'csv' else 'DIR'}" for name in _FILES)
        raise DataError(f"data source {spec!r} is not known; use {places} or phantom")
    place, options = _split_options(kind, rest, _FILES[kind].options)
    path = expand(place)
    if not os.path.exists(path) and not path.is_absolute():
        raise DataError(f"{path}: no such file or folder in the current folder, {os.getcwd()}")
    more = {"skip_bad": skip_bad} if _FILES[kind].takes_skip_bad else {}
    source: FileSource = _FILES[kind](path, classes=classes, limit=limit, **options, **more)
    return source


def _split_options(kind: str, rest: str, known: Options) -> tuple[str, dict[str, str]]:
    """The path, and the options that follow it as ``,name=value``."""
    options: dict[str, str] = {}
    if "\0" in rest:
        raise DataError(f"data source {kind}:{rest!r}: a path holds no NUL")
    # A path may hold commas and equals signs itself.
    while "=" in rest.rpartition(",")[2] and "," in rest and not os.path.exists(expand(rest)):
        rest, _, part = rest.rpartition(",")
        name, _, value = part.partition("=")
        if name not in known:
            names = ", ".join(known) or "none"
            raise DataError(f"{kind}: the option {name!r} is not known; it has {names}")
        if known[name] and value not in known[name]:
            raise DataError(f"{kind}: {name}={value}: expected {' or '.join(known[name])}")
        options[name] = value
    return rest, options
