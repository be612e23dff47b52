"""What the numbers of an audit say, in sentences."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from magsd.audit.patients import PatientReport
from magsd.audit.shortcuts import ALL, BORDER, COLUMNS, VERDICTS, Shortcut, ShortcutReport, Verdict

if TYPE_CHECKING:
    from magsd.audit.report import CopyPair

_TOGETHER = "size, file, brightness, margins and markers together"
# Of lungs, lines, arms and shoulders, too.
_PARTLY_DISEASE = ("brightness", "margins and markers", ALL, BORDER)


@dataclass(frozen=True)
class Finding:
    """One sentence; a warning is a reason not to trust figures of the set as they are."""

    level: Literal["warning", "note"]
    text: str


def copy_findings(pairs: Sequence[CopyPair]) -> Iterator[Finding]:
    """How many pairs there are, and a warning of each kind that misleads."""
    if not pairs:
        yield Finding("note", "no two images look the same")
        return
    kinds = Counter(pair.kind for pair in pairs)
    counts = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    yield Finding("note", f"pairs of images that look the same: {counts}")
    graver = {
        "sides (a model may be measured on what it was trained on)": [
            pair for pair in pairs if pair.across_sides
        ],
        "classes (a label is wrong, or the classes overlap)": [
            pair for pair in pairs if pair.across_classes
        ],
        "patients (who may be one)": [pair for pair in pairs if pair.across_patients],
    }
    for what, found in graver.items():
        if found:
            first = f"{found[0].first.key} and {found[0].second.key}"
            yield Finding("warning", f"pairs across {what}: {len(found)}; the first: {first}")


def patient_findings(patients: PatientReport) -> Iterator[Finding]:
    """Patients on several sides, a warning, and in several classes."""
    of = f"of {patients.patients}"
    if sides := patients.on_several_sides:
        text = f"patients on several sides: {len(sides)} {of} (their images are alike, so figures"
        yield Finding("warning", f"{text} flatter); the first: {next(iter(sides))}")
    if classes := patients.in_several_classes:
        text = f"patients in several classes: {len(classes)} {of}; the first: {next(iter(classes))}"
        yield Finding("note", text)


def shortcut_findings(shortcuts: ShortcutReport) -> Iterator[Finding]:
    """What tells the class, a warning; what does a little, or may; or that nothing does."""
    if shortcuts.note:
        yield Finding("note", f"shortcuts: {shortcuts.note}")
    if shortcuts.left_out:
        names = ", ".join(shortcuts.left_out[:10])
        yield Finding("note", f"shortcuts: classes with too few patients left out: {names}")
    for row in _told(shortcuts.rows, "warning"):
        yield Finding("warning", _warning(row))
    if weak := _told(shortcuts.rows, "says a little"):
        text = f"the class can be told a little from: {', '.join(map(_brief, weak))}"
        yield Finding("note", text)
    if open_ := _told(shortcuts.rows, "too few images to say"):
        text = (
            f"too few images to say whether these tell the class: {', '.join(map(_brief, open_))}"
        )
        yield Finding("note", text)
    if shortcuts.rows and all(row.verdict == "says nothing" for row in shortcuts.rows):
        yield Finding("note", "no shortcut found: none of the measured features tells the class")


def _told(rows: Sequence[Shortcut], verdict: Verdict) -> list[Shortcut]:
    """Rows of a verdict. Of a group and its features one stands for the other.

    That is the group; of columns of the table, which have nothing in common, the columns.
    """
    grave = {row.name: VERDICTS.index(row.verdict) for row in rows}
    parts = [row for row in rows if row.group == COLUMNS and row.name != COLUMNS]
    worst_column = max((grave[row.name] for row in parts), default=-1)

    def stands(row: Shortcut) -> bool:
        if row.name == COLUMNS:
            return grave[COLUMNS] > worst_column
        if row.group == COLUMNS or row.name == row.group:
            return True
        return grave[row.name] > grave.get(row.group, -1)

    return [row for row in rows if row.verdict == verdict and stands(row)]


def _warning(row: Shortcut) -> str:
    who, figures = "the class", f"AUROC {row.auroc:.2f}"
    if len(row.per_class) > 2:
        who = f"class {row.highest_class}"
        highest = row.per_class[row.highest_class]
        mean = f"mean of {len(row.per_class)} classes {row.auroc:.2f}"
        figures = f"AUROC {highest:.2f} against the rest; {mean}"
    if row.group == COLUMNS:
        goes = "the columns of the table go" if row.name == COLUMNS else f"{row.name} goes"
        return f"{goes} with {who} ({figures}): a confounder, or the label in other words"
    what = _TOGETHER if row.name == ALL else f"the {row.name} alone"
    text = (
        f"{who} can be told from {what} ({figures}); a model may learn this instead of the disease"
    )
    return f"{text}; some of it may be the disease" if row.group in _PARTLY_DISEASE else text


def _brief(row: Shortcut) -> str:
    name = _TOGETHER if row.name == ALL else row.name
    if len(row.per_class) <= 2:
        return f"{name} ({row.auroc:.2f})"
    return f"{name} ({row.highest_class} {row.per_class[row.highest_class]:.2f})"
