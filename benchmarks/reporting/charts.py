"""One chart per operation, and one of growth."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from benchmarks.comparison import LIMIT
from benchmarks.reporting.results import Key, Results, Row
from benchmarks.reporting.tables import FEWEST_POINTS, fits, points
from benchmarks.reporting.text import memory, seconds

#: Okabe and Ito's colors, told apart with every kind of color vision; shapes say the same.
_LOOK = {
    "published": ("#D55E00", "s"),
    "eager": ("#E69F00", "D"),
    "compiled": ("#56B4E9", "^"),
    "compiled-max": ("#0072B2", "v"),
    "bmm": ("#882255", "P"),
    "grid_sample": ("#999999", "X"),
    "roi_align": ("#332288", "d"),
    "cpu": ("#009E73", "o"),
    "cuda": ("#009E73", "o"),
    "triton": ("#CC79A7", "p"),
    LIMIT: ("#000000", "|"),
}
_DRAWN_GROWTH = {
    "attention_views": ("#009E73", "o"),
    "bilinear_attention_pool": ("#D55E00", "s"),
    "multiscale_attention": ("#0072B2", "^"),
    "soft_distance_loss": ("#CC79A7", "D"),
    "sample_attention": ("#E69F00", "v"),
}
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
    machine = results.machine
    device = machine.get("gpu", f"{machine['processor']}, {machine['threads']} threads")
    caption = f"{device}; torch {machine['torch']}; {results.runs[-1]}"
    names = {}
    with mpl.rc_context(_STYLE):  # type: ignore[arg-type]
        for operation, rows in results.operations():
            names[operation] = f"{operation}.png"
            _operation(rows, caption, folder / names[operation])
        if any((function, "batch") in results.growth for function in _DRAWN_GROWTH):
            names["growth"] = "growth.png"
            _growth(results, f"lines: fitted a + b batch. {caption}", folder / names["growth"])
    return names


def _operation(rows: dict[Key, Row], caption: str, path: Path) -> None:
    """Every row a line, every competitor a mark at its median, on a line between its quartiles."""
    figure, axes = plt.subplots(layout="constrained", figsize=(10, 1.4 + 0.3 * len(rows)))
    for name, (color, marker) in _LOOK.items():
        marks = [
            (y, *row.members[name].seconds)
            for y, row in enumerate(rows.values())
            if name in row.members and not (name == LIMIT and _far_below(row))
        ]
        if not marks:
            continue
        y, low, middle, high = zip(*marks, strict=True)
        bar = marker == "|"
        axes.hlines(y, low, high, colors=color, linewidth=1.2, alpha=0.6)
        axes.plot(
            middle, y, linestyle="none", marker=marker, color=color, label=name, zorder=3,
            markersize=11 if bar else 6.5, markeredgewidth=1.6 if bar else 0.6,
            markeredgecolor=color if bar else "white",
        )  # fmt: skip
    axes.set_yticks(range(len(rows)), _labels(list(rows)))
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    _logarithmic(axes, "x", seconds)
    axes.set_xlabel("time per call, log scale")
    figure.legend(ncols=len(_LOOK), loc="outside upper left", handletextpad=0.2)
    _save(figure, caption, path)


def _far_below(row: Row) -> bool:
    """A limit far under all times says only that the size is small, and squeezes the rest."""
    fastest = min(entry.median for other, entry in row.members.items() if other != LIMIT)
    return row.members[LIMIT].median < fastest / 30


def _labels(keys: list[Key]) -> list[str]:
    """Function, size, and what else is not the same for all."""
    told = ["precision", "direction"]
    told = [name for name in told if len({getattr(key, name) for key in keys}) > 1]
    return [
        ", ".join([k.function, f"{k.network} B {k.batch}", *(getattr(k, name) for name in told)])
        for k in keys
    ]


def _growth(results: Results, caption: str, path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.6, 4.0), layout="constrained")
    for function, (color, marker) in _DRAWN_GROWTH.items():
        entries = results.growth.get((function, "batch"), [])
        if len(entries) < FEWEST_POINTS:
            continue
        amounts = [entry.facts["amount"] for entry in entries]
        x = np.geomspace(amounts[0], amounts[-1], 100)
        label = f"{function}, {entries[0].facts['direction']}"
        sides = zip((left, right), points(entries), fits(entries), strict=True)
        for axes, values, (fixed, slope, _) in sides:
            y = fixed + slope * x
            axes.plot(x, np.where(y > 0, y, np.nan), color=color, linewidth=1)
            axes.plot(amounts, values, marker, color=color, markersize=5, label=label)
    for axes, label, form, base in (
        (left, "time per call", seconds, 10),
        (right, "peak memory", memory, 1024),
    ):
        _logarithmic(axes, "x", "{:g}".format, base=2)
        _logarithmic(axes, "y", form, base)
        axes.set_xlabel("batch")
        axes.set_ylabel(label)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, ncols=2, loc="outside upper left")
    _save(figure, caption, path)


def _logarithmic(axes: Axes, which: str, form: Callable[[float], str], base: int = 10) -> None:
    axis = axes.xaxis if which == "x" else axes.yaxis
    (axes.set_xscale if which == "x" else axes.set_yscale)("log", base=base)
    axis.set_major_locator(LogLocator(base=base, numticks=7))
    axis.set_major_formatter(FuncFormatter(lambda value, _: form(value)))
    axis.set_minor_formatter(NullFormatter())
    if base != 10:
        axis.set_minor_locator(NullLocator())


def _save(figure: Figure, caption: str, path: Path) -> None:
    figure.supxlabel(caption, fontsize=7, color="#666666")
    figure.savefig(path)
    plt.close(figure)
