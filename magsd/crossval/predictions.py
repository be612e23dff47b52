"""Predictions out of fold: every image once, by the run that did not train on it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from magsd.crossval.plan import PlannedRun
from magsd.crossval.results import Outcome, RunResult
from magsd.errors import DataError
from magsd.reporting.predictions import PredictionTable, read_predictions, write_predictions
from magsd.training.run_predictions import joined

NAME = "predictions.csv"


def write_out_of_fold(outcomes: Sequence[Outcome]) -> list[Path]:
    """Write OUT/MODEL/seedN/predictions.csv from the finished runs of each model and seed.

    The rows of a run are those of the images it is measured on, with its number as column `fold`.
    Returns the paths. Raises `DataError` where a run's predictions are missing or damaged.
    """
    parts: dict[Path, list[PredictionTable]] = {}
    for outcome in outcomes:
        if outcome.result is not None:
            path = outcome.run.folder.root.parent / NAME
            parts.setdefault(path, []).append(_of_fold(outcome.run, outcome.result))
    for path, tables in parts.items():
        _check_apart(path, tables)
        write_predictions(path, joined(tables))
    return list(parts)


def _check_apart(path: Path, tables: Sequence[PredictionTable]) -> None:
    """Raise DataError where folds share images, as those of different partitions do."""
    counts = Counter(key for table in tables for key in table.keys.tolist())
    shared = [key for key, count in counts.items() if count > 1]
    if shared:
        raise DataError(
            f"{path}: {len(shared)} images stand in several folds, the first {shared[0]}: images"
            " were added or removed between the runs; remove the older runs of this seed, or"
            " choose another --out"
        )


def _of_fold(run: PlannedRun, result: RunResult) -> PredictionTable:
    table = read_predictions(run.folder.predictions).side(result.side)
    if set(table.keys.tolist()) != result.measured:
        raise DataError(
            f"{run.folder.predictions}: does not hold the {result.side} images of"
            f" {run.folder.split}; remove it and give the command again"
        )
    others = {("csv_fold" if name == "fold" else name): v for name, v in table.extra.items()}
    return replace(table, extra={**others, "fold": np.full(len(table), str(run.fold))})
