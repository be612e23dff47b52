"""A row's competitors, checked and then timed against each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.harness.check import check, definition
from benchmarks.harness.session import Outcome, Session
from benchmarks.harness.sizes import MAGSD
from benchmarks.harness.subject import AUTOTUNED, PUBLISHED, Contender, Row, nbytes
from benchmarks.harness.timing import Samples, interleave, ratios

LIMIT = "limit"


@dataclass(frozen=True)
class Comparison:
    """The group of one row: everybody who computes it, and the limit."""

    row: Row

    def __str__(self) -> str:
        return str(self.row)

    @property
    def is_central(self) -> bool:
        """Whether it is of MAG-SD's central operations."""
        return self.row.subject.central and self.row.network.name == MAGSD.name

    def members(self) -> Sequence[str]:
        """Competitors, ours last, and the limit."""
        return (*self.row.competitors(), LIMIT)

    def measure(self, members: Sequence[str], session: Session) -> dict[str, Outcome]:
        """Check every member against the definition, and time those that are right."""
        torch.compiler.reset()
        row = self.row
        first = row.draw(0)
        count = 2 if session.quick else session.device.input_sets(nbytes(first))
        sets = [first, *(row.draw(seed) for seed in range(1, count))]
        expected = definition(row, first)
        outcomes = {name: Outcome(facts=self._facts(name)) for name in members}
        contenders, competitors = {}, row.competitors()
        for name in (name for name in members if name != LIMIT):
            outcomes[name].absent = competitors[name].why_not()
            if outcomes[name].absent is None:
                with outcomes[name].failing():
                    contender = Contender(name, row, sets)
                    check(contender, expected)
                    contenders[name] = contender
        moved = row.moved_bytes(first, expected[0][0].to(row.dtype))
        del expected
        for name, samples in self._times(contenders, session, moved).items():
            if name in outcomes:
                outcomes[name].samples = samples
        if LIMIT in outcomes:
            outcomes[LIMIT].facts["bytes"] = moved
        for name, contender in contenders.items():
            outcomes[name].facts["speedup"] = _speedups(name, outcomes)
            with outcomes[name].failing():
                outcomes[name].facts |= _read_off(contender, session)
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

    def _times(
        self, contenders: dict[str, Contender], session: Session, moved: int
    ) -> dict[str, Samples]:
        """Samples of every contender, and those of the limit from copies in the same rounds."""
        copy, copied = session.device.copy(session.quick)
        calls = {name: contender.calls() for name, contender in contenders.items()}
        with torch.set_grad_enabled(self.row.backward):
            times = interleave(calls | {LIMIT: [copy]}, session.device.synchronize, session.seconds)
        limit = times[LIMIT]
        scaled = [seconds * moved / copied for seconds in limit.seconds]
        return times | {LIMIT: Samples(scaled, limit.iterations)}


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


def _speedups(name: str, outcomes: dict[str, Outcome]) -> dict[str, tuple[float, float, float]]:
    """Quartiles of how many times as long as this member the others take in the same round."""
    mine = outcomes[name].samples
    assert mine is not None
    return {
        other: ratios(outcome.samples, mine)
        for other, outcome in outcomes.items()
        if other != name and outcome.samples is not None
    }
