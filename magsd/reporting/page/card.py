"""The metadata of a model card, as the Hugging Face hub reads it."""

from __future__ import annotations

import math
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


def _data_set(model: ModelReport) -> str:
    """The source without the folders around it, which are nobody's business."""
    if model.facts.source is None:
        return model.input.predictions.name
    kind, _, place = model.facts.source.partition(":")
    return kind if not place or kind == "phantom" else f"{kind}:{PurePath(place).name}"
