"""All that a report says in numbers, of every model, from tables of predictions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from magsd.errors import DataError
from magsd.reporting.bootstrap import Interval, Resampling
from magsd.reporting.calibration import Bin, class_reliability, reliability
from magsd.reporting.comparable import check_comparable
from magsd.reporting.decisions import (
    DecisionCurve,
    ThresholdMeasures,
    decision_curve,
    measure_thresholds,
)
from magsd.reporting.estimates import Comparison, Estimates, compare, estimate
from magsd.reporting.groups import Subgroup, aggregate, column_of, subgroups
from magsd.reporting.operating import (
    OperatingPoint,
    OperatingPoints,
    fit_operating_points,
    read_operating_points,
)
from magsd.reporting.page.curves import ClassCurves, class_curves
from magsd.reporting.page.inputs import Facts, Input, count_sides, facts_of
from magsd.reporting.predictions import Kind, PredictionTable, read_predictions
from magsd.reporting.rules import Rule

#: Sides in the order in which one is chosen to be reported.
REPORTED = ("test", "external", "validation")
#: Charts of a class each are drawn of at most so many, those of the lowest AUROC.
DRAWN = 15
CALIBRATION = ("nll", "brier", "ece")
# Columns of more values are no groups unless they are asked for.
_MOST_GROUPS, _MOST_COLUMNS = 10, 6


@dataclass(frozen=True)
class Options:
    """How a report is made.

    rule: of the thresholds; None takes that of operating.json, without one Youden's. aggregate: of
    the images of a patient, or of those that share `aggregate_by`, a column such as a study.
    subgroups: columns, each with edges after "=" for numbers; None chooses extra columns of two to
    ten values.
    """

    rule: Rule | None = None
    resampling: Resampling = field(default_factory=Resampling)
    aggregate: Literal["mean", "max"] = "mean"
    aggregate_by: str = "patient"
    subgroups: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Calibration:
    """Before and after the temperature, on the reported images.

    before, after: measure of CALIBRATION -> interval. bins: of the predicted class, before and
    after. class_bins: the same of the classes that are drawn.
    """

    before: dict[str, Interval]
    after: dict[str, Interval]
    bins: tuple[list[Bin], list[Bin]]
    class_bins: dict[str, tuple[list[Bin], list[Bin]]]


@dataclass(frozen=True)
class Patients:
    """Results by patient; left_out: patients whose images have different labels."""

    estimates: Estimates
    left_out: int
    left_out_images: int


@dataclass(frozen=True)
class ModelReport:
    """Everything about one file of predictions.

    table: the reported rows. kind: the predictions that all but `estimates` is about. estimates: of
    every kind. point: None where there is nothing to fit it on; fitted: where it comes from.
    refinement: refined minus raw. bins: reliability of the file's probabilities. columns_left_out:
    those that would be subgroups by default, were there fewer.
    """

    name: str
    facts: Facts
    sides: dict[str, dict[str, tuple[int, int]]]
    table: PredictionTable = field(repr=False)
    kind: Kind
    estimates: dict[Kind, Estimates]
    refinement: Comparison | None
    point: OperatingPoint | None
    fitted: str
    thresholds: dict[str, ThresholdMeasures]
    curves: dict[str, ClassCurves]
    decisions: dict[str, DecisionCurve]
    bins: list[Bin]
    calibration: Calibration | None
    subgroups: dict[str, list[Subgroup]]
    columns_left_out: list[str]
    patients: Patients | None
    input: Input

    @property
    def main(self) -> Estimates:
        """Measures of the kind that the report is about."""
        return self.estimates[self.kind]

    @property
    def drawn(self) -> list[str]:
        """Classes that are drawn: all, of many those of the lowest AUROC, in the file's order."""
        return drawn_classes(self.main)


@dataclass(frozen=True)
class Contents:
    """A report's numbers. comparisons: of the first model with each other one, first minus other.

    audit: what `magsd audit` wrote, if anything.
    """

    side: str
    classes: tuple[str, ...]
    models: list[ModelReport]
    comparisons: list[Comparison]
    options: Options
    audit: dict[str, Any] | None = None


def build(
    inputs: Sequence[Input],
    options: Options,
    *,
    audit: dict[str, Any] | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> Contents:
    """Read the files and compute everything.

    The side that the first file has is reported: its test rows, without any the external ones, and
    without these its validation rows. Raises DataError for files that cannot be read or compared.
    """
    tables = [read_predictions(each.predictions, name=each.name) for each in inputs]
    side = next((s for s in REPORTED if len(tables[0].side(s))), None)
    if side is None:
        raise DataError(
            f"{inputs[0].predictions}: no row of split {', '.join(REPORTED)}: a report needs images"
            " that the model was not trained on"
        )
    _check_side(tables, inputs, side)
    reported = check_comparable(tables, side) if len(tables) > 1 else [tables[0].side(side)]
    models = []
    for each, whole, table in zip(inputs, tables, reported, strict=True):
        progress(each.name)
        models.append(_model(each, whole, table, side, options))
    comparisons = []
    for other in models[1:]:
        progress(f"{models[0].name} against {other.name}")
        comparisons.append(
            compare(
                models[0].table,
                other.table,
                kinds=(models[0].kind, other.kind),
                resampling=options.resampling,
            )
        )
    return Contents(side, reported[0].classes, models, comparisons, options, audit)


def _check_side(tables: Sequence[PredictionTable], inputs: Sequence[Input], side: str) -> None:
    for table, each in zip(tables, inputs, strict=True):
        if not len(table.side(side)):
            raise DataError(
                f"{each.predictions}: no {side} rows, which are reported of"
                f" {inputs[0].predictions}; models are compared over the same images"
            )


def _model(
    each: Input, whole: PredictionTable, table: PredictionTable, side: str, options: Options
) -> ModelReport:
    resampling, kind = options.resampling, table.best
    facts = facts_of(each)
    points, fitted = _points(each, whole, options.rule)
    point = None
    calibration = None
    thresholds: dict[str, ThresholdMeasures] = {}
    probabilities = table.of(kind)
    estimates = {k: estimate(table, k, resampling) for k in table.kinds}
    if points is not None:
        point = points.of(kind).ordered(table.classes)
        thresholds = measure_thresholds(table, point, kind, resampling)
        after = points.apply(table)
        calibration = _calibration(table, after, kind, estimates[kind], resampling)
        probabilities = after.of(kind)
    drawn = drawn_classes(estimates[kind])
    index = {name: table.classes.index(name) for name in drawn}
    curves = {name: class_curves(table, kind, k, resampling) for name, k in index.items()}
    return ModelReport(
        name=each.name,
        facts=facts,
        sides=facts.sides | _counts(whole),
        table=table,
        kind=kind,
        estimates=estimates,
        refinement=(
            compare(table, table, kinds=("refined", "raw"), resampling=resampling)
            if kind == "refined"
            else None
        ),
        point=point,
        fitted=fitted,
        thresholds=thresholds,
        curves={name: found for name, found in curves.items() if found is not None},
        decisions={
            name: decision_curve(probabilities, table.labels, k)
            for name, k in index.items()
            if (table.labels == k).any()
        },
        bins=reliability(table.of(kind), table.labels),
        calibration=calibration,
        subgroups=_subgroups(table, kind, options),
        columns_left_out=(
            _grouping_columns(table)[_MOST_COLUMNS:] if options.subgroups is None else []
        ),
        patients=_patients(table, kind, options),
        input=each,
    )


def drawn_classes(estimates: Estimates) -> list[str]:
    """Classes that are drawn: all, of many those of the lowest AUROC, in their order."""
    names = list(estimates.per_class)
    if len(names) <= DRAWN:
        return names
    values = {name: estimates.per_class[name]["auroc"].value for name in names}
    known = [name for name in names if np.isfinite(values[name])]
    chosen = set(sorted(known, key=lambda name: values[name])[:DRAWN])
    return [name for name in names if name in chosen]


def _counts(table: PredictionTable) -> dict[str, dict[str, tuple[int, int]]]:
    labels = [table.classes[k] for k in table.labels]
    rows = zip(table.splits.tolist(), labels, table.patients.tolist(), strict=True)
    return count_sides(list(rows))


def _points(
    each: Input, table: PredictionTable, rule: Rule | None
) -> tuple[OperatingPoints | None, str]:
    """Temperature and thresholds, and where they come from."""
    file = each.predictions.with_name("operating.json")
    # Other files in a run's folder may be of another model.
    if rule is None and each.predictions.name == "predictions.csv" and file.is_file():
        points = read_operating_points(file)
        if table.best == "refined" and points.refined is None:
            raise DataError(
                f"{file}: has no thresholds of refined predictions, which {each.predictions} has;"
                " give --rule youden to fit them on its validation rows"
            )
        return points, "kept with the run (operating.json)"
    validation = table.side("validation")
    if not len(validation):
        return None, ""
    points = fit_operating_points(validation, rule or Rule("youden"))
    return points, "fitted on the validation rows of the file"


def _calibration(
    before: PredictionTable,
    after: PredictionTable,
    kind: Kind,
    estimates: Estimates,
    resampling: Resampling,
) -> Calibration:
    labels = before.labels
    both = before.of(kind), after.of(kind)
    calibrated = estimate(after, kind, resampling)
    return Calibration(
        {name: estimates.overall[name] for name in CALIBRATION},
        {name: calibrated.overall[name] for name in CALIBRATION},
        (reliability(both[0], labels), reliability(both[1], labels)),
        {
            name: (
                class_reliability(both[0], labels, before.classes.index(name)),
                class_reliability(both[1], labels, before.classes.index(name)),
            )
            for name in drawn_classes(estimates)
        },
    )


def _subgroups(table: PredictionTable, kind: Kind, options: Options) -> dict[str, list[Subgroup]]:
    found = {}
    chosen = options.subgroups
    for text in _grouping_columns(table)[:_MOST_COLUMNS] if chosen is None else chosen:
        column, edges = _column_and_edges(table, text)
        found[column] = subgroups(table, column, edges, kind, options.resampling)
    return found


def _grouping_columns(table: PredictionTable) -> list[str]:
    """Extra columns of two to ten values, of which the first six are taken by default."""
    counts = {name: len(np.unique(column_of(table, name))) for name in table.extra}
    return [name for name, count in counts.items() if 1 < count <= _MOST_GROUPS]


def _column_and_edges(table: PredictionTable, text: str) -> tuple[str, list[float] | None]:
    """A column of the table, and the edges after "=" where its name ends before that."""
    column, equals, edges = text.rpartition("=")
    if not equals or text in table.extra:
        return text, None
    try:
        return column, [float(edge) for edge in edges.split(",")]
    except ValueError:
        raise DataError(
            f"--subgroup {text}: expected numbers between commas after =, such as age=40,60"
        ) from None


def _patients(table: PredictionTable, kind: Kind, options: Options) -> Patients | None:
    """Results by patient, or another unit; None where each has one image."""
    merged = aggregate(table, options.aggregate_by, options.aggregate)
    if not len(merged.table) or len(merged.table) == len(table):
        return None
    estimates = estimate(merged.table, kind, options.resampling)
    return Patients(estimates, len(merged.left_out), merged.left_out_images)
