"""What `magsd report` writes: the page, the model card, and all numbers as JSON and CSV."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from magsd import __version__
from magsd.outputs import check_folder, disk_errors, has_json, jsonable
from magsd.reporting.bootstrap import Interval
from magsd.reporting.calibration import Bin
from magsd.reporting.page import words
from magsd.reporting.page.contents import Contents, ModelReport

#: What is written into the folder.
WRITES = ("report.html", "report.json", "README.md", "tables")
_MARK = "magsd_report"
_COUNTS = ("true_positives", "false_positives", "true_negatives", "false_negatives")
_LIMITS = ("value", "low", "high", "undefined")


def check_out(out: Path) -> None:
    """Raise RunError where the folder cannot be written, or holds such files of others."""
    check_folder(
        out, "--out", writes=WRITES, is_own=lambda folder: has_json(folder / "report.json", _MARK)
    )


def write_files(out: Path, contents: Contents, page: str, card: str) -> None:
    """Write everything. Raises RunError where the disk does not take it."""
    with disk_errors(out, "free some space and run the command again"):
        (out / "tables").mkdir(parents=True, exist_ok=True)
        # First, since by it the folder is known as ours after a failure in between.
        text = json.dumps(to_dict(contents), indent=1, allow_nan=False, ensure_ascii=False)
        (out / "report.json").write_text(text + "\n", encoding="utf-8")
        for name, (columns, rows) in _tables(contents).items():
            with (out / "tables" / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
                writer = csv.writer(file)
                writer.writerow(columns)
                writer.writerows([_cell(value) for value in row] for row in rows)
        (out / "README.md").write_text(card, encoding="utf-8")
        (out / "report.html").write_text(page, encoding="utf-8")


def to_dict(contents: Contents) -> dict[str, Any]:
    """All numbers as JSON types; an undefined one is None."""
    options = contents.options
    return {
        _MARK: __version__,
        "summary": words.summary(contents),
        "limits": words.limits(contents),
        "side": contents.side,
        "classes": list(contents.classes),
        "resampling": jsonable(options.resampling),
        "aggregate": options.aggregate,
        "aggregate_by": options.aggregate_by,
        "models": [_model(model) for model in contents.models],
        "comparisons": jsonable(contents.comparisons),
        "audit": contents.audit,
    }


def _model(model: ModelReport) -> dict[str, Any]:
    """Everything but the predictions themselves."""
    return {
        each.name: jsonable(getattr(model, each.name))
        for each in fields(model)
        if each.name not in ("table", "input")
    }


_Table = tuple[Sequence[str], Iterable[Sequence[object]]]


def _tables(contents: Contents) -> dict[str, _Table]:
    """Name -> header and rows of each CSV."""
    models, limits = contents.models, list(_LIMITS)
    return {
        "metrics": (["model", "logits", "measure", *limits], _metrics(models)),
        "per_class": (
            ["model", "logits", "class", "images", "patients", "measure", *limits],
            _per_class(models),
        ),
        "confusion": (["model", "true", *contents.classes], _confusion(models)),
        "operating_points": (
            ["model", "class", "threshold", *_COUNTS, "measure", *limits],
            _operating(models),
        ),
        "calibration": (
            ["model", "class", "state", "low", "high", "images", "predicted", "observed"],
            _bins(models),
        ),
        "subgroups": (
            ["model", "column", "group", "images", "patients", "small", "measure", *limits],
            _subgroups(models),
        ),
        "patients": (
            ["model", "patients", "measure", *limits],
            (
                [each.name, each.patients.estimates.images, measure, *_values(interval)]
                for each in models
                if each.patients is not None
                for measure, interval in each.patients.estimates.overall.items()
            ),
        ),
        "comparison": (
            ["first", "second", "class", "measure", "test", "difference", "low", "high", "p"],
            _comparison(contents),
        ),
    }


def _values(interval: Interval) -> list[float]:
    return [getattr(interval, name) for name in _LIMITS]


def _metrics(models: Sequence[ModelReport]) -> Iterator[Sequence[object]]:
    for model in models:
        for kind, estimates in model.estimates.items():
            for measure, interval in estimates.overall.items():
                yield [model.name, kind, measure, *_values(interval)]


def _per_class(models: Sequence[ModelReport]) -> Iterator[Sequence[object]]:
    for model in models:
        for kind, each in model.estimates.items():
            for name, measures in each.per_class.items():
                counts = [each.class_images[name], each.class_patients[name]]
                for measure, interval in measures.items():
                    yield [model.name, kind, name, *counts, measure, *_values(interval)]


def _confusion(models: Sequence[ModelReport]) -> Iterator[Sequence[object]]:
    for model in models:
        for name, row in zip(model.main.per_class, model.main.confusion, strict=True):
            yield [model.name, name, *row]


def _operating(models: Sequence[ModelReport]) -> Iterator[Sequence[object]]:
    for model in models:
        for name, each in model.thresholds.items():
            assert model.point is not None
            counts = [getattr(each, count) for count in _COUNTS]
            threshold = model.point.thresholds[name].value
            for measure in ("sensitivity", "specificity", "ppv", "npv"):
                values = _values(getattr(each, measure))
                yield [model.name, name, threshold, *counts, measure, *values]


def _bins(models: Sequence[ModelReport]) -> Iterator[Sequence[object]]:
    for model in models:
        found: dict[str, tuple[list[Bin], list[Bin]]] = {"": (model.bins, [])}
        if model.calibration is not None:
            found = {"": model.calibration.bins, **model.calibration.class_bins}
        for name, both in found.items():
            for state, bins in zip(("before", "after"), both, strict=True):
                for each in bins:
                    place = [each.low, each.high, each.images]
                    yield [model.name, name, state, *place, each.confidence, each.accuracy]


def _subgroups(models: Sequence[ModelReport]) -> Iterator[Sequence[object]]:
    for model in models:
        for column, groups in model.subgroups.items():
            for group in groups:
                place = [model.name, column, group.name, group.images, group.patients, group.small]
                for measure, interval in group.estimates.overall.items():
                    yield [*place, measure, *_values(interval)]


def _comparison(contents: Contents) -> Iterator[Sequence[object]]:
    own = [model.refinement for model in contents.models if model.refinement is not None]
    names = [f"{model.name} (refined)" for model in contents.models if model.refinement is not None]
    titled = [(name, f"{name.removesuffix('(refined)')}(raw)") for name in names]
    titled += [(each.first, each.second) for each in contents.comparisons]
    for each, both in zip([*own, *contents.comparisons], titled, strict=True):
        for measure, d in each.overall.items():
            yield [*both, "", measure, "bootstrap", d.value, d.low, d.high, d.p_value]
        for name, measures in each.per_class.items():
            for measure, d in measures.items():
                yield [*both, name, measure, "bootstrap", d.value, d.low, d.high, d.p_value]
        for name, a in each.auroc.items():
            yield [*both, name, "auroc", "DeLong", a.difference, a.low, a.high, a.p_value]


def _cell(value: object) -> object:
    """Numbers with all their digits, empty where undefined."""
    if isinstance(value, float):
        return repr(float(value)) if math.isfinite(value) else ""
    return "" if value is None else value
