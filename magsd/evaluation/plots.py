"""Confusion matrix as PNG and CSV, training curves as PNG, and how names are set in pictures."""

from __future__ import annotations

import csv
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import ArrayLike, NDArray
from rich.cells import cell_len

from magsd.errors import RunError
from magsd.evaluation.metrics import ClassMetrics, Metrics
from magsd.outputs import MARK, jsonable

# Color-blind safe (Okabe and Ito, 2008).
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DPI = 150
# Inches that the cells of a matrix take at most along a side.
_LONGEST = 10.2
# Cells of more classes are too small for their numbers.
_WITH_TEXT = 30


def plot_confusion(
    path: str | Path, confusion: ArrayLike, classes: Sequence[str], *, title: str | None = None
) -> Path:
    """Write a confusion matrix, rows true and columns predicted, shaded by share of the row.

    confusion: (K, K) counts. Each cell shows its count and its share of the true class, up to 30
    classes. The picture has a largest size; of many classes some are named.
    """
    counts = np.asarray(confusion)
    if counts.shape != (len(classes), len(classes)):
        raise ValueError(f"confusion: expected {(len(classes),) * 2}, got {counts.shape}")
    totals = counts.sum(axis=1, keepdims=True)
    shares = counts / np.maximum(totals, 1)
    count = len(classes)
    cell = min(0.85, _LONGEST / count)
    points = 72 * cell
    # A name in small print takes six points.
    step = math.ceil(6 / points)
    named = range(0, count, step)
    names = [set_name(classes[k]) for k in named]
    # What names of ordinary length need beside the cells is in the first number.
    side = 1.6 + 0.1 * max(0, max(map(cell_len, names)) - 16) + cell * count
    figure = Figure(figsize=(side + 0.9, side), layout="constrained")
    axes = figure.add_subplot()
    picture = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for i, j in np.ndindex(*counts.shape) if count <= _WITH_TEXT else ():
        color = "white" if shares[i, j] > 0.55 else "#202020"
        text = f"{counts[i, j]}\n{shares[i, j]:.0%}" if totals[i, 0] else "0"
        size = min(9, 0.27 * points)
        axes.text(j, i, text, ha="center", va="center", color=color, fontsize=size)
    size = min(10, 0.8 * points * step)
    axes.set_yticks(named, names, fontsize=size)
    turn, va = (30, "top") if count <= 12 else (90, "center")
    axes.set_xticks(
        named, names, fontsize=size, rotation=turn, ha="right", va=va, rotation_mode="anchor"
    )
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    axes.spines[:].set_visible(False)
    if count <= _WITH_TEXT:
        axes.set_xticks(np.arange(1, count) - 0.5, minor=True)
        axes.set_yticks(np.arange(1, count) - 0.5, minor=True)
        axes.grid(which="minor", color="white", linewidth=min(2, 0.08 * points))
    axes.tick_params(which="both", length=0)
    bar = figure.colorbar(picture, ax=axes, fraction=0.046, pad=0.03)
    bar.ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    bar.set_label("share of the true class")
    bar.outline.set_visible(False)
    if title:
        axes.set_title(set_name(title, 80), fontsize=11)
    return save_figure(figure, path)


def write_confusion(path: str | Path, confusion: ArrayLike, classes: Sequence[str]) -> Path:
    """Write a confusion matrix (K, K) as CSV: rows are true classes, columns predicted ones."""
    rows = zip(classes, np.asarray(confusion).tolist(), strict=True)
    path = Path(path)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["true \\ predicted", *classes])
        writer.writerows([name, *row] for name, row in rows)
    return path


def write_classes(path: str | Path, metrics: Mapping[str, Metrics]) -> Path:
    """Write the numbers of every class as CSV, a row for each kind of logits; empty: undefined."""
    columns = [column.name for column in fields(ClassMetrics)]
    path = Path(path)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["class", "logits", *columns])
        for kind, scores in metrics.items():
            for name, own in scores.per_class.items():
                values = [jsonable(getattr(own, column)) for column in columns]
                writer.writerow([name, kind, *values])
    return path


def plot_curves(path: str | Path, metrics_csv: str | Path) -> Path:
    """Write the training curves of a run's metrics.csv, over its column "epoch".

    Losses go into one panel, accuracies (other columns within 0..1) into a second, the learning
    rate into a third; a panel without data is left out, and columns that are no numbers are
    ignored. Raises RunError where the file is missing or holds nothing to draw.
    """
    table = _read_metrics(metrics_csv)
    panels = [(name, columns) for name, columns in _panels(table).items() if columns]
    if not panels:
        raise RunError(f"{metrics_csv} holds no curve to draw: columns {', '.join(table)}")
    figure = Figure(figsize=(4.2 * len(panels), 3.4), layout="constrained")
    for k, (name, columns) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), k + 1)
        for color, column in zip(np.resize(COLORS, len(columns)), columns, strict=True):
            known = ~np.isnan(table[column])
            mark = "o" if known.sum() == 1 else None
            axes.plot(
                table["epoch"][known],
                table[column][known],
                label=_label(column),
                color=color,
                lw=1.6,
                marker=mark,
            )
        _dress(axes, name)
    return save_figure(figure, path)


def _read_metrics(path: str | Path) -> dict[str, NDArray[np.float64]]:
    """Numeric columns, NaN where a row has no value."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            columns, rows = list(reader.fieldnames or []), list(reader)
    except FileNotFoundError as error:
        raise RunError(f"no training metrics at {path}") from error
    except (csv.Error, UnicodeDecodeError) as error:
        raise RunError(f"{path} is not a table of metrics: {error}") from error
    if "epoch" not in columns:
        raise RunError(f"{path} has no column 'epoch', but {', '.join(columns) or 'none'}")
    table = {}
    for name in columns:
        try:
            table[name] = np.array([float(row[name] or "nan") for row in rows])
        except ValueError:
            continue
    return table


def _panels(table: dict[str, NDArray[np.float64]]) -> dict[str, list[str]]:
    """Columns of each panel; counters, times and rates are left out."""
    panels: dict[str, list[str]] = {"loss": [], "accuracy": [], "learning rate": []}
    for name, values in table.items():
        known = values[~np.isnan(values)]
        if not len(known) or name in {"epoch", "step"}:
            continue
        if name == "lr":
            panels["learning rate"].append(name)
        elif any(word in name for word in ("loss", "entropy", "distance")):
            panels["loss"].append(name)
        elif "second" not in name and ((known >= 0) & (known <= 1)).all():
            panels["accuracy"].append(name)
    return panels


def _label(column: str) -> str:
    return set_name(column.replace("_", " "))


def _dress(axes: Axes, name: str) -> None:
    axes.set_title(name, fontsize=10, loc="left")
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e0e0e0", lw=0.6)
    axes.set_axisbelow(True)
    if name == "accuracy":
        axes.set_ylim(0, 1.01)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    if name == "learning rate":
        axes.set_yscale("log")
    else:
        axes.legend(fontsize=8, frameon=False)


def set_name(name: str, longest: int = 32) -> str:
    """A name as Matplotlib is to set it: `one_line`, and no formula."""
    return one_line(name, longest).replace("$", r"\$")


def one_line(name: str, longest: int = 32) -> str:
    """A name of printable characters, shortened in its middle."""
    name = "".join(character if character.isprintable() else "\ufffd" for character in name)
    if len(name) > longest:
        name = f"{name[: longest // 2 - 1]}…{name[-(longest - longest // 2) :]}"
    return name


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Write a figure as PNG, cut to what is drawn; returns its path."""
    return write_figure(figure, path, dpi=DPI, bbox_inches="tight", pad_inches=0.08)


def write_figure(figure: Figure, path: str | Path, **options: Any) -> Path:
    """Write a figure as PNG, as Matplotlib's `savefig` does; returns its path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        # Hundreds of names in a script that the font lacks would each be warned of.
        warnings.filterwarnings("ignore", r"Glyph .* missing|Matplotlib currently does not support")
        figure.savefig(path, metadata=dict([MARK]), **options)
    return path
