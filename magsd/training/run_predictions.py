"""Predictions of a run's model as tables: a row an image, with what its source says of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from magsd.data import ImageCache, Loader, Record
from magsd.evaluation import EvaluationReport
from magsd.evaluation.metrics import probabilities_of
from magsd.reporting.predictions import PredictionTable


def predictions_table(
    report: EvaluationReport, records: Sequence[Record], split: str, *, name: str = ""
) -> PredictionTable:
    """What a model predicted for images, whose `records` are in the order of the report.

    split: train, validation, test, or external for images that the run did not divide.
    """
    predictions = report.predictions
    refined = predictions.refined_logits
    columns = dict.fromkeys(name for record in records for name in record.extra)
    return PredictionTable(
        name=name,
        classes=report.classes,
        keys=np.array([record.key for record in records], dtype=np.str_),
        patients=np.array([record.patient for record in records], dtype=np.str_),
        splits=np.full(len(records), split, dtype="<U10"),
        labels=predictions.targets,
        probabilities=probabilities_of(predictions.logits),
        logits=predictions.logits.astype(np.float64),
        refined_probabilities=None if refined is None else probabilities_of(refined),
        refined_logits=None if refined is None else refined.astype(np.float64),
        extra={
            column: np.array([record.extra.get(column, "") for record in records], dtype=np.str_)
            for column in columns
        },
    )


def records_of(report: EvaluationReport, loader: Loader, cache: ImageCache | None) -> list[Record]:
    """The records of a report's images. Those of shards are named by shard and number alone."""
    indices = report.predictions.indices.tolist()
    if cache is not None:
        return [cache.records[index] for index in indices]
    labels = [report.classes[label] for label in report.predictions.targets]
    names = loader.describe(indices)
    return [Record(key, label, key) for key, label in zip(names, labels, strict=True)]


def joined(tables: Sequence[PredictionTable]) -> PredictionTable:
    """The rows of tables with the same classes, one after the other.

    A key that an earlier table has is written after `SPLIT/`: another source may have the same.
    """
    first, *rest = tables
    for table in rest:
        first = _pair(first, _apart(table, set(first.keys.tolist())))
    return first


def _apart(table: PredictionTable, taken: set[str]) -> PredictionTable:
    keys, patients = table.keys.tolist(), table.patients.tolist()
    for row, split in enumerate(table.splits.tolist()):
        key = keys[row]
        while keys[row] in taken:
            keys[row] = f"{split}/{keys[row]}"
        if patients[row] == key:  # an image that is its own patient
            patients[row] = keys[row]
    return replace(table, keys=np.array(keys), patients=np.array(patients))


def _pair(first: PredictionTable, second: PredictionTable) -> PredictionTable:
    def both(name: str) -> NDArray[Any] | None:
        values = [getattr(table, name) for table in (first, second)]
        return None if any(value is None for value in values) else np.concatenate(values)

    def cells(table: PredictionTable, name: str) -> NDArray[Any]:
        return table.extra.get(name, np.full(len(table), ""))

    columns = dict.fromkeys([*first.extra, *second.extra])
    arrays = ("keys", "patients", "splits", "labels", "probabilities", "logits")
    arrays += ("refined_probabilities", "refined_logits")
    return replace(
        first,
        **{name: both(name) for name in arrays},
        extra={c: np.concatenate([cells(first, c), cells(second, c)]) for c in columns},
    )
