"""The metadata of a model card, as the Hugging Face hub reads it."""

from __future__ import annotations

import math
import re
from pathlib import PurePath
from typing import Any

from magsd.reporting.page.contents import Contents, ModelReport

# Measure -> the hub's name of the metric, and ours.
_METRICS = {
    "accuracy": ("accuracy", "Accuracy"),
    "balanced_accuracy": ("recall", "Recall (macro)"),
    "precision": ("precision", "Precision (macro)"),
    "f1": ("f1", "F1 (macro)"),
    "auroc": ("roc_auc", "AUROC (macro)"),
    "average_precision": ("average_precision", "Average precision (macro)"),
    "brier": ("brier_score", "Brier score"),
}


def metadata(contents: Contents) -> dict[str, Any]:
    """Of the first model; numbers that are undefined are left out."""
    model = contents.models[0]
    overall = model.main.overall
    metrics = [
        {"type": kind, "name": name, "value": round(overall[measure].value, 4)}
        for measure, (kind, name) in _METRICS.items()
        if not math.isnan(overall[measure].value)
    ]
    split = {"split": contents.side} if model.table.split_known else {}
    result = {
        "task": {"type": "image-classification"},
        "dataset": {"type": "image-folder", "name": _data_set(model), **split},
        "metrics": metrics,
    }
    tags = ["image-classification", "medical-imaging"]
    if model.facts.configuration:
        tags.insert(0, "magsd")
    library = {"library_name": "magsd"} if model.facts.configuration else {}
    return {
        **library,
        "pipeline_tag": "image-classification",
        "tags": tags,
        "model-index": [{"name": model.name, "results": [result]}],
    }


def without_folders(contents: Contents, text: str) -> str:
    """A text of the report whose data and predictions are named without the folders around them.

    A card is published, and folders name people and machines.
    """
    for model in contents.models:
        data = model.facts.configuration.get("data", {})
        for source in (data.get("source"), data.get("test")):
            if isinstance(source, str) and source:
                text = text.replace(source, _last_part(source))
        text = text.replace(str(model.input.predictions), model.input.predictions.name)
    return text


def _data_set(model: ModelReport) -> str:
    if model.facts.source is None:
        return model.input.predictions.name
    return _last_part(model.facts.source)


def _last_part(source: str) -> str:
    """`KIND:PATH,NAME=VALUE` with the last part of the path alone."""
    kind, colon, place = source.partition(":") if ":" in source else ("", "", source)
    path, *options = re.split(r"(?=,\w+=)", place, maxsplit=1)
    return "".join([kind, colon, PurePath(path).name, *options])
