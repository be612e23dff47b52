"""One operation against everybody who computes the same, checked and then timed in turn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from unittest import SkipTest

import torch

from benchmarks.harness.contender import Contender, Wanted, check, definition
from benchmarks.harness.session import Entry, Outcome, Recorder, Session
from benchmarks.harness.sizes import MAGSD
from benchmarks.harness.subject import AUTOTUNED, PUBLISHED, Row, nbytes
from benchmarks.harness.timing import Samples, interleave, ratios
from benchmarks.operations import SUBJECTS
from magsd_kernels.cases import Arguments

LIMIT = "limit"


@dataclass(frozen=True)
class Comparison:
    """The group of one row: everybody who computes it, and the limit."""

    row: Row

    def __str__(self) -> str:
        return str(self.row)

    def members(self) -> Sequence[str]:
        """Competitors, ours last, and the limit."""
        return (*self.row.competitors(), LIMIT)

    def measure(self, members: Sequence[str], session: Session) -> dict[str, Outcome]:
        """Check every member against the definition, and time those that are right."""
        torch.compiler.reset()
        row, device = self.row, session.device
        first = row.draw(0)
        count = 2 if session.quick else device.input_sets(nbytes(first))
        sets = [first, *(row.draw(seed) for seed in range(1, count))]
        expected = definition(row, first)
        moved = row.moved_bytes(first, expected[0][0].to(row.dtype))
        outcomes = {name: Outcome(self._facts(name)) for name in members}
        contenders = {}
        for name in (name for name in members if name != LIMIT):
            with outcomes[name].failing():
                contenders[name] = _checked(name, row, sets, expected)
        del expected
        copy, copied = device.copy(session.quick)
        calls = {name: contenders[name].calls() for name in members if name in contenders}
        with torch.set_grad_enabled(row.backward):
            times = interleave(calls | {LIMIT: [copy]}, device.synchronize, session.seconds)
        copies = times[LIMIT]
        times[LIMIT] = Samples([s * moved / copied for s in copies.seconds], copies.iterations)
        for name in outcomes.keys() & times.keys():
            outcomes[name].samples = times[name]
        for name, contender in contenders.items():
            outcomes[name].facts["speedup"] = {
                other: ratios(times[other], times[name])
                for other in members
                if other != name and other in times
            }
            with outcomes[name].failing():
                outcomes[name].facts |= _read_off(contender, session)
        if LIMIT in outcomes:
            outcomes[LIMIT].facts["bytes"] = moved
        return outcomes

    def _facts(self, name: str) -> dict[str, Any]:
        row = self.row
        return {
            "kind": "comparison",
            "function": row.subject.name,
            "operation": row.subject.operation,
            "network": row.network.name,
            "batch": row.batch,
            "precision": row.precision,
            "direction": row.direction,
            "member": name,
            "ours": name == row.backend(),
        }


def _checked(name: str, row: Row, sets: Sequence[Arguments], expected: list[Wanted]) -> Contender:
    """Raises SkipTest where it cannot run here, WrongResult where it is wrong."""
    why = row.competitors()[name].why_not()
    if why is not None:
        raise SkipTest(why)
    contender = Contender(name, row, sets)
    check(contender, expected)
    return contender


def _read_off(contender: Contender, session: Session) -> dict[str, Any]:
    """Peak memory; on a GPU also kernel time, launches and waits."""
    device = session.device
    backward = contender.row.backward
    with torch.set_grad_enabled(backward):
        facts: dict[str, Any] = {"memory": device.peak_memory(contender.calls()[0])}
        if device.type != "cuda":
            return facts
        held = []
        activity = device.activity(lambda: held.append(contender.forward(0)))
        facts["launches"], facts["waits"] = activity
        if backward:
            activity = device.activity(lambda: contender.backward(0, held[0]))
            facts["backward_launches"], facts["backward_waits"] = activity
        held.clear()
        # The one waits for the host, the other replays graphs of its own.
        if contender.name not in (PUBLISHED, AUTOTUNED):
            facts["kernel"] = device.kernel_seconds(contender.calls())
    return facts


def groups(session: Session) -> list[Comparison]:
    """Every row, or those of MAG-SD's central operations alone."""
    rows = session.rows(SUBJECTS)
    if session.central:
        rows = [row for row in rows if row.subject.central and row.network is MAGSD]
    return [Comparison(row) for row in rows]


def test_comparison(entry: Entry, record: Recorder) -> None:
    record(entry)
