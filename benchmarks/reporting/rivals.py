"""How far ours is ahead of everybody else on every row, and where it is not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.harness.comparison import LIMIT
from benchmarks.reporting.results import Key, Quartiles, Results, Row
from magsd_kernels.backends import BACKENDS

#: At least so many times as long every rival must take.
AHEAD = 1.1


@dataclass(frozen=True)
class Rivalry:
    """One rival on one row: quartiles of its time over ours, within rounds."""

    key: Key
    rival: str
    ratio: Quartiles

    def __str__(self) -> str:
        low, middle, high = self.ratio
        return (
            f"{self.key.function} {self.key.direction}, {self.key.size}: "
            f"{middle:.3g}x ({low:.3g} to {high:.3g}) {self.rival}"
        )

    @property
    def low(self) -> float:
        """The lower quartile."""
        return self.ratio[0]


def rivals(row: Row) -> list[str]:
    """Members of a row that are not ours."""
    return [name for name in row.members if name not in (*BACKENDS, LIMIT)]


def rivalries(results: Results) -> Iterator[Rivalry]:
    """Ours against every rival that was timed beside it."""
    for key, row in results.rows.items():
        for rival in rivals(row) if row.ours else ():
            assert row.ours is not None
            found = row.members[row.ours].speedup(rival)
            if found is not None:
                yield Rivalry(key, rival, found)


def shortfalls(results: Results) -> list[str]:
    """What keeps a run from passing strictly, one line each."""
    if not results.rows:
        return ["no row was measured"]
    compared = {rivalry.key for rivalry in rivalries(results)}
    missing = [
        f"{key.function} {key.direction}, {key.size}: ours was compared with no rival"
        for key in results.rows
        if key not in compared
    ]
    return missing + [str(found) for found in rivalries(results) if found.low < AHEAD]
