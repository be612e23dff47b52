"""The command `magsd evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from magsd.cli.common import (
    ClassesOption,
    DataOption,
    check_json_file,
    check_predictions_file,
    make_console,
    select_images,
    warn_of_shards,
)
from magsd.cli.ensembles import TtaOption, evaluate_together, runs_first, tta_of, warn_of_mirrors
from magsd.console import say
from magsd.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from magsd.data import Record
    from magsd.data.record import Side
    from magsd.evaluation import EvaluationReport
    from magsd.training.run import LoadedRun


def evaluate(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN... [KEY=VALUE]...",
            help="Folders of runs, whose mean is taken; then e.g. train.device=cpu.",
        ),
    ],
    data: DataOption = None,
    classes: ClassesOption = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the report as JSON.")
    ] = None,
    predictions: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a CSV with a row for each image.")
    ] = None,
    plots: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Where PNGs go; default a folder under RUN/plots, of several runs none.",
        ),
    ] = None,
    tta: TtaOption = None,
) -> None:
    """Measure a run's best model, or the mean of several: logits, and attention inside masks."""
    from magsd.outputs import check_folder, disk_errors, has_mark, write_text
    from magsd.reporting.predictions import write_predictions
    from magsd.training.report import PLOTS, draw_confusion, report_json
    from magsd.training.run import load_run
    from magsd.training.run_folder import RunFolder
    from magsd.training.run_predictions import predictions_table

    runs, pairs = runs_first(words)
    for word in pairs:
        if "=" not in word:
            RunFolder(word).require_run()
    mirrored = tta_of(tta)
    check_json_file(json_file, "classes", "raw")
    check_predictions_file(predictions)
    if predictions is not None:
        place = predictions.resolve()
        if json_file is not None and json_file.resolve() == place:
            raise ConfigError(f"--json and --predictions both name {predictions}")
        if place in {RunFolder(run).predictions.resolve() for run in runs}:
            raise ConfigError(f"--predictions {predictions}: a run keeps its own there")
    if plots is not None:
        check_folder(
            plots,
            "--plots",
            writes=PLOTS,
            is_own=lambda folder: has_mark(folder / PLOTS[0]),
        )
    elif len(runs) == 1:
        check_folder(RunFolder(runs[0]).plots, "plots:")
    console = make_console()
    loaded, *others = [load_run(run, overrides=tuple(pairs)) for run in runs]
    if mirrored:
        warn_of_mirrors(console, [loaded, *others])
    if others:
        report, records, side = evaluate_together(
            console, [loaded, *others], data, classes, mirrored
        )
    else:
        report, records, side = _evaluate(console, loaded, data, classes, mirrored)
    # Before the tables, which a pipe may end.
    if json_file is not None:
        write_text(json_file, report_json(report, side or "external"))
    if predictions is not None:
        write_predictions(predictions, predictions_table(report, records, side or "external"))
    console.print(report)
    if others and plots is None:
        return
    name = side or "evaluation"
    folder = plots or loaded.folder.plots / (f"{name}-{tta}" if tta else name)
    with disk_errors(folder, "free some space and run the command again"):
        draw_confusion(report, folder)
    say(console, f"plots: {folder}")


def _evaluate(
    console: Console,
    loaded: LoadedRun,
    data: str | None,
    classes: str | None,
    tta: Literal["flip"] | None,
) -> tuple[EvaluationReport, Sequence[Record], Side | None]:
    """Report on one run's model, the records of its images, and the side of the run they are."""
    from magsd.data.run_sides import meant_images
    from magsd.data.shards import is_shards
    from magsd.training.report import evaluate_run, evaluate_shards, shard_records

    spec, side = meant_images(loaded.config, loaded.folder.split, data)
    if is_shards(spec):
        if classes is not None:
            raise ConfigError("--classes: shards have the labels of their index")
        say(console, f"epoch {loaded.epoch} of {loaded.folder.root}: {spec}")
        warn_of_shards(console, loaded, spec, side)
        report = evaluate_shards(loaded, spec, tta=tta)
        return report, shard_records(loaded, spec, report), side
    cache, indices, side = select_images(console, loaded, data, classes)
    report = evaluate_run(loaded, cache, indices, tta=tta)
    return report, [cache.records[index] for index in report.predictions.indices], side
