"""Saved runs of `pytest benchmarks`, read back."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.harness.comparison import LIMIT

Quartiles = tuple[float, float, float]


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


@dataclass(frozen=True)
class Entry:
    """One member: quartiles of its seconds, and its facts."""

    seconds: Quartiles
    facts: dict[str, Any]

    @property
    def median(self) -> float:
        """Seconds."""
        return self.seconds[1]

    def speedup(self, other: str) -> Quartiles | None:
        """How many times as long as this one the other takes, within a round."""
        found = self.facts.get("speedup", {}).get(other)
        return None if found is None else (found[0], found[1], found[2])


@dataclass
class Row:
    """The members of one comparison."""

    operation: str
    members: dict[str, Entry] = field(default_factory=dict)

    @property
    def ours(self) -> str | None:
        """The backend that "auto" takes."""
        return next((name for name, e in self.members.items() if e.facts["ours"]), None)

    def kernel(self, name: str) -> float | None:
        """Median seconds of a member in a CUDA graph; for the limit those of the copy."""
        entry = self.members.get(name)
        if entry is None:
            return None
        if name == LIMIT:
            return entry.median
        kernel = entry.facts.get("kernel")
        return None if kernel is None else float(kernel[1])


class Results:
    """One or several runs on one machine; what was measured twice counts as measured last."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self.machine: dict[str, str] = {}
        self.runs: list[str] = []
        self.rows: dict[Key, Row] = {}
        self.overhead: dict[str, dict[str, Entry]] = {}
        self.growth: dict[tuple[str, str], list[Entry]] = {}
        for path in paths:
            self._add(path)
        for entries in self.growth.values():
            entries.sort(key=lambda entry: entry.facts["amount"])

    def _add(self, path: Path) -> None:
        saved = json.loads(path.read_text())
        if self.machine and saved["machine_info"] != self.machine:
            raise ValueError(f"{path} is of another machine or of other versions")
        self.machine = saved["machine_info"]
        commit = saved["commit_info"]
        dirty = ", with uncommitted changes" if commit["dirty"] else ""
        run = f"{saved['datetime'][:10]}, commit {(commit['id'] or '?')[:12]}{dirty}"
        if run not in self.runs:
            self.runs.append(run)
        for bench in saved["benchmarks"]:
            stats, facts = bench["stats"], bench["extra_info"]
            entry = Entry((stats["q1"], stats["median"], stats["q3"]), facts)
            if facts["kind"] == "comparison":
                key = Key(*(facts[name] for name in Key._fields))
                row = self.rows.setdefault(key, Row(facts["operation"]))
                row.members[facts["member"]] = entry
            elif facts["kind"] == "overhead":
                members = self.overhead.setdefault(facts["direction"], {})
                members[facts["member"]] = entry
            else:
                kept = self.growth.setdefault((facts["function"], facts["axis"]), [])
                kept[:] = [e for e in kept if e.facts["amount"] != facts["amount"]] + [entry]

    def operations(self) -> Iterator[tuple[str, dict[Key, Row]]]:
        """Rows by operation, in the order in which they were measured."""
        for operation in dict.fromkeys(row.operation for row in self.rows.values()):
            yield operation, {k: r for k, r in self.rows.items() if r.operation == operation}
