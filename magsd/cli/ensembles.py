"""What `magsd predict` and `magsd evaluate` do with several runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from magsd.cli.common import select_images, warn_of_shards
from magsd.console import say
from magsd.errors import ConfigError, DataError

if TYPE_CHECKING:
    from rich.console import Console

    from magsd.data import Record
    from magsd.data.record import Side
    from magsd.evaluation import EvaluationReport
    from magsd.training.run import LoadedRun

TtaOption = Annotated[
    str | None,
    typer.Option(metavar="flip", help="flip: the mean with the horizontal mirror of each image."),
]


def runs_first(words: Sequence[str]) -> tuple[list[Path], list[str]]:
    """The folders of runs with which a command's words begin, and the other words.

    Raises `RunError` for a first word that is no run and for a folder that is none, `ConfigError`
    for a run that stands twice or after other words.
    """
    from magsd.training.run_folder import RunFolder

    count = 0
    while count < len(words) and RunFolder(words[count]).is_run():
        count += 1
    if not count:
        RunFolder(words[0]).require_run()
    runs, others = [Path(word) for word in words[:count]], list(words[count:])
    places = [run.resolve() for run in runs]
    for run, place in zip(runs, places, strict=True):
        if places.count(place) > 1:
            raise ConfigError(f"{run}: named {places.count(place)} times, and would count as often")
    for word in others:
        if Path(word).is_dir():
            RunFolder(word).require_run()
            raise ConfigError(f"{word}: runs come first, before everything else")
    return runs, others


def tta_of(text: str | None) -> Literal["flip"] | None:
    """The value of --tta. Raises `ConfigError` for another."""
    if text is None:
        return None
    if text != "flip":
        raise ConfigError(f"--tta {text}: expected flip")
    return "flip"


def warn_of_mirrors(console: Console, runs: Sequence[LoadedRun]) -> None:
    """Name the runs that never saw a mirrored image, which --tta flip shows to them."""
    for run in runs:
        augment = run.config.data.augment
        if not (augment.enabled and augment.horizontal_flip):
            what = "was trained without mirrored images, on which its model may be wrong"
            say(console, f"{run.folder.root} {what}", first="warning:")


def evaluate_together(
    console: Console,
    runs: Sequence[LoadedRun],
    data: str | None,
    classes: str | None,
    tta: Literal["flip"] | None,
) -> tuple[EvaluationReport, Sequence[Record], Side | None]:
    """Report on the mean of several runs' models, the records of its images, and their side.

    data, classes: as of `select_images`. Raises `DataError` where the runs report on other images.
    """
    from magsd.data.run_sides import meant_images, same_source
    from magsd.data.shards import is_shards
    from magsd.training.ensemble import ensemble_of, evaluate_runs, evaluate_runs_on_shards
    from magsd.training.report import shard_records

    ensemble_of(runs)  # other classes are told before images are read
    meant = [meant_images(run.config, run.folder.split, data) for run in runs]
    specs = [spec for spec, _ in meant]
    for run, spec in zip(runs, specs, strict=True):  # two sources may have the same keys
        if not same_source(spec, specs[0]):
            raise DataError(
                f"{runs[0].folder.root} and {run.folder.root} are measured on other images "
                f"({specs[0]} and {spec}); name images that neither knows: --data SOURCE"
            )
    if any(is_shards(spec) for spec in specs):
        if classes is not None:
            raise ConfigError("--classes: shards have the labels of their index")
        for run, (spec, side) in zip(runs, meant, strict=True):
            warn_of_shards(console, run, spec, side)
        report = evaluate_runs_on_shards(runs, specs[0], tta=tta)
        records = shard_records(runs[0], specs[0], report)
        sides = {side for _, side in meant}
    else:
        images = [select_images(console, run, data, classes) for run in runs]
        report = evaluate_runs(runs, [each[:2] for each in images], tta=tta)
        records = [images[0][0].records[index] for index in report.predictions.indices]
        sides = {each[2] for each in images}
    say(console, f"mean of {len(runs)} runs: {report.raw.images} images")
    # Where an epoch of any of them was selected on the images, they are no test.
    side = "validation" if "validation" in sides else None
    return report, records, sides.pop() if len(sides) == 1 else side
