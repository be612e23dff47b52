"""The page's charts: small panels of one size as inline SVG, which the page lays out in rows."""

from __future__ import annotations

import io
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from numpy.typing import NDArray

# Color-blind safe (Okabe and Ito, 2008), and of different lightness in gray.
BLUE, ORANGE, GRAY = "#0072B2", "#D55E00", "#767676"
# Replaced by the page's own color of text, so that charts can be read on a dark page.
_INK = "#010203"
_GRID = "#bbbbbb"
_STYLES = ("-", "--", ":", "-.")
_COLORS = (BLUE, ORANGE, "#009E73", "#CC79A7")
# What a panel is at most wide, in small letters: longer names are shortened in their middle.
_LONGEST = 34
_WIDE, _NARROW = frozenset("MWmw@%\u2014\u2026"), frozenset(" ijlfrtI|.,:;'()[]-")
_SETTINGS: Any = {
    "svg.fonttype": "none",  # text stays text: searchable, and set in the page's font
    "svg.hashsalt": "magsd",
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "text.color": _INK,
    "text.parse_math": False,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.linewidth": 0.6,
    "axes.unicode_minus": True,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "path.simplify": True,
}
Values = Sequence[float] | NDArray[np.float64]


@dataclass(frozen=True)
class Line:
    """One line of a panel: x and y (M,), its name in the legend, and a band (M,) where known."""

    x: Values
    y: Values
    name: str = ""
    low: Values | None = None
    high: Values | None = None
    steps: bool = False


@dataclass(frozen=True)
class Interval:
    """One row of `intervals`: a value with its limits (NaN: none), hollow where marked."""

    name: str
    value: float
    low: float
    high: float
    marked: bool = False


def curve(
    title: str,
    lines: Sequence[Line],
    *,
    x: str,
    y: str,
    note: str = "",
    points: Sequence[tuple[float, float]] = (),
    chance: tuple[tuple[float, float], tuple[float, float]] | None = None,
) -> Markup:
    """A panel of the unit square, for ROC and precision-recall curves.

    note: text within, e.g. the area. points: marked, e.g. operating points. chance: ends (x, y) of
    a gray line.
    """
    with matplotlib.rc_context(_SETTINGS):
        figure, axes = _panel(title)
        if chance is not None:
            axes.plot(*zip(*chance, strict=True), color=GRAY, lw=0.8, ls=(0, (1, 2)))
        _lines(axes, lines)
        for px, py in points:
            axes.plot(px, py, "o", ms=5, mfc="white", mec=_INK, mew=1.1, zorder=5, clip_on=False)
        _unit(axes, x, y)
        if note:
            right = x.startswith("1") or x.startswith("false")
            place = (0.97, 0.05, "right") if right else (0.04, 0.05, "left")
            axes.text(*place[:2], note, ha=place[2], transform=axes.transAxes, linespacing=1.4)
        if sum(bool(line.name) for line in lines) > 1:
            axes.legend(loc="center right", handlelength=1.8)
        return _svg(figure, title)


def reliability(title: str, lines: Sequence[Line], *, note: str = "") -> Markup:
    """Observed share over predicted probability, bins as dots; the diagonal is perfect."""
    with matplotlib.rc_context(_SETTINGS):
        figure, axes = _panel(title)
        axes.plot([0, 1], [0, 1], color=GRAY, lw=0.8, ls=(0, (1, 2)))
        for k, line in enumerate(lines):
            color = _COLORS[k % len(_COLORS)]
            x, y = np.asarray(line.x), np.asarray(line.y)
            if line.low is not None and line.high is not None:
                axes.vlines(x, line.low, line.high, color=color, lw=0.8, alpha=0.6)
            axes.plot(
                x,
                y,
                color=color,
                marker="os^D"[k % 4],
                ms=4.5,
                mfc="white" if k else color,
                ls=_STYLES[k % 4],
                lw=1.1,
                label=line.name,
                clip_on=False,
            )
        _unit(axes, "predicted probability", "observed share")
        if note:
            axes.text(0.97, 0.05, note, ha="right", transform=axes.transAxes, linespacing=1.4)
        axes.legend(loc="upper left", handlelength=2.2)
        return _svg(figure, title)


def decision(title: str, lines: Sequence[Line]) -> Markup:
    """Net benefit over the threshold probability; what lies far below zero is cut off."""
    with matplotlib.rc_context(_SETTINGS):
        figure, axes = _panel(title)
        axes.axhline(0, color=GRAY, lw=0.8)
        _lines(axes, lines)
        top = max([0.01, *(float(np.nanmax(line.y)) for line in lines if len(line.y))])
        axes.set_ylim(-0.25 * top, 1.08 * top)
        axes.set_xlim(0, 1)
        axes.set_xlabel("threshold probability")
        axes.set_ylabel("net benefit")
        axes.spines[["top", "right"]].set_visible(False)
        axes.locator_params(axis="y", nbins=5)
        axes.legend(loc="best", handlelength=1.8)
        return _svg(figure, title)


def intervals(
    title: str, rows: Sequence[Interval], *, x: str, reference: float | None = None
) -> Markup:
    """Values with their intervals, a row each; a vertical line at `reference`."""
    with matplotlib.rc_context(_SETTINGS):
        height = 0.62 + 0.23 * len(rows)
        names = [shorten(row.name) for row in rows]
        # Inches: a small letter of this size is at most 0.07 wide.
        left = 0.15 + 0.07 * max(sum(map(_width, name)) for name in names)
        width = left + 2.8
        figure = Figure(figsize=(width, height))
        FigureCanvasSVG(figure)
        axes = figure.add_axes((left / width, 0.42 / height, 2.68 / width, 1 - 0.62 / height))
        if reference is not None:
            axes.axvline(reference, color=GRAY, lw=0.8, ls=(0, (1, 2)))
        for place, row in enumerate(rows):
            face = "white" if row.marked else BLUE
            axes.hlines(place, row.low, row.high, color=BLUE, lw=1.3)
            axes.plot(row.value, place, "D", ms=5, mfc=face, mec=BLUE, mew=1.1, clip_on=False)
        axes.set_yticks(range(len(rows)), names)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.margins(x=0.06)
        axes.locator_params(axis="x", nbins=6)
        axes.tick_params(axis="y", length=0)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.grid(axis="x", color=_GRID, lw=0.4)
        axes.set_axisbelow(True)
        axes.set_xlabel(x)
        return _svg(figure, title)


def shorten(name: str, longest: int = _LONGEST) -> str:
    """A name of printable characters, shortened in its middle.

    longest: how many small letters would be as wide; other characters count by their width.
    """
    name = "".join(character if character.isprintable() else "\ufffd" for character in name)
    if sum(map(_width, name)) <= longest:
        return name
    head = _fitting(name, longest // 2 - 1)
    tail = _fitting(name[::-1], longest - longest // 2)
    return f"{name[:head]}…{name[len(name) - tail :]}"


def _fitting(name: str, width: float) -> int:
    """How many of the first characters are together at most so wide."""
    return sum(total <= width for total in accumulate(map(_width, name)))


def _width(character: str) -> float:
    """Of the page's fonts, roughly and rather too wide; a small letter has 1."""
    if unicodedata.combining(character):
        return 0.0
    if unicodedata.east_asian_width(character) in "WF":
        return 2.0
    if character in _WIDE:
        return 1.75
    if character in _NARROW:
        return 0.6
    return 1.25 if character.isupper() else 1.0


def _panel(title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(3.3, 3.2))
    FigureCanvasSVG(figure)
    axes = figure.add_axes((0.165, 0.145, 0.8, 0.765))
    axes.set_title(shorten(title), fontsize=9.5, loc="left", x=-0.13, fontweight="bold")
    axes.grid(color=_GRID, lw=0.4)
    axes.set_axisbelow(True)
    return figure, axes


def _lines(axes: Axes, lines: Sequence[Line]) -> None:
    for k, line in enumerate(lines):
        color = _COLORS[k % len(_COLORS)]
        if line.low is not None and line.high is not None:
            axes.fill_between(line.x, line.low, line.high, color=color, alpha=0.18, lw=0)
        axes.plot(
            line.x,
            line.y,
            color=color,
            lw=1.5,
            ls=_STYLES[k % len(_STYLES)],
            label=line.name or None,
            drawstyle="steps-post" if line.steps else "default",
            solid_joinstyle="round",
        )


def _unit(axes: Axes, x: str, y: str) -> None:
    axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), xlabel=x, ylabel=y)
    ticks = np.linspace(0, 1, 6)
    axes.set_xticks(ticks, [f"{t:.1f}" for t in ticks])
    axes.set_yticks(ticks, [f"{t:.1f}" for t in ticks])
    axes.spines[["top", "right"]].set_visible(False)


def _svg(figure: Figure, label: str) -> Markup:
    """The figure as an element of the page: no prolog, no ids that another chart has, too."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, count=1, flags=re.DOTALL)
    # In XML text "<" is always escaped: no name of a class can look like the tags below.
    text = re.sub(r'<g id="[^"]*">', "<g>", text)
    text = text.replace(_INK, "currentColor")
    head, _, rest = text.partition(">")
    box = re.search(r'viewBox="[^"]*"', head)
    size = re.search(r'width="([\d.]+)pt"', head)
    assert box is not None
    assert size is not None
    width = float(size[1]) * 4 / 3
    start = Markup('<svg {} width="{}" role="img" aria-label="{}">').format(
        Markup(box[0]), f"{width:.0f}", label
    )
    return start + Markup(rest)
