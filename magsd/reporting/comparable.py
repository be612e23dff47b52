"""Tables of several models over the same images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from magsd.errors import DataError
from magsd.reporting.predictions import Floats, PredictionTable


def check_comparable(tables: Sequence[PredictionTable], side: str) -> list[PredictionTable]:
    """The rows of a side of every table, in the order of the first table's keys and classes.

    Patients and extra columns may differ; those of the first table then count, with a warning.
    Raises DataError that names what differs: a class that one table has and another lacks, a key
    that is not in both, a label.
    """
    first = tables[0].side(side)
    return [first, *(_aligned(first, table.side(side), side) for table in tables[1:])]


def _aligned(first: PredictionTable, other: PredictionTable, side: str) -> PredictionTable:
    both = f"{first.name} and {other.name} cannot be compared"
    for has, lacks in ((first, other), (other, first)):
        names = [name for name in has.classes if name not in lacks.classes]
        if names:
            raise DataError(f"{both}: {has.name} has the class {names[0]!r}, {lacks.name} has not")
        missing = has.keys[~np.isin(has.keys, lacks.keys)]
        if len(missing):
            raise DataError(
                f"{both}: {len(missing)} of the {len(has)} {side} images of {has.name} are not"
                f" among those of {lacks.name}, the first {missing[0]}; give both the same keys and"
                " splits"
            )
    order = np.argsort(other.keys)[np.searchsorted(np.sort(other.keys), first.keys)]
    other = _with_classes(other.rows(order), first.classes)
    differ = first.labels != other.labels
    if differ.any():
        row = int(differ.argmax())
        raise DataError(
            f"{both}: {int(differ.sum())} images have different labels, the first"
            f" {first.keys[row]}: {first.classes[first.labels[row]]} and"
            f" {first.classes[other.labels[row]]}"
        )
    warnings = other.warnings
    if (first.patients != other.patients).any():
        warnings = (*warnings, f"patients are those of {first.name}; {other.name} has others")
    return replace(other, patients=first.patients, extra=first.extra, warnings=warnings)


def _with_classes(table: PredictionTable, classes: tuple[str, ...]) -> PredictionTable:
    order = [table.classes.index(name) for name in classes]

    def of(values: Floats | None) -> Floats | None:
        return None if values is None else values[:, order]

    return replace(
        table,
        classes=classes,
        labels=np.argsort(order)[table.labels].astype(np.int64),
        probabilities=table.probabilities[:, order],
        logits=of(table.logits),
        refined_probabilities=of(table.refined_probabilities),
        refined_logits=of(table.refined_logits),
    )
