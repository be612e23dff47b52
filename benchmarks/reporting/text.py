"""Figures and tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from benchmarks.harness.timing import Quartiles


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


def ratio(found: Quartiles) -> str:
    """The median, in brackets the quartiles."""
    low, middle, high = found
    return f"{middle:.3g}x ({low:.3g} to {high:.3g})"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """With a line for every row."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
