"""Patients instead of images, and measures by the columns of a table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from magsd.errors import DataError
from magsd.reporting.bootstrap import DEFAULT, Resampling
from magsd.reporting.columns import is_missing
from magsd.reporting.estimates import Estimates, class_counts, estimate
from magsd.reporting.predictions import Floats, Kind, PredictionTable, Text

#: The group of the rows whose cell is empty, and that of the values beyond MOST_GROUPS.
NONE, OTHERS = "(none)", "(others)"
MOST_GROUPS = 20
#: Groups of fewer patients are marked.
SMALL = 10
# Numbers of more different values are cut into bins.
_MOST_NUMBERS = 10


@dataclass(frozen=True)
class Aggregate:
    """table: one row a group, its key the group's name, its patient that of the first image.

    left_out: groups of differing labels. left_out_images: how many images these have.
    """

    table: PredictionTable
    left_out: tuple[str, ...]
    left_out_images: int


@dataclass(frozen=True)
class Subgroup:
    """The rows of one value or bin of a column.

    class_images, class_patients: counts by class. estimates: measures with intervals. small: why
    little can be said of the group (few patients, a class without images), empty if nothing.
    """

    name: str
    images: int
    patients: int
    class_images: dict[str, int]
    class_patients: dict[str, int]
    estimates: Estimates
    small: str


def aggregate(
    table: PredictionTable, by: str = "patient", how: Literal["mean", "max"] = "mean"
) -> Aggregate:
    """One prediction for each patient, or each value of an extra column such as a study.

    how: the mean of the probabilities of a group's images, or the highest of each class, divided by
    their sum so that they are probabilities. Logits are left out. Groups are within a side; an
    empty cell makes a group of its own, named by the image's key. Groups whose images have
    different labels are left out.
    Raises DataError for a column that the table lacks.
    """
    cells = column_of(table, by)
    names = np.where(cells == "", table.keys, cells)
    # An empty cell's image is apart from a group that happens to be named as its key is.
    marks = np.stack([table.splits, names, (cells == "").astype(np.str_)])
    _, first, group = np.unique(marks, axis=1, return_index=True, return_inverse=True)
    group = np.asarray(group).reshape(-1)
    mixed = np.zeros(len(first), dtype=bool)
    mixed[group[table.labels != table.labels[first][group]]] = True

    def of(values: Floats | None) -> Floats | None:
        return None if values is None else _combine(values, group, len(first), how)

    shortened = table.rows(first)
    combined = of(table.probabilities)
    assert combined is not None
    whole = replace(
        shortened,
        keys=names[first],
        probabilities=combined,
        logits=None,
        refined_probabilities=of(table.refined_probabilities),
        refined_logits=None,
    )
    return Aggregate(
        table=whole.rows(~mixed),
        left_out=tuple(names[first][mixed].tolist()),
        left_out_images=int(mixed[group].sum()),
    )


def _combine(values: Floats, group: NDArray[np.int64], count: int, how: str) -> Floats:
    combined: Floats = np.zeros((count, values.shape[1]))
    combine = np.maximum if how == "max" else np.add
    combine.at(combined, group, values)
    combined /= combined.sum(axis=1, keepdims=True)
    return combined


def column_of(table: PredictionTable, column: str) -> Text:
    """Cells (N,) of "patient", "split", "label" or an extra column, without outer spaces.

    Cells of an extra column that hold no value (`magsd.cells.MISSING`) are empty; "none" and "-"
    are values where other cells are no numbers.
    """
    own = {
        "patient": table.patients,
        "split": table.splits,
        "label": np.array(table.classes)[table.labels],
    }
    if column not in own and column not in table.extra:
        raise DataError(
            f"{table.name}: no column {column!r}; it has {', '.join([*own, *table.extra])}"
        )
    if column not in table.extra:
        return np.char.strip(own[column])
    cells: Text = np.char.strip(table.extra[column])
    missing = is_missing(cells)
    if _numbers(np.where(missing, "", cells)) is None:
        missing &= ~np.isin(np.char.lower(cells), ("none", "-"))
    return np.where(missing, "", cells)


def subgroups(
    table: PredictionTable,
    column: str,
    edges: Sequence[float] | None = None,
    kind: Kind = "raw",
    resampling: Resampling = DEFAULT,
) -> list[Subgroup]:
    """Measures by "patient", "split", "label" or an extra column.

    Numbers of more than ten different values are cut at `edges`, without these at their quartiles;
    with `edges`, any numbers are. Otherwise each text is a group; of more than MOST_GROUPS those
    with the fewest images are one group, OTHERS. Rows with an empty cell are a group, too.
    Raises DataError for a column that the table lacks, edges that do not rise, edges for a column
    that has other texts than numbers, and a table without rows.
    """
    if not len(table):
        raise DataError(f"{table.name}: no images here; choose a side that has some")
    names = _group_names(table, column, edges)
    groups = []
    for name in dict.fromkeys(name for name, _ in names):
        mask = np.any([own for other, own in names if other == name], axis=0)
        if mask.any():
            groups.append(_subgroup(table.rows(mask), name, kind, resampling))
    return groups


def _group_names(
    table: PredictionTable, column: str, edges: Sequence[float] | None
) -> list[tuple[str, NDArray[np.bool_]]]:
    """Name and rows (N,) of each group, in their order."""
    cells = column_of(table, column)
    empty = cells == ""
    numbers = _numbers(cells)
    if edges is not None and numbers is None:
        raise _no_numbers(table, column, cells)
    if numbers is not None and (edges is not None or len(np.unique(cells[~empty])) > _MOST_NUMBERS):
        groups = _bins(numbers, _edges(table, column, numbers[~empty], edges))
    else:
        values, counts = np.unique(cells[~empty], return_counts=True)
        kept = values
        if len(values) > MOST_GROUPS:
            kept = np.sort(values[np.argsort(-counts, kind="stable")[: MOST_GROUPS - 1]])
        if numbers is not None:
            kept = kept[np.argsort(kept.astype(np.float64), kind="stable")]
        groups = [(str(value), cells == value) for value in kept]
        groups.append((OTHERS, ~empty & ~np.isin(cells, kept)))
    return [*groups, (NONE, empty)]


def _no_numbers(table: PredictionTable, column: str, cells: Text) -> DataError:
    """What to say of edges for a column that has none, or not only, numbers."""
    start = f"{table.name}: the column {column!r} has edges, but"
    numbers = [_numbers(np.array([cell])) is not None for cell in cells]
    bad = np.flatnonzero(~np.array(numbers) & ~is_missing(cells))
    if not len(bad):
        return DataError(f"{start} only empty cells")
    row = int(bad[0])
    return DataError(
        f"{start} not only numbers: that of {table.keys[row]} is {str(cells[row])!r} ({len(bad)}"
        " such cells); correct or empty them"
    )


def _numbers(cells: Text) -> Floats | None:
    """Cells (N,) as numbers, empty ones NaN; None where some cell is no finite number."""
    empty = cells == ""
    if empty.all():
        return None
    try:
        values = np.where(empty, "nan", cells).astype(np.float64)
    except ValueError:
        return None
    return values if np.isfinite(values[~empty]).all() else None


def _edges(
    table: PredictionTable, column: str, numbers: Floats, edges: Sequence[float] | None
) -> list[float]:
    if edges is None:
        quartiles: list[float] = np.unique(np.quantile(numbers, [0.25, 0.5, 0.75])).tolist()
        return quartiles
    if not edges or any(not low < high for low, high in pairwise(edges)):
        raise DataError(f"{table.name}: the edges {list(edges)} of {column!r} do not rise")
    return [float(edge) for edge in edges]


def _bins(numbers: Floats, edges: list[float]) -> list[tuple[str, NDArray[np.bool_]]]:
    """Bins that hold their lower edge and not their upper one."""
    bounds = [-math.inf, *edges, math.inf]
    groups = []
    for low, high in pairwise(bounds):
        name = f"{_short(low)} to below {_short(high)}"
        if low == -math.inf:
            name = f"below {_short(high)}"
        elif high == math.inf:
            name = f"{_short(low)} and above"
        groups.append((name, (numbers >= low) & (numbers < high)))
    return groups


def _short(number: float) -> str:
    return repr(number).removesuffix(".0")


def _subgroup(table: PredictionTable, name: str, kind: Kind, resampling: Resampling) -> Subgroup:
    class_images, class_patients = class_counts(table)
    reasons = []
    if table.num_patients < SMALL:
        reasons.append(f"fewer than {SMALL} patients")
    lacking = [each for each, count in class_images.items() if not count]
    if lacking:
        reasons.append(f"no images of {', '.join(lacking)}")
    return Subgroup(
        name=name,
        images=len(table),
        patients=table.num_patients,
        class_images=class_images,
        class_patients=class_patients,
        estimates=estimate(table, kind, resampling),
        small="; ".join(reasons),
    )
