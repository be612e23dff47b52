"""The report in Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.call_overhead import BASELINE
from benchmarks.harness.comparison import LIMIT
from benchmarks.reporting.results import Entry, Key, Quartiles, Results, Row
from benchmarks.reporting.targets import targets

_FEWEST_POINTS = 3


def render(results: Results, charts: Callable[[str], str | None]) -> str:
    """The whole report; `charts` names the picture of an operation, or of "growth"."""
    parts = [_head(results), _verdicts(results)]
    for operation, rows in results.operations():
        parts.append(f"## {operation}")
        parts.extend(_picture(charts(operation), operation))
        functions = dict.fromkeys(key.function for key in rows)
        for function in functions:
            own = {key: row for key, row in rows.items() if key.function == function}
            if len(functions) > 1:
                parts.append(f"### {function}")
            parts.extend([_times(own), _ratios(own)])
            if any("kernel" in e.facts for row in own.values() for e in row.members.values()):
                parts.append(_kernels(own))
    if results.overhead:
        parts.append(_overhead(results))
    if results.growth:
        parts.append(_growth(results))
        parts.extend(_picture(charts("growth"), "growth"))
    return "\n\n".join(parts) + "\n"


def seconds(value: float) -> str:
    """Three digits and a unit."""
    return _scaled(value, (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6), ("ns", 1e-9)))


def memory(value: float) -> str:
    """Three digits and a unit."""
    return _scaled(value, (("GiB", 2.0**30), ("MiB", 2.0**20), ("KiB", 2.0**10), ("B", 1.0)))


def _scaled(value: float, units: Sequence[tuple[str, float]]) -> str:
    unit, size = next((pair for pair in units if value >= pair[1]), units[-1])
    number = value / size
    return f"{number:.3g} {unit}" if number < 999.5 else f"{number:.0f} {unit}"


@dataclass(frozen=True)
class Line:
    """`fixed + slope * amount`, and the largest relative distance of a point from it."""

    fixed: float
    slope: float
    off: float


def fit(amounts: Sequence[float], values: Sequence[float]) -> Line:
    """The line with the least relative errors."""
    x, y = np.asarray(amounts, float), np.asarray(values, float)
    slope, fixed = np.polyfit(x, y, 1, w=1 / y)
    return Line(float(fixed), float(slope), float(np.abs((fixed + slope * x) / y - 1).max()))


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _picture(path: str | None, operation: str) -> list[str]:
    return [f"![{operation}]({path})"] if path else []


def _head(results: Results) -> str:
    facts = [*results.machine.items(), *(("run", run) for run in results.runs)]
    notes = (
        "Times are medians per call. A ratio is the median of the ratios within single rounds, in"
        " which all competitors take their turn; in brackets its quartiles. The limit is the bytes"
        " that must move over the bandwidth of copies in the same rounds. Memory is the peak of"
        " one call in torch's allocator, results included, inputs not. Everything timed was first"
        " compared with the reference in float64."
    )
    machine = table(("", ""), [(name, str(value)) for name, value in facts])
    return f"# Benchmarks: {results.machine['machine']}\n\n{machine}\n\n{notes}"


def _verdicts(results: Results) -> str:
    rows = []
    for target in targets(results):
        verdict = target.judge(results)
        measured, met = ("", "not measured")
        if verdict is not None:
            measured, met = verdict.measured, "met" if verdict.met else "**not met**"
        rows.append((target.work, target.required, measured, met))
    return "## Targets\n\n" + table(("work", "must reach", "measured", ""), rows)


def _names(rows: dict[Key, Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows.values() for name in row.members))


def _times(rows: dict[Key, Row]) -> str:
    names = _names(rows)

    def cell(row: Row, name: str) -> str:
        entry = row.members.get(name)
        if entry is None:
            return ""
        text = seconds(entry.median)
        if "memory" in entry.facts:
            text += f", {memory(entry.facts['memory'])}"
        return f"**{text}**" if name == row.ours else text

    return table(
        ("size", "", *names),
        [
            (key.size, key.direction, *(cell(row, name) for name in names))
            for key, row in rows.items()
        ],
    )


def _ratios(rows: dict[Key, Row]) -> str:
    others = [n for n in _names(rows) if any(n != row.ours for row in rows.values())]

    def cell(row: Row, other: str) -> str:
        found = row.members[row.ours].speedup(other) if row.ours else None
        return "" if found is None else ratio(found, other == LIMIT)

    return table(
        ("size", "time over ours:", *others),
        [
            (key.size, key.direction, *(cell(row, other) for other in others))
            for key, row in rows.items()
        ],
    )


def ratio(found: Quartiles, share: bool) -> str:
    low, middle, high = found
    if share:
        return f"{middle:.0%}"
    return f"{middle:.3g}x ({low:.3g} to {high:.3g})"


def _kernels(rows: dict[Key, Row]) -> str:
    """On a GPU: what the device does, whatever the host does."""
    lines = []
    for key, row in rows.items():
        for name, entry in row.members.items():
            facts = entry.facts
            if "launches" not in facts:
                continue
            kernel, limit = row.kernel(name), row.kernel(LIMIT)
            share = f"{limit / kernel:.0%}" if kernel and limit else ""
            pair = [
                f"{facts[fact]}" + (f" + {facts[back]}" if back in facts else "")
                for fact, back in (("launches", "backward_launches"), ("waits", "backward_waits"))
            ]
            lines.append(
                (key.size, key.direction, name, seconds(kernel) if kernel else "", share, *pair)
            )
    head = ("size", "", "", "kernel time", "share of limit", "launches", "host waits")
    return table(head, lines)


def _overhead(results: Results) -> str:
    directions = list(results.overhead)
    names = dict.fromkeys(n for members in results.overhead.values() for n in members)

    def cells(name: str) -> Iterable[str]:
        for direction in directions:
            entry = results.overhead[direction].get(name)
            yield seconds(entry.median) if entry else ""
            yield (
                "" if not entry or name == BASELINE else ratio(entry.facts["times_baseline"], False)
            )

    head = [cell for direction in directions for cell in (direction, f"over {BASELINE}")]
    return "## Call overhead\n\nMaps of one element.\n\n" + table(
        ("", *head), [(name, *cells(name)) for name in names]
    )


def _growth(results: Results) -> str:
    lines = []
    for (function, axis), entries in results.growth.items():
        if len(entries) < _FEWEST_POINTS:
            continue
        amounts = [entry.facts["amount"] for entry in entries]
        item, scale = ("image", 1) if axis == "batch" else ("Mpixel", 10**6)
        time = fit(amounts, [entry.median for entry in entries])
        held = fit(amounts, [max(entry.facts["memory"], 1) for entry in entries])
        lines.append(
            (
                function,
                entries[0].facts["direction"],
                _span(axis, entries),
                f"{seconds(max(time.fixed, 0))} + {seconds(time.slope * scale)} per {item}",
                f"{time.off:.0%}",
                f"{memory(held.slope * scale)} per {item}",
                f"{held.off:.0%}",
            )
        )
    head = ("", "", "over", "time", "farthest", "memory", "farthest")
    text = "Lines with the least relative errors, and how far the farthest point is from them."
    return f"## Growth\n\n{text}\n\n" + table(head, lines)


def _span(axis: str, entries: Sequence[Entry]) -> str:
    first, last = (entry.facts["amount"] for entry in (entries[0], entries[-1]))
    if axis == "batch":
        return f"B {first} to {last}"
    return f"{first**0.5:.0f}² to {last**0.5:.0f}² pixels"
