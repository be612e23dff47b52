"""The report in Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.call_overhead import BASELINE
from benchmarks.comparison import LIMIT
from benchmarks.reporting.results import Entry, Key, Results, Row
from benchmarks.reporting.targets import CPU, GPU, Target
from benchmarks.reporting.text import memory, ratio, seconds, table

#: Of a line through points of growth.
FEWEST_POINTS = 3
_NOTES = (
    "Times are medians per call. A ratio is the median of the ratios within single rounds, in"
    " which all competitors take their turn; in brackets its quartiles. The limit is the bytes"
    " that must move over the bandwidth of copies in the same rounds. Memory is the peak of"
    " one call in torch's allocator, results included, inputs not. Everything timed was first"
    " compared with the reference in float64."
)


def render(results: Results, charts: Mapping[str, str]) -> str:
    """The whole report; `charts` names the pictures of the operations, and of "growth"."""
    machine = heading("Benchmarks", results.machine, results.runs)
    judged = verdicts(GPU if "gpu" in results.machine else CPU, results)
    parts = [machine, _NOTES, f"## Targets\n\n{judged}"]
    for operation, rows in results.operations():
        parts += [f"## {operation}", f"![{operation}]({charts[operation]})"]
        functions = dict.fromkeys(key.function for key in rows)
        for function in functions:
            own = {key: row for key, row in rows.items() if key.function == function}
            if len(functions) > 1:
                parts.append(f"### {function}")
            parts += [_times(own), _ratios(own)]
            if any("kernel" in e.facts for row in own.values() for e in row.members.values()):
                parts.append(_kernels(own))
    if results.overhead:
        parts.append(_overhead(results))
    if results.growth:
        parts.append(_growth(results))
    if "growth" in charts:
        parts.append(f"![growth]({charts['growth']})")
    return "\n\n".join(parts) + "\n"


def heading(title: str, machine: dict[str, str], runs: Sequence[str] = ()) -> str:
    """Of a report: the machine, and the runs on it."""
    facts = [*machine.items(), *(("run", run) for run in runs)]
    rows = [(name, str(value)) for name, value in facts]
    return f"# {title}: {machine['machine']}\n\n{table(('', ''), rows)}"


def verdicts(targets: Sequence[Target], measured: Any) -> str:
    """A table of targets."""
    rows = []
    for target in targets:
        text, met = target.judge(measured) or ("", None)
        word = "not measured" if met is None else "met" if met else "**not met**"
        rows.append((target.work, target.required, text, word))
    return table(("work", "must reach", "measured", ""), rows)


def _by_member(
    rows: dict[Key, Row], what: str, names: Iterable[str], cell: Callable[[Row, str], str]
) -> str:
    names = list(dict.fromkeys(names))
    lines = [
        (key.size, key.direction, *(cell(r, name) for name in names)) for key, r in rows.items()
    ]
    return table(("size", what, *names), lines)


def _times(rows: dict[Key, Row]) -> str:
    def cell(row: Row, name: str) -> str:
        entry = row.members.get(name)
        if entry is None:
            return ""
        held = f", {memory(entry.facts['memory'])}" if "memory" in entry.facts else ""
        text = f"{seconds(entry.median)}{held}"
        return f"**{text}**" if name == row.ours else text

    return _by_member(rows, "", (name for row in rows.values() for name in row.members), cell)


def _ratios(rows: dict[Key, Row]) -> str:
    def cell(row: Row, other: str) -> str:
        if (found := row.speedup(other)) is None:
            return ""
        return f"{found[1]:.0%}" if other == LIMIT else ratio(found)

    others = (name for row in rows.values() for name in row.members if name != row.ours)
    return _by_member(rows, "time over ours:", others, cell)


def _kernels(rows: dict[Key, Row]) -> str:
    """On a GPU: what the device does, whatever the host does."""
    lines = []
    for key, row in rows.items():
        for name, entry in row.members.items():
            facts = entry.facts
            if "launches" not in facts:
                continue
            kernel, limit = row.kernel(name), row.kernel(LIMIT)
            counts = []
            for fact in ("launches", "waits"):
                each = [str(facts[f]) for f in (fact, f"backward_{fact}") if f in facts]
                counts.append(" + ".join(each))
            share = f"{limit / kernel:.0%}" if kernel and limit else ""
            time = seconds(kernel) if kernel else ""
            lines.append((key.size, key.direction, name, time, share, *counts))
    head = ("size", "", "", "kernel time", "share of limit", "launches", "host waits")
    return table(head, lines)


def _overhead(results: Results) -> str:
    def cells(name: str) -> Iterable[str]:
        for members in results.overhead.values():
            entry = members.get(name)
            yield seconds(entry.median) if entry else ""
            yield ratio(entry.facts["times_baseline"]) if entry and name != BASELINE else ""

    names = dict.fromkeys(n for members in results.overhead.values() for n in members)
    head = [cell for direction in results.overhead for cell in (direction, f"over {BASELINE}")]
    rows = [(name, *cells(name)) for name in names]
    return "## Call overhead\n\nMaps of one element.\n\n" + table(("", *head), rows)


def fit(amounts: Sequence[float], values: Sequence[float]) -> tuple[float, float, float]:
    """The line with the least relative errors: its value at 0 and its slope.

    And the largest relative distance of a point from it.
    """
    x, y = np.asarray(amounts, float), np.asarray(values, float)
    slope, fixed = np.polyfit(x, y, 1, w=1 / y)
    return float(fixed), float(slope), float(np.abs((fixed + slope * x) / y - 1).max())


def fits(entries: Sequence[Entry]) -> list[tuple[float, float, float]]:
    """Lines through the times and through the memory of one operation's growth."""
    amounts = [entry.facts["amount"] for entry in entries]
    return [fit(amounts, values) for values in points(entries)]


def points(entries: Sequence[Entry]) -> tuple[list[float], list[float]]:
    """Times and memory, of which no logarithm is missing."""
    return [e.median for e in entries], [max(e.facts["memory"], 1) for e in entries]


def _growth(results: Results) -> str:
    lines = []
    for (function, axis), entries in results.growth.items():
        if len(entries) < FEWEST_POINTS:
            continue
        first, last = (entry.facts["amount"] for entry in (entries[0], entries[-1]))
        item, scale, span = "image", 1, f"B {first} to {last}"
        if axis == "side":
            item, scale = "Mpixel", 10**6
            span = f"{first**0.5:.0f}² to {last**0.5:.0f}² pixels"
        (fixed, slope, off), (_, held, held_off) = fits(entries)
        time = f"{seconds(max(fixed, 0))} + {seconds(slope * scale)} per {item}"
        space = f"{memory(held * scale)} per {item}"
        direction = entries[0].facts["direction"]
        lines.append((function, direction, span, time, f"{off:.0%}", space, f"{held_off:.0%}"))
    head = ("", "", "over", "time", "farthest", "memory", "farthest")
    text = "Lines with the least relative errors, and how far the farthest point is from them."
    return f"## Growth\n\n{text}\n\n{table(head, lines)}"
