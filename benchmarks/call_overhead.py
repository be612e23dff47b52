"""What a call costs beside its arithmetic: maps of one element, against torch.lerp with autograd.

Whatever has a gradient records it. The backward adds the engine of autograd, which costs both the
same. A report, with no target.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from unittest import SkipTest

import torch

from benchmarks.harness.contender import Contender, check, definition
from benchmarks.harness.session import Entry, Outcome, Recorder, Session
from benchmarks.harness.sizes import Network
from benchmarks.harness.subject import Row
from benchmarks.harness.timing import Call, interleave, ratios
from benchmarks.operations import SUBJECTS

BASELINE = "torch.lerp"
_ONE = Network("one", channels=1, side=1, features=((4, 1),) * 3, batches=(1,), maps=2, draws=2)


@dataclass(frozen=True)
class Overhead:
    """The baseline and every operation; with the backward, those that have a gradient."""

    device: str
    backward: bool

    def __str__(self) -> str:
        return f"call_overhead-{self._direction}"

    @property
    def _direction(self) -> str:
        return "forward+backward" if self.backward else "forward"

    def members(self) -> Sequence[str]:
        """The baseline and the subjects' names."""
        return (BASELINE, *self._rows())

    def _rows(self) -> dict[str, Row]:
        rows = {
            s.name: Row(s, _ONE, s.least_batch, "float32", self.device, bool(s.case.differentiable))
            for s in SUBJECTS
        }
        return {name: row for name, row in rows.items() if row.backward or not self.backward}

    def measure(self, members: Sequence[str], session: Session) -> dict[str, Outcome]:
        """Time the backend that "auto" takes."""
        facts = {"kind": "overhead", "direction": self._direction}
        outcomes = {name: Outcome(facts | {"member": name}) for name in self.members()}
        calls = {BASELINE: [self._baseline()]}
        for name, row in self._rows().items():
            with outcomes[name].failing():
                if row.backend() == "reference":
                    raise SkipTest("no compiled backend runs here")
                contender = Contender(row.backend(), row, [row.draw(0)])
                check(contender, definition(row, row.draw(0)))
                calls[name] = contender.calls() if self.backward else contender.forwards()
        times = interleave(calls, session.device.synchronize, session.seconds)
        for name, samples in times.items():
            outcomes[name].samples = samples
            outcomes[name].facts["times_baseline"] = ratios(samples, times[BASELINE])
        return outcomes

    def _baseline(self) -> Call:
        start, end = (torch.rand(1, device=self.device, requires_grad=True) for _ in range(2))
        direction = torch.ones(1, device=self.device)
        if not self.backward:
            return partial(torch.lerp, start, end, 0.3)
        return lambda: torch.autograd.grad(torch.lerp(start, end, 0.3), (start, end), direction)


def groups(session: Session) -> list[Overhead]:
    directions = () if session.central else (False, True)
    return [Overhead(session.device.type, backward) for backward in directions]


def test_call_overhead(entry: Entry, record: Recorder) -> None:
    record(entry)
