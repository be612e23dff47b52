"""What is measured: an operation at one size, and who computes it there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.harness.sizes import PRECISIONS, Draw, Network
from magsd_kernels.backends import preference, select, why_not
from magsd_kernels.cases import CASES, Arguments, Case, tensors_of

Function = Callable[..., Any]

PUBLISHED, EAGER, COMPILED, AUTOTUNED = "published", "eager", "compiled", "compiled-max"
_STATISTICS = ("running_mean", "running_var")
CASE = {case.name: case for case in CASES}


class Rival(NamedTuple):
    """Somebody's calls that compute the same, named after the call that matters.

    build: gives the function; called once for a row. precisions: in which it competes. why_not:
    reason why it cannot run here, or None. tolerance: largest relative error in float32.
    """

    name: str
    build: Callable[[], Function]
    precisions: tuple[str, ...] = tuple(PRECISIONS)
    why_not: Callable[[], str | None] = lambda: None
    tolerance: float = 1e-5


@dataclass(frozen=True)
class Subject:
    """A public function, and what else computes the same from the same arguments.

    Attributes:
        name: of the function, with the variant.
        operation: its row in the table of backends.
        case: makes the arguments and knows the gradients.
        function: the public function; takes `backend`, returns one tensor.
        reference: the definition without the dispatcher, for torch.compile; of several results
            the first counts.
        published: what the released networks do; returns a tensor, or a list of its slices.
        networks: whose sizes are measured.
        prepare: changes the case's arguments.
        saved: arguments that a backward must read.
        rivals: who else competes.
        uncompiled: why torch.compile does not compete; empty if it does.
        central: on a GPU measured at every batch, in float32 and bfloat16, and autotuned at the
            largest where that is asked for; the others at the largest batch in float32.
        least_batch: the smallest that the operation takes.
        rounds: relative error that the published code may have by itself, in a precision.
        precisions: in which competitors can be compared.
    """

    name: str
    operation: str
    case: Case
    function: Function
    reference: Function
    published: Function
    networks: tuple[Network, ...]
    prepare: Callable[[Draw, Arguments], Arguments] = lambda draw, arguments: arguments
    saved: tuple[str, ...] = ()
    rivals: tuple[Rival, ...] = ()
    uncompiled: str = ""
    central: bool = False
    least_batch: int = 1
    rounds: Mapping[str, float] = field(default_factory=dict)
    precisions: tuple[str, ...] = tuple(PRECISIONS)


@dataclass(frozen=True)
class Row:
    """A subject at one size and precision, forward alone or with its backward."""

    subject: Subject
    network: Network
    batch: int
    precision: str
    device: str
    backward: bool
    autotuned: bool = False

    def __str__(self) -> str:
        name = self.subject.name.replace(" ", "_")
        size = f"{self.network.name}-b{self.batch}-{self.precision}"
        return f"{name}-{size}-{self.direction}"

    @property
    def direction(self) -> str:
        """What is timed."""
        return "forward+backward" if self.backward else "forward"

    @property
    def dtype(self) -> torch.dtype:
        """Of the activations."""
        return PRECISIONS[self.precision]

    def backend(self, asked: str = "auto") -> str:
        """The backend that runs where one is asked for."""
        like = torch.empty(0, device=self.device, dtype=self.dtype)
        return select(self.subject.operation, asked, like)

    def draw(self, seed: int) -> Arguments:
        """Random arguments; different seeds give different ones."""
        draw = Draw(self.network, self.precision, self.device, seed)
        made = self.subject.case.build(self.network.size(self.batch), draw)
        return self.subject.prepare(draw, made)

    def moved_bytes(self, arguments: Arguments, result: Tensor) -> int:
        """Bytes that must move: each input read once, each output written once.

        A backward reads the result's gradient and what it depends on, and writes the gradients.
        """
        moved = sum(_read(name, arguments) for name in arguments) + nbytes(result)
        if self.backward:
            moved += nbytes(result) + sum(_read(name, arguments) for name in self.subject.saved)
            moved += sum(nbytes(arguments[name]) for name in self.subject.case.differentiable)
        return moved

    def competitors(self) -> dict[str, Rival]:
        """Who competes, by name, ours last."""
        # Of batch norms there is no larger batch, and many sizes, each of which would take minutes.
        largest = self.subject.central and self.batch in self.network.batches[1:][-1:]
        tuned = self.autotuned and self.device == "cuda" and largest
        tolerance = self.subject.rounds.get(self.precision, 1e-5)
        found = [
            Rival(PUBLISHED, lambda: self.subject.published, tolerance=tolerance),
            self._backend("reference")._replace(name=EAGER),
            self._compiled(COMPILED, "default"),
            *([self._compiled(AUTOTUNED, "max-autotune")] if tuned else []),
            *(rival for rival in self.subject.rivals if self.precision in rival.precisions),
            *map(self._backend, preference(self.device)),
        ]
        return {rival.name: rival for rival in found}

    def rival(self, name: str) -> Rival:
        """A competitor, or any backend."""
        return self.competitors().get(name) or self._backend(name)

    def _backend(self, name: str) -> Rival:
        subject = self.subject
        reason = partial(why_not, name, subject.operation, self.device, self.dtype)
        return Rival(name, lambda: partial(subject.function, backend=name), why_not=reason)

    def _compiled(self, name: str, mode: str) -> Rival:
        build = partial(_compiled, self.subject.reference, mode)
        return Rival(name, build, why_not=lambda: self.subject.uncompiled or None)


def _read(name: str, arguments: Arguments) -> int:
    """Bytes of an argument; of attention only the maps that an index names."""
    size = nbytes(arguments[name])
    if name == "attention" and "index" in arguments:
        index = arguments["index"]
        return int(size * index.numel() // len(index) // arguments["attention"].shape[1])
    return size


def nbytes(tree: Any) -> int:
    """Bytes of all tensors in an argument or in all arguments."""
    return sum(x.nbytes for x in tensors_of(tree))


def _compiled(reference: Function, mode: str) -> Function:
    """torch.compile of the definition, which drops what is not returned."""

    def definition(**arguments: Any) -> Any:
        # A graph through running statistics would lead into the step before.
        written = {n: x.detach() for n, x in arguments.items() if n in _STATISTICS}
        result = reference(**arguments | written)
        return result[0] if isinstance(result, tuple) else result

    compiled = torch.compile(definition, fullgraph=True, dynamic=False, mode=mode)
    return partial(_new_step, compiled) if mode == "max-autotune" else compiled


def _new_step(tuned: Function, **arguments: Any) -> Any:
    """Replays of max-autotune's own graphs overwrite the results of the step before."""
    torch.compiler.cudagraph_mark_step_begin()
    return tuned(**arguments)
