"""One run: its options, what it measures, and what came out."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol
from unittest import SkipTest

from benchmarks.harness.device import Device
from benchmarks.harness.machine import provenance, rounded, write
from benchmarks.harness.sizes import Network
from benchmarks.harness.subject import Row, Subject
from benchmarks.harness.timing import Replay, Samples, quartiles


@dataclass
class Outcome:
    """Of one member of a group: facts and samples, or why there are none.

    error: a SkipTest where the member is absent; else it failed.
    """

    facts: dict[str, Any]
    samples: Samples | None = None
    error: Exception | None = None

    @contextlib.contextmanager
    def failing(self) -> Iterator[None]:
        """What is raised inside is raised again by the test of this member."""
        try:
            yield
        except Exception as error:
            self.error = error


class Group(Protocol):
    """Members that are timed in turn; `str` names it."""

    def members(self) -> Sequence[str]:
        """Names of all members."""

    def measure(self, members: Sequence[str], session: Session) -> dict[str, Outcome]:
        """Check and time some of them together."""


class Entry(NamedTuple):
    """One test: a member of a group."""

    group: Group
    member: str


#: Puts what an entry came to into pytest-benchmark, or fails, or skips.
Recorder = Callable[[Entry], None]


@dataclass
class Session:
    """Options of a run.

    Attributes:
        device: that everything runs on.
        seconds: about how long the timing of one group takes.
        batches, precisions: for all subjects; empty means what the device and the subject suggest.
        quick: small sizes and few rounds, to see that everything works.
        autotuned: whether max-autotune competes, too, which takes minutes for a row.
        folder: of a file for each group, written as soon as it is measured; None: nowhere.
        again: whether groups are measured once more whose file tells of a failure.
        central: whether MAG-SD's central operations are all that is measured.
    """

    device: Device
    seconds: float
    batches: Sequence[int] = ()
    precisions: Sequence[str] = ()
    quick: bool = False
    autotuned: bool = False
    folder: Path | None = None
    again: bool = False
    central: bool = False
    clock: Replay = field(default_factory=Replay)
    _measured: dict[str, dict[str, Outcome]] = field(default_factory=dict)

    def outcomes(self, group: Group, members: Sequence[str]) -> dict[str, Outcome]:
        """Measure a group when it is asked for the first time; what it raises fails all members."""
        name = str(group)
        if name not in self._measured:
            try:
                self._measured[name] = group.measure(members, self)
            except Exception as error:
                self._measured[name] = {member: Outcome({}, error=error) for member in members}
            if self.folder is not None:
                saved = provenance(self.device) | _saved(self._measured[name])
                write(self.folder / f"{name}.json", json.dumps(saved, indent=1) + "\n")
        return self._measured[name]

    def wants(self, group: Group) -> bool:
        """Whether a group has no file yet."""
        path = self.folder and self.folder / f"{group}.json"
        if path is None or not path.is_file():
            return True
        return self.again and bool(json.loads(path.read_text())["failed"])

    def rows(self, subjects: Iterable[Subject]) -> list[Row]:
        """Every size, precision and direction of some subjects."""
        return [
            Row(subject, network, batch, precision, self.device.type, backward, self.autotuned)
            for subject in subjects
            for network in subject.networks
            for batch in self.batches or self._batches(subject, network)
            for precision in self.precisions or self._precisions(subject)
            if precision in subject.precisions
            for backward in ((False, True) if subject.case.differentiable else (False,))
        ]

    def _batches(self, subject: Subject, network: Network) -> tuple[int, ...]:
        """On a CPU the batch that networks are trained with, on a GPU also those that fill it."""
        if self.device.type == "cpu":
            return network.batches[:1]
        return network.batches if subject.central else network.batches[-1:]

    def _precisions(self, subject: Subject) -> tuple[str, ...]:
        both = self.device.type == "cuda" and subject.central
        return ("float32", "bfloat16") if both else ("float32",)


def _saved(outcomes: dict[str, Outcome]) -> dict[str, Any]:
    """Statistics, not samples; and who has none, with the reason."""
    entries, absent, failed = [], {}, {}
    for member, outcome in outcomes.items():
        if isinstance(outcome.error, SkipTest):
            absent[member] = str(outcome.error)
        elif outcome.error is not None:
            failed[member] = f"{type(outcome.error).__name__}: {outcome.error}"
        elif outcome.samples is not None:
            times = outcome.samples.seconds
            q1, median, q3 = quartiles(times)
            stats = {"min": min(times), "q1": q1, "median": median, "q3": q3, "rounds": len(times)}
            facts = outcome.facts | {"iterations": outcome.samples.iterations}
            entries.append({"name": member, "stats": rounded(stats), "extra_info": rounded(facts)})
    return {"absent": absent, "failed": failed, "benchmarks": entries}
