"""Saved runs of `pytest benchmarks`, read back, and how far ours is ahead of everybody else."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.comparison import LIMIT
from benchmarks.harness.timing import Quartiles
from benchmarks.reporting.text import ratio
from magsd_kernels.backends import BACKENDS

#: At least so many times as long every rival must take.
AHEAD = 1.1


class Key(NamedTuple):
    """What the competitors of one row have in common."""

    function: str
    network: str
    batch: int
    precision: str
    direction: str

    @property
    def size(self) -> str:
        """Network, batch and precision, to be read."""
        return f"{self.network} B {self.batch} {self.precision}"

    def __str__(self) -> str:
        return f"{self.function} {self.direction}, {self.size}"


class Entry(NamedTuple):
    """One member: quartiles of its seconds, their median, and its facts."""

    seconds: Quartiles
    median: float
    facts: dict[str, Any]


@dataclass
class Row:
    """The members of one comparison."""

    operation: str
    members: dict[str, Entry] = field(default_factory=dict)

    @property
    def ours(self) -> str | None:
        """The backend that "auto" takes."""
        return next((name for name, e in self.members.items() if e.facts["ours"]), None)

    def fact(self, name: str) -> Any:
        """Of ours, or None."""
        return self.members[self.ours].facts.get(name) if self.ours else None

    def speedup(self, other: str) -> Quartiles | None:
        """How many times as long as ours the other takes, within a round."""
        found = (self.fact("speedup") or {}).get(other)
        return None if found is None else (found[0], found[1], found[2])

    def kernel(self, name: str | None) -> float | None:
        """Median seconds of a member in a CUDA graph; for the limit those of the copy."""
        if name not in self.members:
            return None
        entry = self.members[name]
        times = entry.seconds if name == LIMIT else entry.facts.get("kernel")
        return None if times is None else float(times[1])


class Results:
    """One or several runs on one machine; what was measured twice counts as measured last."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self.machine: dict[str, str] = {}
        self.runs: list[str] = []
        self.rows: dict[Key, Row] = {}
        self.overhead: dict[str, dict[str, Entry]] = {}
        self._growth: dict[tuple[str, str], dict[int, Entry]] = {}
        for path in paths:
            self._add(path)

    def _add(self, path: Path) -> None:
        saved = json.loads(path.read_text())
        if self.machine and saved["machine_info"] != self.machine:
            raise ValueError(f"{path} is of another machine or of other versions")
        self.machine = saved["machine_info"]
        if run_of(saved) not in self.runs:
            self.runs.append(run_of(saved))
        for bench in saved["benchmarks"]:
            stats, facts = bench["stats"], bench["extra_info"]
            entry = Entry((stats["q1"], stats["median"], stats["q3"]), stats["median"], facts)
            if facts["kind"] == "comparison":
                key = Key(*(facts[name] for name in Key._fields))
                self.rows.setdefault(key, Row(facts["operation"])).members[facts["member"]] = entry
            elif facts["kind"] == "overhead":
                self.overhead.setdefault(facts["direction"], {})[facts["member"]] = entry
            else:
                of = facts["function"], facts["axis"]
                self._growth.setdefault(of, {})[facts["amount"]] = entry

    @property
    def growth(self) -> dict[tuple[str, str], list[Entry]]:
        """Entries from small to large, by function and axis."""
        return {of: [sizes[n] for n in sorted(sizes)] for of, sizes in self._growth.items()}

    def operations(self) -> Iterator[tuple[str, dict[Key, Row]]]:
        """Rows by operation, in the order in which they were measured."""
        for operation in dict.fromkeys(row.operation for row in self.rows.values()):
            yield operation, {k: r for k, r in self.rows.items() if r.operation == operation}

    def rivalries(self) -> Iterator[tuple[Key, str, Quartiles]]:
        """Rows and rivals, who are none of ours, and quartiles of the rival's time over ours."""
        for key, row in self.rows.items():
            for name in row.members:
                found = None if name in (*BACKENDS, LIMIT) else row.speedup(name)
                if found is not None:
                    yield key, name, found

    def shortfalls(self) -> list[str]:
        """What keeps a run from passing strictly, one line each."""
        if not self.rows:
            return ["no row was measured"]
        found = list(self.rivalries())
        compared = {key for key, _, _ in found}
        missing = [f"{k}: ours was compared with no rival" for k in self.rows if k not in compared]
        return missing + [told(*rivalry) for rivalry in found if rivalry[2][0] < AHEAD]


def told(key: Key, rival: str, found: Quartiles) -> str:
    """A rivalry in words."""
    return f"{key}: {ratio(found)} {rival}"


def run_of(saved: dict[str, Any]) -> str:
    """Date and commit."""
    commit = saved["commit_info"]
    dirty = ", with uncommitted changes" if commit["dirty"] else ""
    return f"{saved['datetime'][:10]}, commit {(commit['id'] or '?')[:12]}{dirty}"
