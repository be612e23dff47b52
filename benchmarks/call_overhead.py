"""What a call costs beside its arithmetic: maps of one element, against torch.lerp with autograd.

Whatever has a gradient records it. The backward adds the engine of autograd, which costs both the
same. A report, with no target.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from benchmarks import (
    attention_augment,
    attention_sampling,
    bilinear_pool,
    multiscale_attention,
    soft_distance,
)
from benchmarks.harness.check import check, definition
from benchmarks.harness.recording import Entry, Recorder
from benchmarks.harness.session import Outcome, Session
from benchmarks.harness.sizes import PRECISIONS, Network
from benchmarks.harness.subject import Contender, Row, Subject
from benchmarks.harness.timing import Call, interleave, quartiles
from magsd_kernels.backends import select

BASELINE = "torch.lerp"
SUBJECTS: tuple[Subject, ...] = (
    *multiscale_attention.SUBJECTS,
    *bilinear_pool.SUBJECTS,
    *attention_sampling.SUBJECTS,
    *attention_augment.SUBJECTS,
    *soft_distance.SUBJECTS,
)
_ONE = Network("one", channels=1, side=1, features=((4, 1),) * 3, batches=(1,), maps=2)


@dataclass(frozen=True)
class Overhead:
    """The baseline and every operation; with the backward, those that have a gradient."""

    device: str
    backward: bool

    def __str__(self) -> str:
        return "call_overhead-" + ("forward+backward" if self.backward else "forward")

    def members(self) -> Sequence[str]:
        """The baseline and the subjects' names."""
        return (BASELINE, *self._rows())

    def _rows(self) -> dict[str, Row]:
        return {
            subject.name: Row(
                subject,
                _ONE,
                subject.least_batch,
                PRECISIONS["float32"],
                self.device,
                backward=bool(subject.differentiable),
            )
            for subject in SUBJECTS
            if subject.differentiable or not self.backward
        }

    def measure(self, members: Sequence[str], session: Session) -> dict[str, Outcome]:
        """Time the backend that "auto" takes."""
        outcomes = {BASELINE: Outcome(facts=self._facts(BASELINE))}
        calls = {BASELINE: [self._baseline()]}
        for name, row in self._rows().items():
            outcomes[name] = Outcome(facts=self._facts(name))
            backend = select(row.subject.operation, "auto", torch.empty(0, device=self.device))
            if backend == "reference":
                outcomes[name].absent = "no compiled backend runs here"
                continue
            try:
                contender = Contender(backend, row, [row.draw(0)])
                check(contender, definition(row, row.draw(0)))
                calls[name] = contender.calls() if self.backward else contender.forwards()
            except Exception as error:  # the test of this member raises it
                outcomes[name].error = error
        times = interleave(calls, session.device.synchronize, session.seconds)
        for name, samples in times.items():
            pairs = zip(samples.seconds, times[BASELINE].seconds, strict=True)
            outcomes[name].samples = samples
            outcomes[name].facts["times_baseline"] = quartiles([mine / its for mine, its in pairs])
        return outcomes

    def _facts(self, name: str) -> dict[str, str]:
        direction = "forward+backward" if self.backward else "forward"
        return {"kind": "overhead", "direction": direction, "member": name}

    def _baseline(self) -> Call:
        start, end = (torch.rand(1, device=self.device, requires_grad=True) for _ in range(2))
        direction = torch.ones(1, device=self.device)
        if not self.backward:
            return partial(torch.lerp, start, end, 0.3)
        return lambda: torch.autograd.grad(torch.lerp(start, end, 0.3), (start, end), direction)


def groups(session: Session) -> list[Overhead]:
    return [Overhead(session.device.type, backward) for backward in (False, True)]


def test_call_overhead(entry: Entry, record: Recorder) -> None:
    record(entry)
