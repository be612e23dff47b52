"""Which charts the page has of a model."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from magsd.reporting.calibration import Bin
from magsd.reporting.page import charts
from magsd.reporting.page.charts import Line
from magsd.reporting.page.contents import Contents, ModelReport
from magsd.reporting.page.curves import Curve
from magsd.reporting.page.words import number, span

Charts = dict[str, list[Markup]]


def figures_of(contents: Contents, model: ModelReport) -> Charts:
    """Charts by their place on the page, one of every drawn class where it has one."""
    return {
        "roc": [_roc(model, name) for name in model.curves],
        "precision_recall": [_precision_recall(model, name) for name in model.curves],
        "decisions": [_decision(model, name) for name in model.decisions],
        "reliability": _reliability(model),
        "subgroups": [_groups(model, column) for column in model.subgroups],
    }


def _line(curve: Curve) -> Line:
    return Line(curve.x, curve.y, low=curve.low, high=curve.high)


def _note(model: ModelReport, name: str, measure: str, short: str) -> str:
    interval = model.main.per_class[name][measure]
    images = f"n = {model.main.class_images[name]:,}"
    return "\n".join([images, f"{short} {number(interval.value)}", span(interval)]).strip()


def _roc(model: ModelReport, name: str) -> Markup:
    found = model.thresholds.get(name)
    points = []
    if found is not None:
        points = [(1 - found.specificity.value, found.sensitivity.value)]
    return charts.curve(
        name,
        [_line(model.curves[name].roc)],
        x="1 \u2212 specificity",
        y="sensitivity",
        note=_note(model, name, "auroc", "AUROC"),
        points=points,
        chance=((0, 0), (1, 1)),
    )


def _precision_recall(model: ModelReport, name: str) -> Markup:
    own = model.curves[name]
    return charts.curve(
        name,
        [_line(own.precision_recall)],
        x="recall",
        y="precision",
        note=_note(model, name, "average_precision", "AP"),
        chance=((0, own.share), (1, own.share)),
    )


def _decision(model: ModelReport, name: str) -> Markup:
    own = model.decisions[name]
    lines = [
        Line(own.thresholds, own.model, "by the model"),
        Line(own.thresholds, own.everyone, "all positive"),
    ]
    return charts.decision(name, lines)


def _reliability(model: ModelReport) -> list[Markup]:
    if model.calibration is None:
        return [charts.reliability("predicted class", [_bins(model.bins, "as in the file")])]
    found = {"predicted class": model.calibration.bins, **model.calibration.class_bins}
    return [
        charts.reliability(name, [_bins(before, "before"), _bins(after, "after")])
        for name, (before, after) in found.items()
    ]


def _bins(bins: Sequence[Bin], name: str) -> Line:
    return Line([each.confidence for each in bins], [each.accuracy for each in bins], name)


def _groups(model: ModelReport, column: str) -> Markup:
    rows = []
    for group in model.subgroups[column]:
        own = group.estimates.overall["accuracy"]
        label = f"{charts.shorten(group.name, 22)} (n = {group.images:,})"
        rows.append(charts.Interval(label, own.value, own.low, own.high, bool(group.small)))
    reference = model.main.overall["accuracy"].value
    return charts.intervals(column, rows, x="accuracy", reference=reference)
