"""The tables at a run's end: its accuracy and where things lie, and its operating points."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.table import Table
from rich.text import Text

from magsd.config import Config
from magsd.data.record import Side
from magsd.evaluation import EvaluationReport
from magsd.evaluation.tables import new_table, percent
from magsd.reporting.operating import OperatingPoints
from magsd.reporting.predictions import PredictionTable
from magsd.training.run import TrainedRun

#: What the epoch has to do with the images of a side, for the titles of tables.
SELECTED: dict[Side, str] = {
    "test": "nothing was selected on these images",
    "validation": "the epoch was selected on these images",
}
_MOST_ROWS = 20


def closing_table(
    reports: Mapping[Side, EvaluationReport],
    config: Config,
    trained: TrainedRun,
    sheet: Path | None,
) -> Table:
    """Accuracy, attention against a uniform map, throughput, and where things lie.

    reports: of the validation side, and after it of the test side where there is one.
    """
    side, report = list(reports.items())[-1]
    table = Table(
        title=f"Run, {side} side: {SELECTED[side]}",
        title_justify="left",
        title_style="bold",
        show_header=False,
    )
    table.add_column()
    table.add_column(overflow="fold")
    for name, each in reversed(reports.items()):
        table.add_row(f"{name} accuracy", f"{each.raw.accuracy:.4f}")
        if each.refined is not None:
            table.add_row("  raw + refined logits", f"{each.refined.accuracy:.4f}")
    if report.localization is not None:
        score = report.localization.overall
        table.add_row("attention inside masks", _percent(score.inside))
        table.add_row("  uniform map", f"{_percent(score.uniform)} (ratio {score.gain:.2f})")
    table.add_row("best epoch", f"{trained.best_epoch} of {config.train.epochs}")
    if not math.isnan(trained.images_per_second):
        table.add_row("images/s (training)", f"{trained.images_per_second:.1f}")
    table.add_row("images/s (evaluation)", f"{report.images_per_second:.1f}")
    if sheet is not None:
        table.add_row("overlays", Text(str(sheet)))
    table.add_row("plots", Text(str(trained.folder.plots)))
    table.add_row("predictions", Text(str(trained.folder.predictions)))
    table.add_row("checkpoint", Text(str(trained.folder.best)))
    return table


def operating_table(points: OperatingPoints, table: PredictionTable) -> Table:
    """The threshold of every class, and what it reaches on the sides of a table of predictions.

    Of the refined predictions where there are any. Of more than 20 classes the first are shown.
    """
    kind = table.best
    point = points.of(kind)
    positive = point.positive(points.apply(table).of(kind))
    sides = [side for side in ("validation", "test") if (table.splits == side).any()]
    logits = "raw + refined logits" if kind == "refined" else "raw logits"
    shown = new_table(
        f"Operating points ({logits}): {point.rule}, temperature {point.temperature:.3g}, chosen on"
        " the validation images",
        ["threshold", *(f"{m}, {side}" for side in sides for m in ("sensitivity", "specificity"))],
    )
    for k, (name, threshold) in enumerate(point.thresholds.items()):
        if k == _MOST_ROWS:
            shown.add_row(f"and {len(point.thresholds) - k} more", "see operating.json")
            break
        value = "likeliest" if threshold.value is None else f"{threshold.value:.3f}"
        cells = []
        for side in sides:
            found, of_class = positive[table.splits == side, k], table.labels == k
            truth = of_class[table.splits == side]
            cells += [_share(found[truth]), _share(~found[~truth])]
        shown.add_row(Text(name), value, *cells)
    return shown


def _share(right: NDArray[np.bool_]) -> str:
    return percent(float(right.mean()) if len(right) else math.nan)


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.1%}"
