"""Time and memory over the batch, and over the pixels of one image: both must grow linearly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from unittest import SkipTest

import torch

from benchmarks.harness.contender import Contender, check, definition
from benchmarks.harness.session import Entry, Outcome, Recorder, Session
from benchmarks.harness.subject import Row, Subject
from benchmarks.harness.timing import interleave
from benchmarks.operations import SUBJECTS

_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
_SIDES = (1, 2, 4, 8)  # times the published side, so 64 times the pixels
_CHECKED = 4  # sizes up to this one are compared with the definition
_CALL_SHARE = 0.1  # of a group's time that one call of its largest size may take


@dataclass(frozen=True)
class Growth:
    """One operation at growing sizes; with its backward where training needs that."""

    subject: Subject
    axis: str
    sizes: tuple[int, ...]
    device: str

    def __str__(self) -> str:
        return f"growth-{self.subject.name.replace(' ', '_')}-{self.axis}"

    def members(self) -> Sequence[str]:
        """The sizes."""
        return [str(size) for size in self.sizes]

    def measure(self, members: Sequence[str], session: Session) -> dict[str, Outcome]:
        """Time the backend that "auto" takes, up to the size that still fits in the time."""
        rows = {name: self._row(int(name)) for name in members}
        outcomes = {name: Outcome(self._facts(name, row)) for name, row in rows.items()}
        calls = {}
        budget = session.seconds / 2  # many groups, and a line through many points needs less
        seconds = 0.0
        for name, row in rows.items():
            with outcomes[name].failing(), torch.set_grad_enabled(row.backward):
                if 2 * seconds > _CALL_SHARE * budget:
                    raise SkipTest(f"one call takes longer than {_CALL_SHARE * budget:g} s")
                arguments = row.draw(0)
                contender = Contender(row.backend(), row, [arguments])
                if int(name) <= _CHECKED:
                    check(contender, definition(row, arguments))
                (call,) = calls[name] = contender.calls()
                session.device.seconds(call)  # the first takes longer
                seconds = session.device.seconds(call)
        with torch.set_grad_enabled(self._backward):
            times = interleave(calls, session.device.synchronize, budget)
            for name, samples in times.items():
                outcomes[name].samples = samples
                outcomes[name].facts["memory"] = session.device.peak_memory(calls[name][0])
        return outcomes

    @property
    def _backward(self) -> bool:
        """In training the images ask for no gradient."""
        leaves = self.subject.case.differentiable
        return bool(leaves) and "images" not in leaves

    def _row(self, size: int) -> Row:
        network, batch = self.subject.networks[0], size
        if self.axis == "side":
            network, batch = network.scaled(size), 1
        return Row(self.subject, network, batch, "float32", self.device, self._backward)

    def _facts(self, name: str, row: Row) -> dict[str, Any]:
        return {
            "kind": "growth",
            "function": self.subject.name,
            "direction": row.direction,
            "axis": self.axis,
            # What time and memory must be linear in.
            "amount": row.batch if self.axis == "batch" else row.network.side**2,
            "member": name,
        }


def groups(session: Session) -> list[Growth]:
    if session.central:
        return []
    batches, sides = (_BATCHES[:4], _SIDES[:2]) if session.quick else (_BATCHES, _SIDES)
    device = session.device.type
    over_batch = [Growth(subject, "batch", batches, device) for subject in SUBJECTS]
    # The loss has no pixels.
    pictorial = [subject for subject in SUBJECTS if subject.operation != "soft_distance"]
    return [*over_batch, *(Growth(subject, "side", sides, device) for subject in pictorial)]


def test_growth(entry: Entry, record: Recorder) -> None:
    record(entry)
