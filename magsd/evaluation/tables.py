"""An evaluation's report as tables for the terminal."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from magsd.evaluation.localization.scores import (
    MEASURES,
    GroupScores,
    Localization,
    LocalizationReport,
    LocalizationScore,
)
from magsd.evaluation.metrics import AVERAGED, Metrics
from magsd.reporting.measures import most_confused

if TYPE_CHECKING:
    from magsd.evaluation.predict import Prediction

HEADINGS = {
    "accuracy": "accuracy",
    "top5_accuracy": "top-5 accuracy",
    "precision": "precision",
    "recall": "recall",
    "f1": "F1",
    "specificity": "specificity",
    "false_positive_rate": "false-positive rate",
    "auroc": "AUROC",
}


# A value by which rows are chosen, and the row's cells.
_Row = tuple[float, list[Text | str]]
# Of more classes a table shows those with the lowest and those with the highest values.
_MOST_ROWS, _LOWEST, _HIGHEST = 20, 10, 5
_PAIRS = 10
_TOP = 5


def report_tables(
    console: Console,
    options: ConsoleOptions,
    classes: Sequence[str],
    raw: Metrics,
    refined: Metrics | None,
    localization: Localization | None,
) -> Iterator[RenderableType]:
    """Means, classes, confusion and, where there are masks, localization.

    A confusion matrix wider than the console is replaced by the pairs of classes that are most
    confused, and by the name of its file.
    """
    best = refined or raw
    kind = "raw + refined logits" if refined else "raw logits"
    yield means_table(raw, refined)
    yield classes_table(best, f"By class ({kind})")
    fits = False
    if len(classes) <= _MOST_ROWS:
        matrix = confusion_table(best, classes, f"Confusion ({kind})")
        unbounded = options.update(max_width=10**6)
        fits = Measurement.get(console, unbounded, matrix).minimum <= options.max_width
    yield matrix if fits else pairs_table(best, classes, f"Most confused ({kind})")
    if localization is not None:
        yield localization_table(localization)
    if not fits:
        name = "confusion_refined.csv" if refined else "confusion.csv"
        yield Text(f"all numbers: {name} and per_class.csv, beside the plots")


def means_table(raw: Metrics, refined: Metrics | None) -> Table:
    """Accuracy and macro means, a column for each kind of logits."""
    table = new_table(f"{raw.images} images, means over classes", ["raw"])
    if refined is not None:
        table.add_column("raw + refined", justify="right")
    for name, heading in HEADINGS.items():
        values = [getattr(m, name) for m in (raw, refined) if m is not None]
        if None not in values:
            table.add_row(heading, *map(percent, values))
    return table


def classes_table(metrics: Metrics, title: str) -> Table:
    """One row a class, against the rest; of many classes the lowest and the highest F1.

    These have long names as a rule: columns that say little about one of many classes are left out.
    """
    columns = AVERAGED
    if len(metrics.per_class) > _MOST_ROWS:
        columns = ("precision", "recall", "f1", "auroc")
    table = new_table(title, ["images", *(HEADINGS[name] for name in columns)])
    rows: list[_Row] = []
    for name, scores in metrics.per_class.items():
        values = [percent(getattr(scores, column)) for column in columns]
        rows.append((scores.f1, [Text(name), str(scores.images), *values]))
    _add_classes(table, rows, "F1")
    return table


def confusion_table(metrics: Metrics, classes: Sequence[str], title: str) -> Table:
    """Rows are the true classes, columns the predicted ones."""
    table = new_table(title, list(classes), first="true \\ predicted")
    for k, (name, row) in enumerate(zip(classes, metrics.confusion, strict=True)):
        cells = [f"[bold]{n}[/]" if j == k else str(n) for j, n in enumerate(row)]
        table.add_row(Text(name), *cells)
    return table


def pairs_table(metrics: Metrics, classes: Sequence[str], title: str) -> Table:
    """True and predicted class of the pairs that most images fell into; share: of the true."""
    table = Table(title=title, title_justify="left", title_style="bold")
    for heading in ("true", "predicted"):
        table.add_column(heading, overflow="fold")
    for heading in ("images", "share"):
        table.add_column(heading, justify="right")
    for true, predicted, count, share in most_confused(metrics.confusion, _PAIRS):
        table.add_row(Text(classes[true]), Text(classes[predicted]), str(count), percent(share))
    return table


def localization_table(localization: Localization) -> Table:
    """Share of the attention inside the masks against that of a uniform map."""
    table = new_table(
        "Attention inside the masks", ["images", "attention", "uniform map", "ratio", "left out"]
    )
    rows: list[_Row] = [
        (score.gain, [Text(name), *_score_cells(score)])
        for name, score in localization.per_class.items()
    ]
    _add_classes(table, rows, "ratio")
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
    rows: list[_Row] = [
        (
            group.means.values["inside"] if group.means else math.nan,
            [Text(name), *_group_cells(group)],
        )
        for name, group in report.per_class.items()
    ]
    _add_classes(table, rows, MEASURES["inside"])
    table.add_section()
    table.add_row("all", *_group_cells(report.overall))
    return table


def predictions_table(
    predictions: Sequence[Prediction], classes: Sequence[str], width: int
) -> Table:
    """Probabilities of each image: of all classes where they fit, else of the five likeliest.

    Findings, where there are any to tell, have a column of their own.
    """
    table = Table()
    table.add_column("image", overflow="fold")
    # Some 30 columns are left for the names of files.
    whole = sum(max(cell_len(name), 5) + 3 for name in classes) <= width - 30
    if whole:
        for name in classes:
            table.add_column(Text(name), justify="right")
    else:
        table.add_column("class", overflow="fold")
        table.add_column("probability", justify="right")
    if any(prediction.findings is not None for prediction in predictions):
        table.add_column("findings", overflow="fold")
    table.add_column("overlay", overflow="fold")
    for prediction in predictions:
        image, last = Text(str(prediction.path)), [Text(str(prediction.overlay or ""))]
        if prediction.findings is not None:
            last.insert(0, Text(_findings(prediction)))
        values = prediction.probabilities
        if whole:
            cells = [
                f"[bold]{value:.3f}[/]" if name == prediction.label else f"{value:.3f}"
                for name, value in values.items()
            ]
            table.add_row(image, *cells, *last)
            continue
        for k, name in enumerate(heapq.nlargest(_TOP, values, key=values.__getitem__)):
            first, rest = (image, last) if k == 0 else ("", [Text("")] * len(last))
            table.add_row(first, Text(name), f"{values[name]:.3f}", *rest)
        table.add_section()
    return table


def _findings(prediction: Prediction) -> str:
    """The likeliest of the findings, and how many there are besides."""
    found, likely = prediction.findings or (), prediction.calibrated or {}
    shown = heapq.nlargest(_TOP, found, key=likely.__getitem__)
    more = [f"{len(found) - _TOP} more"] if len(found) > _TOP else []
    return ", ".join([*shown, *more]) or "-"


def _add_classes(table: Table, rows: list[_Row], measure: str) -> None:
    """Add all rows; of many those with the lowest and the highest values, as the title says."""
    low, high = rows, rows[:0]
    if len(rows) > _MOST_ROWS:
        known = sorted((row for row in rows if not math.isnan(row[0])), key=lambda row: row[0])
        low, high = known[:_LOWEST], known[_LOWEST:][-_HIGHEST:]
        table.title = f"{table.title}: lowest and highest {measure} of {len(rows)} classes"
    for group in (low, high):
        for _, cells in group:
            table.add_row(*cells)
        if high:
            table.add_section()


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
    table.add_column(first, overflow="fold")
    for name in columns:
        table.add_column(Text(name), justify="right")
    return table
