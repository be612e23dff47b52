"""Predictions out of fold: every image once, by the run that did not train on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from magsd.crossval.plan import PlannedRun
from magsd.crossval.results import Outcome
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
            parts.setdefault(path, []).append(_of_fold(outcome.run, outcome.result.side))
    for path, tables in parts.items():
        write_predictions(path, joined(tables))
    return list(parts)


def _of_fold(run: PlannedRun, side: str) -> PredictionTable:
    table = read_predictions(run.folder.predictions).side(side)
    others = {("csv_fold" if name == "fold" else name): v for name, v in table.extra.items()}
    return replace(table, extra={**others, "fold": np.full(len(table), str(run.fold))})
