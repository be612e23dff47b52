"""One chart per operation, and one of growth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from benchmarks.harness.comparison import LIMIT
from benchmarks.reporting.results import Entry, Key, Results, Row
from benchmarks.reporting.rivals import rivals
from benchmarks.reporting.tables import fit, memory, seconds

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
_LIMIT_WITHIN = 30
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
    with mpl.rc_context(_STYLE):  # type: ignore[arg-type]
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
    figure, (axes, table) = plt.subplots(
        1, 2, sharey=True, width_ratios=(2, 1), layout="constrained",
        figsize=(10, 1.6 + 0.3 * len(rows)),
    )  # fmt: skip
    shown = [
        [name for name in _LOOK if name in row.members and not _far_below(name, row)]
        for row in rows.values()
    ]
    drawn = [name for name in _LOOK if any(name in names for names in shown)]
    for y, (row, names) in enumerate(zip(rows.values(), shown, strict=True)):
        for name in names:
            _mark(axes, y, row.members[name], name)
        axes.axhline(y, color="#f0f0f0", linewidth=0.6, zorder=0)
    axes.set_yticks(range(len(rows)), _labels(list(rows)))
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    _logarithmic(axes, "x", seconds)
    axes.set_xlabel("time per call, log scale")
    _gains(table, rows)
    handles = [_handle(name) for name in drawn]
    axes.legend(
        handles, drawn, ncols=len(drawn), loc="lower left", bbox_to_anchor=(-0.01, 1.0),
        handletextpad=0.2, columnspacing=1.4, borderaxespad=0.2,
    )  # fmt: skip
    figure.supxlabel(caption, fontsize=7, color="#666666")
    figure.savefig(path)
    plt.close(figure)


def _mark(axes: Axes, y: int, entry: Entry, name: str) -> None:
    """The median, on a line from the first to the third quartile."""
    low, middle, high = entry.seconds
    axes.plot([low, high], [y, y], color=_LOOK[name][0], linewidth=1.2, alpha=0.6)
    axes.add_line(_handle(name, [middle], [y]))


def _handle(name: str, x: Sequence[float] = (), y: Sequence[float] = ()) -> Line2D:
    color, marker = _LOOK[name]
    bar = marker == "|"
    return Line2D(
        x, y, linestyle="none", marker=marker, color=color, markersize=11 if bar else 6.5,
        markeredgewidth=1.6 if bar else 0.6, markeredgecolor=color if bar else "white", zorder=3,
    )  # fmt: skip


def _far_below(name: str, row: Row) -> bool:
    """A limit far under all times says only that the size is small, and squeezes the rest."""
    fastest = min(entry.median for other, entry in row.members.items() if other != LIMIT)
    return name == LIMIT and row.members[LIMIT].median < fastest / _LIMIT_WITHIN


def _gains(table: Axes, rows: dict[Key, Row]) -> None:
    """Columns beside the chart: time over ours."""
    columns = [name for name in _LOOK if any(name in rivals(row) for row in rows.values())]
    table.axis("off")
    table.set_xlim(-0.5, len(columns) - 0.5)
    for column, name in enumerate(columns):
        head = f"{name}\n/ ours"
        table.annotate(
            head, (column, 1), xycoords=("data", "axes fraction"), ha="center", va="bottom",
            fontsize=8, color="#444444",
        )  # fmt: skip
        for y, row in enumerate(rows.values()):
            table.annotate(_gain(row, name), (column, y), ha="center", va="center", fontsize=8)


def _gain(row: Row, other: str) -> str:
    found = row.members[row.ours].speedup(other) if row.ours else None
    return "" if found is None else f"{found[1]:.3g}x"


def _labels(keys: Sequence[Key]) -> list[str]:
    """Function, size, and what else is not the same for all."""
    parts = [
        (key.function, f"{key.network} B {key.batch}", key.precision, key.direction) for key in keys
    ]
    varying = [len(set(column)) > 1 for column in zip(*parts, strict=True)]
    varying[:2] = True, True
    return [
        ", ".join(part for part, varies in zip(row, varying, strict=True) if varies)
        for row in parts
    ]


def _growth(results: Results, path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.6, 4.0), layout="constrained")
    colors = ["#009E73", "#D55E00", "#0072B2", "#CC79A7", "#E69F00"]
    markers = ["o", "s", "^", "D", "v"]
    for function, color, marker in zip(_DRAWN_GROWTH, colors, markers, strict=True):
        entries = results.growth.get((function, "batch"), [])
        if len(entries) < 3:
            continue
        label = f"{function}, {entries[0].facts['direction']}"
        _points(left, entries, [e.median for e in entries], color, marker, label)
        held = [max(entry.facts["memory"], 1) for entry in entries]
        _points(right, entries, held, color, marker, label)
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
    caption = f"lines: fitted a + b batch. {_caption(results)}"
    figure.supxlabel(caption, fontsize=7, color="#666666")
    figure.savefig(path)
    plt.close(figure)


def _points(
    axes: Axes,
    entries: Sequence[Entry],
    values: Sequence[float],
    color: str,
    marker: str,
    label: str,
) -> None:
    amounts = [entry.facts["amount"] for entry in entries]
    line = fit(amounts, values)
    x = np.geomspace(amounts[0], amounts[-1], 100)
    y = line.fixed + line.slope * x
    axes.plot(x, np.where(y > 0, y, np.nan), color=color, linewidth=1)
    axes.plot(amounts, values, marker, color=color, markersize=5, label=label, linestyle="none")


def _logarithmic(axes: Axes, which: str, form: Callable[[float], str], base: int = 10) -> None:
    axis = axes.xaxis if which == "x" else axes.yaxis
    (axes.set_xscale if which == "x" else axes.set_yscale)("log", base=base)
    axis.set_major_locator(LogLocator(base=base, numticks=7))
    axis.set_major_formatter(FuncFormatter(lambda value, _: form(value)))
    axis.set_minor_formatter(NullFormatter())
    if base != 10:
        axis.set_minor_locator(NullLocator())
