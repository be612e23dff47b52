"""From the samples of a group to one pytest-benchmark entry per member."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
from torch.utils import _pytree as pytree

from benchmarks.harness.session import Group, Session


class Entry(NamedTuple):
    """One test: a member of a group."""

    group: Group
    member: str


class Recorder:
    """Puts a member's samples and facts into pytest-benchmark, or fails, or skips."""

    def __init__(self, session: Session, benchmark: Any, items: list[pytest.Item]) -> None:
        self._session = session
        self._benchmark = benchmark
        self._items = items

    def __call__(self, entry: Entry) -> None:
        """Record; the first call for a group measures all its collected members."""
        specs = [getattr(item, "callspec", None) for item in self._items]
        entries = [spec.params.get("entry") for spec in specs if spec is not None]
        members = [other.member for other in entries if other and other.group is entry.group]
        outcome = self._session.outcomes(entry.group, members)[entry.member]
        if outcome.absent is not None:
            pytest.skip(outcome.absent)
        if outcome.error is not None:
            raise outcome.error
        assert outcome.samples is not None
        seconds = iter(outcome.samples.seconds)
        self._benchmark.pedantic(
            self._session.clock.advance,
            setup=lambda: ((next(seconds),), {}),
            rounds=len(outcome.samples.seconds),
        )
        self._benchmark.extra_info.update(outcome.facts, iterations=outcome.samples.iterations)


def rounded(facts: dict[str, Any]) -> dict[str, Any]:
    """Five digits are more than any figure here is good for."""
    found: dict[str, Any] = pytree.tree_map_only(float, lambda x: float(f"{x:.5g}"), facts)
    return found


def write(path: Path, text: str) -> None:
    """All of it or nothing: a reader never finds half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    begun = path.with_name(f"{path.name}.begun")
    begun.write_text(text)
    begun.replace(path)
