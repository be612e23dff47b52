"""The scores of a cross-validation as a picture: every run, mean and standard deviation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from magsd.crossval.results import LOGITS, METRICS
from magsd.crossval.summary import Score, Summary
from magsd.evaluation.plots import COLORS, save_figure, set_name
from magsd.evaluation.tables import HEADINGS

_COLUMNS = 3
_LABELS = {"raw": "raw logits", "refined": "raw + refined logits"}


def plot_scores(path: str | Path, summary: Summary) -> Path:
    """Write one panel a metric with a row a model: runs as dots, mean and standard deviation."""
    names = [set_name(model.model) for model in summary.models]
    kinds = [k for k in LOGITS if any((k, METRICS[0]) in m.scores for m in summary.models)]
    rows = -(-len(METRICS) // _COLUMNS)
    height = 0.75 + (0.2 + 0.22 * len(kinds)) * len(names)
    margin = 0.08 * max(map(len, names))
    figure = Figure(
        figsize=(2.7 * _COLUMNS + margin, rows * height + 0.5),
        layout=ConstrainedLayoutEngine(wspace=0.05, hspace=0.06),
    )
    panels = figure.subplots(rows, _COLUMNS, sharey=True, squeeze=False).ravel()
    for axes, metric in zip(panels, METRICS, strict=True):
        for row, model in enumerate(summary.models):
            for k, kind in enumerate(kinds):
                if (kind, metric) in model.scores:
                    place = row + 0.32 * (k - (len(kinds) - 1) / 2)
                    _draw(axes, place, model.scores[kind, metric], COLORS[k])
        _dress(axes, HEADINGS[metric], names)
    handles = _legend(kinds)
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=len(handles),
        frameon=False,
        fontsize=8.5,
    )
    return save_figure(figure, path)


def _draw(axes: Axes, place: float, score: Score, color: str) -> None:
    values = np.array([score.values[key] for key in sorted(score.values)])
    # Spread over the row's height in a fixed order, so that equal values stay apart.
    spread = place + 0.09 * np.linspace(-1, 1, len(values)) if len(values) > 1 else [place]
    axes.scatter(values, spread, s=11, color=color, alpha=0.45, linewidths=0, zorder=2)
    if score.n:
        deviation = None if np.isnan(score.deviation) else score.deviation
        axes.errorbar(
            score.mean,
            place,
            xerr=deviation,
            fmt="D",
            ms=4.5,
            mec="white",
            mew=0.6,
            color=color,
            lw=1.4,
            capsize=2.5,
            zorder=3,
        )


def _dress(axes: Axes, title: str, names: list[str]) -> None:
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.margins(x=0.08)
    axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")
    axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
    axes.tick_params(labelsize=8.5)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(axis="x", color="#e0e0e0", lw=0.6)
    for row in range(1, len(names)):
        axes.axhline(row - 0.5, color="#f0f0f0", lw=0.8, zorder=0)
    axes.set_axisbelow(True)


def _legend(kinds: list[str]) -> list[Line2D]:
    handles = [
        Line2D([], [], color=COLORS[k], marker="D", ms=4.5, lw=1.4, label=_LABELS[kind])
        for k, kind in enumerate(kinds)
    ]
    gray = "#606060"
    dot = Line2D([], [], color=gray, marker="o", ms=4, lw=0, alpha=0.6, label="single runs")
    mean = Line2D([], [], color=gray, marker="D", ms=4.5, lw=1.4, label="mean ± standard deviation")
    return [*handles, mean, dot]
