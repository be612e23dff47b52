"""Patients instead of images, and measures by the columns of a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from magsd.reporting.bootstrap import DEFAULT, Resampling
from magsd.reporting.estimates import Estimates
from magsd.reporting.predictions import Kind, PredictionTable

#: The group of the rows whose cell is empty.
NONE = "(none)"


@dataclass(frozen=True)
class Aggregate:
    """table: one row a group, its key the group's name. left_out: groups of differing labels.

    left_out_images: how many images these have.
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

    how: the mean of the probabilities of a group's images, or the maximum of each class, divided by
    the sum so that they are probabilities. Groups are within a split; an empty cell is a group of
    its own. Groups whose images have different labels are left out.
    Raises DataError for a column that the table lacks.
    """
    raise NotImplementedError


def subgroups(
    table: PredictionTable,
    column: str,
    edges: Sequence[float] | None = None,
    kind: Kind = "raw",
    resampling: Resampling = DEFAULT,
) -> list[Subgroup]:
    """Measures by "patient", "split", "label" or an extra column.

    Numbers of more than ten different values are cut at `edges`, without these at their quartiles.
    Raises DataError for a column that the table lacks.
    """
    raise NotImplementedError
