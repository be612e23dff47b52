"""What several commands share: their configuration, and their console."""

from __future__ import annotations

import csv
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from magsd.console import say
from magsd.errors import ConfigError, DataError, UnknownLabelError
from magsd.outputs import check_file, has_json

if TYPE_CHECKING:
    from rich.console import Console

    from magsd.config import Config
    from magsd.data import ImageCache
    from magsd.data.record import Side
    from magsd.training.run import LoadedRun

SOURCES = (
    "folder:DIR, csv:FILE, phantom[:n=..,seed=..,size=..], or a public set (docs/data.md): v7:DIR, "
    "nih:DIR, cohen:DIR, covidx:DIR, cub:DIR, aircraft:DIR, cars:DIR, dogs:DIR; or shards:PATTERN"
)
DataOption = Annotated[
    str | None,
    typer.Option(
        metavar="SOURCE", help=f"Images: {SOURCES}. The run's own, or none: its test images."
    ),
]
ClassesOption = Annotated[
    str | None,
    typer.Option(
        metavar="'THEIRS=OURS,...'",
        help="Labels of SOURCE to classes of the run; 'theirs=' leaves images out.",
    ),
]


def training_config(
    overrides: list[str],
    config: str | None,
    data: str | None,
    kernels: str | None,
    base: Config | None = None,
) -> Config:
    """What `magsd train` uses: `base` or the published recipe, the file, then single values.

    Without a file, drawn images are trained on as the packaged phantom configuration says; they are
    also what is taken where nothing names a source.
    """
    from magsd.config import load_config

    values = list(overrides)
    if data is not None:
        values.append(f"data.source={data}")
    if base is None:
        config = configuration_file(config, values)
    if kernels is not None:
        values.append(f"train.kernels={kernels}")
    return load_config(config, values, base=base)


def configuration_file(config: str | None, overrides: list[str]) -> str | None:
    """`config`; without one, the packaged phantom configuration for drawn images, else None."""
    from magsd.config import named_source

    source = named_source(overrides)
    drawn = source is None or source.startswith("phantom")
    return "phantom" if config is None and drawn else config


def select_images(
    console: Console, loaded: LoadedRun, data: str | None, names: str | None = None
) -> tuple[ImageCache, list[int], Side | None]:
    """Images that a run's model is measured on: cache, rows, and the side of the run that they are.

    names: the value of --classes. Of the run's own source, or without any, its test images, or its
    validation images where it has no test side; of another source all. Says which they are, and
    warns of names that the run was trained on. Raises `DataError` for shards, which are read once
    and in their own order.
    """
    from magsd.data.run_data import open_images
    from magsd.data.run_sides import meant_images, open_side
    from magsd.data.shards import is_shards

    spec, side = meant_images(loaded.config, loaded.folder.split, data)
    if is_shards(spec):
        raise DataError(f"{spec}: shards hold no masks; name another source: --data SOURCE")
    if side is not None:
        if names is not None:
            raise ConfigError("--classes is for other sources than the run's own")
        cache, indices = open_side(loaded.config, spec, loaded.folder.split, loaded.classes, side)
        what = f"{side} images of the run's own source"
        what += ", on which the epoch was selected" if side == "validation" else ""
    else:
        given = class_names(names, loaded.classes)
        try:
            _, cache = open_images(loaded.config, spec, classes=loaded.classes, names=given)
        except UnknownLabelError as error:
            raise DataError(
                f"{error}; or map them: --classes 'THEIRS=OURS,THEIRS=OURS'; 'THEIRS='"
                " leaves images out"
            ) from error
        indices, what = list(range(len(cache.records))), f"images of {spec}"
        _warn_of_known(console, loaded, (record.key for record in cache.records))
    report_bad(console, cache.bad)
    say(console, f"epoch {loaded.epoch} of {loaded.folder.root}: {len(indices)} {what}")
    return cache, indices, side


def warn_of_shards(console: Console, loaded: LoadedRun, spec: str, side: Side | None) -> None:
    """Warn of shards that are not a run's own side and that it trained on or was selected on."""
    from magsd.data.shards import open_shards

    if side is None:
        urls = (shard.url for shard in open_shards(spec, classes=loaded.classes).shards)
        _warn_of_known(console, loaded, (url.rpartition("/")[2] for url in urls))


def _warn_of_known(console: Console, loaded: LoadedRun, keys: Iterable[str]) -> None:
    from magsd.data.run_sides import developed_on

    seen = developed_on(loaded.folder.split).intersection(keys)
    if seen:
        say(
            console,
            f"{len(seen)} of them have names that the run trained on or was selected on, e.g. "
            f"{min(seen)}; the figures may flatter",
            first="warning:",
        )


def class_names(text: str | None, classes: Sequence[str]) -> dict[str, str]:
    """Label of a source -> class of the run, from "theirs=ours,..."; quotes may hold commas.

    Raises `ConfigError` for a part without =, a name that is given twice, and a class that the run
    does not have.
    """
    names: dict[str, str] = {}
    for part in next(csv.reader([text or ""]), []):
        theirs, equals, ours = (word.strip() for word in part.partition("="))
        if not equals or theirs in names or (ours and ours not in classes):
            raise ConfigError(
                f"--classes {text}: {part!r}: expected THEIRS=OURS, each of theirs once, ours of"
                f" {', '.join(classes)}"
            )
        names[theirs] = ours
    return names


def check_json_file(path: Path | None, *keys: str) -> None:
    """Raise RunError, before long work, where a report cannot be written, or another file is there.

    keys: what a report of the command holds.
    """
    if path is not None:
        check_file(path, "--json", is_own=lambda file: has_json(file, *keys))


def check_predictions_file(path: Path | None) -> None:
    """Raise RunError, before long work, where no predictions can be written to a file."""
    if path is not None:
        from magsd.reporting.predictions import is_predictions

        check_file(path, "--predictions", is_own=is_predictions)


def report_bad(console: Console, bad: list[tuple[str, str]]) -> None:
    """Name the images that were left out, and why; the first ten of them."""
    if not bad:
        return
    say(console, f"left out {len(bad)} images that cannot be read:")
    for key, reason in bad[:10]:
        say(console, f"  {key}: {reason}")


def make_console(*, quiet: bool = False) -> Console:
    """A console as wide as the terminal, or 120 columns where there is none."""
    from rich.console import Console

    # Files and pipes have no width of their own; rich would break tables at 80 columns.
    known = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(width=None if known else 120, quiet=quiet)
