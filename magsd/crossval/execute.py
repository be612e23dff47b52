"""Runs the planned runs one after the other; one that fails does not take the others with it."""

from __future__ import annotations

import contextlib
import gc
import io
import traceback
from collections.abc import Sequence

import torch
from rich.console import Console

from magsd.console import say
from magsd.crossval.plan import PlannedRun
from magsd.crossval.results import Outcome, is_finished, read_result
from magsd.data import open_source
from magsd.errors import MagsdError
from magsd.training.report import finish_run
from magsd.training.run import train_run
from magsd.training.trainer import Interrupted

FAILED = "failed.txt"


def check_images(runs: Sequence[PlannedRun]) -> None:
    """Raises `DataError` where no run could read the images: raised once, not by every run."""
    if not all(run.folder.evaluation.is_file() for run in runs):
        data = runs[0].config.data
        open_source(data.source, skip_bad=data.skip_bad)


def execute(runs: Sequence[PlannedRun], console: Console) -> list[Outcome]:
    """Train and evaluate every run that is not finished; go on with those that were begun.

    A run that fails leaves its reason in `failed.txt` in its folder, and is tried again by the next
    call. Raises `Interrupted` after SIGINT or SIGTERM while a run trains, once its state is saved.
    """
    outcomes = []
    for number, run in enumerate(runs, start=1):
        outcome = _attempt(run, f"{number}/{len(runs)}", console)
        _free_memory()
        if outcome.result is None:
            say(console, outcome.reason, first="failed:", style="red")
        outcomes.append(outcome)
    return outcomes


def _attempt(run: PlannedRun, place: str, console: Console) -> Outcome:
    try:
        finished = is_finished(run)
        before = ": finished before" if finished else ""
        say(console, f"{run.title}{before}", first=place, style="bold")
        if not finished:
            _train(run, console)
        result = read_result(run)
    except Interrupted:
        raise
    except Exception as error:  # whatever it is, the other runs may well succeed
        return Outcome(run, None, _note(run, error))
    (run.folder.root / FAILED).unlink(missing_ok=True)
    return Outcome(run, result)


def _train(run: PlannedRun, console: Console) -> None:
    trained = train_run(run.config, run.folder.root, resume=run.folder.is_run(), console=console)
    # Its tables would bury those of the whole; its files are those of any run.
    finish_run(trained, Console(file=io.StringIO()))


def _note(run: PlannedRun, error: Exception) -> str:
    """Write down why a run failed; returns it in one line."""
    known = isinstance(error, MagsdError)
    lines = str(error).strip().splitlines() or [""]
    reason = " ".join(lines) if known else f"{type(error).__name__}: {lines[0]}"
    details = "" if known else "\n" + "".join(traceback.format_exception(error))
    with contextlib.suppress(OSError):  # a full disk may be what the run failed of
        run.folder.root.mkdir(parents=True, exist_ok=True)
        (run.folder.root / FAILED).write_text(f"{reason}\n{details}", encoding="utf-8")
    return reason


def _free_memory() -> None:
    """Let go of the last run's model before the next is built; models hold reference cycles."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
