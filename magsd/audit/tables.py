"""An audit as tables for the terminal."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from magsd.evaluation.tables import new_table

if TYPE_CHECKING:
    from magsd.audit.report import AuditReport, CopiedImage
    from magsd.audit.shortcuts import Shortcut

_MOST_PAIRS, _MOST_CLASSES = 20, 20
_STYLES = {"warning": "yellow", "note": ""}


def audit_tables(report: AuditReport) -> Iterator[RenderableType]:
    """Counts, pairs, shortcuts, and what they say."""
    yield _classes(report)
    yield Text(f"sides: {report.sides_origin}")
    if report.pairs:
        yield _pairs(report)
    if report.shortcuts.rows:
        yield _shortcuts(report)
        yield Text(f"image border: all but {report.shortcuts.blanked}")
    for finding in report.findings:
        yield Text.assemble((f"{finding.level}: ", _STYLES[finding.level]), finding.text)


def _classes(report: AuditReport) -> Table:
    columns = ["images", *report.sides, "patients", "images of a patient, median", "most"]
    total = f"{report.images} images of {report.patients.patients} patients"
    table = new_table(total, columns)
    shown = list(report.patients.per_class.items())
    if len(shown) > _MOST_CLASSES:
        table.title = f"{total}: the {_MOST_CLASSES} largest of {len(shown)} classes"
        shown = sorted(shown, key=lambda item: -item[1].images)[:_MOST_CLASSES]
    for name, counts in shown:
        table.add_row(
            Text(name),
            str(counts.images),
            *(str(counts.by_side.get(side, 0)) for side in report.sides),
            str(counts.patients),
            f"{counts.median_images:g}",
            str(counts.most_images),
        )
    return table


def _pairs(report: AuditReport) -> Table:
    title = f"Pairs of images that look the same: {len(report.pairs)}"
    if len(report.pairs) > _MOST_PAIRS:
        title += f", the gravest {_MOST_PAIRS} of them"
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("kind")
    table.add_column("distance", justify="right")
    for heading in ("image", "other image"):
        table.add_column(heading, overflow="fold")
    table.add_column("across")
    for pair in report.pairs[:_MOST_PAIRS]:
        across = [
            name for name in ("sides", "classes", "patients") if getattr(pair, f"across_{name}")
        ]
        table.add_row(
            pair.kind,
            f"{pair.distance:.3f}",
            _image(pair.first),
            _image(pair.second),
            ", ".join(across) or "-",
        )
    return table


def _image(image: CopiedImage) -> Text:
    parts = filter(None, (image.label, image.side, f"patient {image.patient}"))
    return Text(f"{image.key}\n{', '.join(parts)}")


def _shortcuts(report: AuditReport) -> Table:
    shortcuts = report.shortcuts
    title = f"How well the class can be told from these alone ({shortcuts.images} images)"
    several = any(len(row.per_class) > 2 for row in shortcuts.rows)
    table = new_table(title, ["AUROC", *(["highest class"] if several else []), "labels shuffled"])
    table.add_column("verdict")
    for row in shortcuts.rows:
        whole = row.name == row.group
        alone = whole or not any(r.name == row.group for r in shortcuts.rows)
        if whole:
            table.add_section()
        table.add_row(
            Text(row.name if alone else f"  {row.name}"),
            f"{row.auroc:.2f} ± {row.deviation:.2f}",
            *([_highest(row)] if several else []),
            "" if math.isnan(row.permuted) else f"{row.permuted:.2f}",
            Text(row.verdict, "yellow" if row.verdict == "warning" else ""),
        )
    table.caption = (
        f"mean and standard deviation over {shortcuts.folds} folds by patient, each class against"
        " the rest, averaged over classes; 0.5: nothing"
    )
    if several:
        table.caption += ". The verdict is that of the mean or of the highest class, the graver one"
    table.caption_justify = "left"
    return table


def _highest(row: Shortcut) -> Text:
    name = row.highest_class
    if row.per_class[name] <= 0.5:  # none: all are equal
        return Text("")
    return Text(f"{name} {row.per_class[name]:.2f} ± {row.class_deviations[name]:.2f}")
