"""An evaluation's report as tables for the terminal."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from rich.markup import escape
from rich.table import Table

from magsd.evaluation.localization.scores import (
    MEASURES,
    GroupScores,
    Localization,
    LocalizationReport,
    LocalizationScore,
)
from magsd.evaluation.metrics import AVERAGED, Metrics

HEADINGS = {
    "accuracy": "accuracy",
    "precision": "precision",
    "recall": "recall",
    "f1": "F1",
    "specificity": "specificity",
    "false_positive_rate": "false-positive rate",
    "auroc": "AUROC",
}


def report_tables(
    classes: Sequence[str],
    raw: Metrics,
    refined: Metrics | None,
    localization: Localization | None,
) -> Iterator[Table]:
    """Means, classes, confusion and, where there are masks, localization."""
    best = refined or raw
    kind = "raw + refined logits" if refined else "raw logits"
    yield means_table(raw, refined)
    yield classes_table(best, f"By class ({kind})")
    yield confusion_table(best, classes, f"Confusion ({kind})")
    if localization is not None:
        yield localization_table(localization)


def means_table(raw: Metrics, refined: Metrics | None) -> Table:
    """Accuracy and macro means, a column for each kind of logits."""
    table = new_table(f"{raw.images} images, means over classes", ["raw"])
    if refined is not None:
        table.add_column("raw + refined", justify="right")
    for name, heading in HEADINGS.items():
        values = [getattr(m, name) for m in (raw, refined) if m is not None]
        table.add_row(heading, *map(percent, values))
    return table


def classes_table(metrics: Metrics, title: str) -> Table:
    """One row a class, against the rest."""
    table = new_table(title, ["images", *(HEADINGS[name] for name in AVERAGED)])
    for name, scores in metrics.per_class.items():
        values = [percent(getattr(scores, column)) for column in AVERAGED]
        table.add_row(escape(name), str(scores.images), *values)
    return table


def confusion_table(metrics: Metrics, classes: Sequence[str], title: str) -> Table:
    """Rows are the true classes, columns the predicted ones."""
    table = new_table(title, list(classes), first="true \\ predicted")
    for k, (name, row) in enumerate(zip(classes, metrics.confusion, strict=True)):
        cells = [f"[bold]{n}[/]" if j == k else str(n) for j, n in enumerate(row)]
        table.add_row(escape(name), *cells)
    return table


def localization_table(localization: Localization) -> Table:
    """Share of the attention inside the masks against that of a uniform map."""
    table = new_table(
        "Attention inside the masks", ["images", "attention", "uniform map", "ratio", "left out"]
    )
    for name, score in localization.per_class.items():
        table.add_row(escape(name), *_score_cells(score))
    table.add_section()
    table.add_row("all", *_score_cells(localization.overall))
    return table


def map_scores_table(report: LocalizationReport) -> Table:
    """What maps reach by class; in brackets a uniform map, or a point without aim."""
    title = f"Maps against masks (boxes from {report.threshold:g} of the maximum"
    title += f", pointing within {report.tolerance:g} pixels)" if report.tolerance else ")"
    table = new_table(title, ["images", "left out", *MEASURES.values()])
    table.caption = "in brackets: a uniform map; pointing: a random point, then the image's center"
    table.caption_justify = "left"
    for name, group in report.per_class.items():
        table.add_row(escape(name), *_group_cells(group))
    table.add_section()
    table.add_row("all", *_group_cells(report.overall))
    return table


def _group_cells(group: GroupScores) -> list[str]:
    counts = [str(group.images), str(group.left_out)]
    means = group.means
    if means is None:
        return [*counts, *["-"] * len(MEASURES)]
    chance = {name: percent(means.uniform[name]) for name in MEASURES}
    chance["pointing"] += f", {percent(means.center)}"
    cells = [f"{percent(means.values[name])} ({chance[name]})" for name in MEASURES]
    return [*counts, *cells]


def percent(value: float) -> str:
    """A share as a percentage with one decimal, or a dash where undefined."""
    return "-" if math.isnan(value) else f"{100 * value:.1f}%"


def _score_cells(score: LocalizationScore) -> list[str]:
    ratio = "-" if math.isnan(score.gain) else f"{score.gain:.2f}"
    return [
        str(score.images),
        percent(score.inside),
        percent(score.uniform),
        ratio,
        str(score.left_out),
    ]


def new_table(title: str, columns: Sequence[str], first: str = "") -> Table:
    """A table of numbers; `first` heads the column of their names."""
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column(first)
    for name in columns:
        table.add_column(escape(name), justify="right")
    return table
