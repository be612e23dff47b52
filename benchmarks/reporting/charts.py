"""One chart per operation, and one of growth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from benchmarks.harness.comparison import LIMIT
from benchmarks.reporting.results import Entry, Key, Results, Row
from benchmarks.reporting.tables import fit, memory, seconds

#: Okabe and Ito's colours, told apart with every kind of colour vision; shapes say the same.
_LOOK = {
    "published": ("#D55E00", "s"),
    "eager": ("#E69F00", "D"),
    "compiled": ("#56B4E9", "^"),
    "compiled-max": ("#0072B2", "v"),
    "cpu": ("#009E73", "o"),
    "cuda": ("#009E73", "o"),
    "triton": ("#CC79A7", "p"),
    LIMIT: ("#000000", "|"),
}
_DRAWN_GROWTH = (
    "attention_views",
    "bilinear_attention_pool",
    "multiscale_attention",
    "soft_distance_loss",
    "sample_attention",
)
_STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "savefig.dpi": 150,
}


def draw(results: Results, folder: Path) -> dict[str, str]:
    """Write the charts; names of the files by operation, and of "growth"."""
    names = {}
    with mpl.rc_context(_STYLE):
        for operation, rows in results.operations():
            names[operation] = f"{operation}.png"
            _operation(rows, _caption(results), folder / names[operation])
        if any((function, "batch") in results.growth for function in _DRAWN_GROWTH):
            names["growth"] = "growth.png"
            _growth(results, folder / names["growth"])
    return names


def _caption(results: Results) -> str:
    machine = results.machine
    device = machine.get("gpu", f"{machine['processor']}, {machine['threads']} threads")
    return f"{device}; torch {machine['torch']}; {results.runs[-1]}"


def _operation(rows: dict[Key, Row], caption: str, path: Path) -> None:
    """Every row a line, every competitor a mark at its time; beside it what ours gains."""
    height = 1.5 + 0.34 * len(rows)
    figure, axes = plt.subplots(figsize=(8.6, height), layout="constrained")
    labels = _labels(list(rows))
    drawn: dict[str, object] = {}
    for y, row in enumerate(rows.values()):
        for name, entry in row.members.items():
            colour, marker = _LOOK[name]
            low, middle, high = entry.seconds
            axes.plot([low, high], [y, y], color=colour, linewidth=1.2, alpha=0.6)
            size = 11 if marker == "|" else 6
            (drawn[name],) = axes.plot(
                middle, y, marker, color=colour, markersize=size, markeredgewidth=1.4 if size > 6 else 0.5,
                markeredgecolor=colour if size > 6 else "white", linestyle="none",
            )  # fmt: skip
        axes.annotate(
            _gain(row), (1.01, y), xycoords=("axes fraction", "data"), va="center", fontsize=8
        )
    axes.set_yticks(range(len(rows)), labels)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    _logarithmic(axes, "x", seconds)
    axes.set_xlabel("time per call (log scale)")
    order = [name for name in _LOOK if name in drawn]
    axes.legend(
        [drawn[name] for name in order], order, ncols=len(order), loc="lower left",
        bbox_to_anchor=(-0.01, 1.0), handletextpad=0.2, columnspacing=1.4, borderaxespad=0.2,
    )  # fmt: skip
    figure.supxlabel(caption, fontsize=7, color="#666666")
    figure.savefig(path)
    plt.close(figure)


def _labels(keys: Sequence[Key]) -> list[str]:
    """Function, size and direction, less what all have in common."""
    parts = [
        (key.function, f"{key.network} B {key.batch}", key.precision, key.direction) for key in keys
    ]
    varying = [len(set(column)) > 1 for column in zip(*parts, strict=True)]
    varying[0] = True
    return [
        ", ".join(part for part, varies in zip(row, varying, strict=True) if varies)
        for row in parts
    ]


def _gain(row: Row) -> str:
    """How much faster ours is than each competitor, the limit excepted."""
    if row.ours is None:
        return ""
    entry = row.members[row.ours]
    ratios = {n: entry.speedup(n) for n in ("published", "eager", "compiled")}
    return "  ".join(f"{found[1]:.3g}x {name}" for name, found in ratios.items() if found)


def _growth(results: Results, path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.6, 4.0), layout="constrained")
    colours = ["#009E73", "#D55E00", "#0072B2", "#CC79A7", "#E69F00"]
    markers = ["o", "s", "^", "D", "v"]
    for function, colour, marker in zip(_DRAWN_GROWTH, colours, markers, strict=True):
        entries = results.growth.get((function, "batch"), [])
        if len(entries) < 3:
            continue
        label = f"{function}, {entries[0].facts['direction']}"
        _points(left, entries, [e.median for e in entries], colour, marker, label)
        held = [max(entry.facts["memory"], 1) for entry in entries]
        _points(right, entries, held, colour, marker, label)
    for axes, label, form in ((left, "time per call", seconds), (right, "peak memory", memory)):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        _logarithmic(axes, "y", form)
        axes.set_xlabel("batch")
        axes.set_ylabel(label)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, ncols=2, loc="outside upper left", title=None)
    caption = f"lines: fitted a + b batch. {_caption(results)}"
    figure.supxlabel(caption, fontsize=7, color="#666666")
    figure.savefig(path)
    plt.close(figure)


def _points(
    axes: Axes,
    entries: Sequence[Entry],
    values: Sequence[float],
    colour: str,
    marker: str,
    label: str,
) -> None:
    amounts = [entry.facts["amount"] for entry in entries]
    line = fit(amounts, values)
    x = np.geomspace(amounts[0], amounts[-1], 100)
    y = line.fixed + line.slope * x
    axes.plot(x, np.where(y > 0, y, np.nan), color=colour, linewidth=1)
    axes.plot(amounts, values, marker, color=colour, markersize=5, label=label, linestyle="none")


def _logarithmic(axes: Axes, which: str, form: object) -> None:
    axis = axes.xaxis if which == "x" else axes.yaxis
    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    axis.set_major_formatter(FuncFormatter(lambda value, _: form(value)))  # type: ignore[operator]
    axis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
