"""The command `magsd crossval`."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from magsd.cli.common import SOURCES, configuration_file, make_console
from magsd.console import say
from magsd.errors import ConfigError
from magsd.launch import launched

if TYPE_CHECKING:
    from magsd.crossval.plan import PlannedRun


def crossval(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of all runs and results.")],
    model: Annotated[
        list[str],
        typer.Option(
            metavar="NAME",
            help="A model's name, or a YAML file applied over the configuration; may be repeated. "
            "The others are tested against the first.",
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Override single values, of every model."),
    ] = None,
    data: Annotated[
        str | None, typer.Option(metavar="SOURCE", help=f"Images: {SOURCES}; default phantom.")
    ] = None,
    config: Annotated[
        str | None,
        typer.Option(metavar="F", help="YAML file, or the name of a packaged configuration."),
    ] = None,
    seeds: Annotated[
        str, typer.Option(metavar="N,N", help="Each is another partition and another start.")
    ] = "0",
    folds: Annotated[
        str | None, typer.Option(metavar="N,N", help="Some of the data.folds parts; default all.")
    ] = None,
) -> None:
    """Train and compare models by cross-validation; resumes where an earlier call stopped."""
    from magsd.config import load_config

    if launched():
        raise ConfigError("magsd crossval trains in one process; start it without torchrun")
    pairs = list(overrides or ())
    if data is not None:
        pairs.append(f"data.source={data}")
    base = load_config(configuration_file(config, pairs))
    seed_numbers, fold_numbers = numbers("--seeds", seeds), numbers("--folds", folds)

    # timm, torchvision and the like take seconds: a wrong key raises its error before that.
    from magsd.crossval.plan import plan_runs
    from magsd.crossval.predictions import NAME
    from magsd.outputs import check_file, check_folder, has_columns
    from magsd.reporting.predictions import is_predictions

    check_folder(
        out,
        "--out",
        writes=("results.csv", "summary.csv", "summary.md", "summary.tex", "scores.png"),
        is_own=lambda folder: has_columns(folder / "results.csv", "model", "seed", "fold"),
    )
    runs = plan_runs(
        out, base, model, seeds=seed_numbers or (), folds=fold_numbers, overrides=pairs
    )
    for planned in runs:
        planned.folder.require_apart(planned.config.data.source)
        check_file(planned.folder.root.parent / NAME, "--out", is_own=is_predictions)
    _compare(out, runs)


def _compare(out: Path, runs: list[PlannedRun]) -> None:
    """Train what is planned and not finished, then write and print the comparison.

    Raises `typer.Exit` where training was interrupted or a run failed.
    """
    from magsd.crossval.execute import check_images, execute
    from magsd.crossval.predictions import write_out_of_fold
    from magsd.crossval.report import print_report, write_results, write_summary
    from magsd.crossval.summary import summarize
    from magsd.outputs import disk_errors
    from magsd.training.run_folder import RunFolder
    from magsd.training.trainer import Interrupted

    console = make_console()
    say(console, f"cross-validation: {len(runs)} runs in {out}")
    check_images(runs)
    whole = RunFolder(out)
    whole.lock()  # a second call would take the first one's runs for failed
    try:
        outcomes = execute(runs, console)
        with disk_errors(out, "every run is kept; free some space, give the command again"):
            write_results(out / "results.csv", outcomes)
            summary = summarize(outcomes)
            write_summary(out, summary)
            write_out_of_fold(outcomes)
    except Interrupted as stopped:
        name = signal.Signals(stopped.signum).name
        say(console, f"{name}: the run's state is saved; the same command resumes")
        raise typer.Exit(128 + stopped.signum) from None
    finally:
        whole.unlock()
    print_report(console, outcomes, summary)
    say(console, f"tables and plot: {out}")
    if any(outcome.result is None for outcome in outcomes):
        raise typer.Exit(1)


def numbers(option: str, text: str | None) -> list[int] | None:
    """Whole numbers between commas. Raises `ConfigError`."""
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{option} {text}: expected whole numbers, such as 0,1,2") from None
