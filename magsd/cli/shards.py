"""The command `magsd shards`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from magsd.cli.common import SOURCES, make_console, training_config
from magsd.console import say
from magsd.errors import ConfigError


def shards(
    data: Annotated[str, typer.Option(metavar="SOURCE", help=f"Images: {SOURCES}.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="A folder without shards.")],
    shard_size: Annotated[
        int, typer.Option(min=1, metavar="N", help="Images of a shard at most.")
    ] = 1000,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...", help="How images are divided, e.g. fold=2 or skip_bad=true."
        ),
    ] = None,
) -> None:
    """Write images as tar shards, train-*.tar, val-*.tar and test-*.tar, to be streamed."""
    from magsd.data import open_source
    from magsd.data.prepare import split_of
    from magsd.data.shards import write_shards
    from magsd.outputs import check_folder, disk_errors

    check_folder(out, "--out")
    settings = training_config(list(overrides or ()), None, data, None)
    if settings.data.test not in ("folds", "none"):
        raise ConfigError(
            f"data.test={settings.data.test}: write shards of that source by a call of their own"
        )
    source = open_source(settings.data.source, skip_bad=settings.data.skip_bad)
    split = split_of(settings, source.records)
    console = make_console()
    with (
        disk_errors(out, "free some space and run the command again"),
        console.status("writing shards") as status,
    ):
        written = write_shards(
            source,
            out,
            split=split,
            shard_size=shard_size,
            seed=settings.data.split_seed,
            skip_bad=settings.data.skip_bad,
            progress=lambda done, total: status.update(f"writing shards: {done}/{total}"),
        )
    say(
        console,
        f"{len(split.train)} training, {len(split.validation)} validation and {len(split.test)} "
        f"test images: {len(written)} shards in {out}",
    )
