"""Confusion matrix and training curves as PNG."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import ArrayLike, NDArray

from magsd.errors import RunError
from magsd.outputs import MARK

# Color-blind safe (Okabe and Ito, 2008).
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DPI = 150


def plot_confusion(
    path: str | Path, confusion: ArrayLike, classes: Sequence[str], *, title: str | None = None
) -> Path:
    """Write a confusion matrix, rows true and columns predicted, shaded by share of the row.

    confusion: (K, K) counts. Each cell shows its count and its share of the true class.
    """
    counts = np.asarray(confusion)
    if counts.shape != (len(classes), len(classes)):
        raise ValueError(f"confusion: expected {(len(classes),) * 2}, got {counts.shape}")
    totals = counts.sum(axis=1, keepdims=True)
    shares = counts / np.maximum(totals, 1)
    side = 1.6 + 0.85 * len(classes)
    figure = Figure(figsize=(side + 0.9, side), layout="constrained")
    axes = figure.add_subplot()
    picture = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for i, j in np.ndindex(*counts.shape):
        color = "white" if shares[i, j] > 0.55 else "#202020"
        text = f"{counts[i, j]}\n{shares[i, j]:.0%}" if totals[i, 0] else "0"
        axes.text(j, i, text, ha="center", va="center", color=color, fontsize=9)
    axes.set_xticks(range(len(classes)), classes, rotation=30, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(classes)), classes)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    axes.spines[:].set_visible(False)
    axes.set_xticks(np.arange(1, len(classes)) - 0.5, minor=True)
    axes.set_yticks(np.arange(1, len(classes)) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=2)
    axes.tick_params(which="both", length=0)
    bar = figure.colorbar(picture, ax=axes, fraction=0.046, pad=0.03)
    bar.ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    bar.set_label("share of the true class")
    bar.outline.set_visible(False)
    if title:
        axes.set_title(title, fontsize=11)
    return save_figure(figure, path)


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
    return column.replace("_", " ")


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


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Write a figure as PNG, cut to what is drawn; returns its path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI, bbox_inches="tight", pad_inches=0.08, metadata=dict([MARK]))
    return path
