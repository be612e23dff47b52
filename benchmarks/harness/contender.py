"""One competitor on one row, ready to be called, and whether what it computes is right."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from benchmarks.harness.sizes import photograph
from benchmarks.harness.subject import EAGER, PUBLISHED, Row
from benchmarks.harness.timing import Call
from magsd_kernels.cases import Arguments, tensors_of

#: float32 by contract whatever the activations are; the published code holds them on the host.
_DRAWS = ("theta", "offsets", "uniforms")
#: In half precision as many times the reference's error is allowed; the published code rounds after
#: every operation.
_OTHERS, _PUBLISHED = 2, 16

#: A result of the definition: its value, and the relative error that the reference in the row's
#: dtype has.
Wanted = tuple[Tensor, float]


class WrongResult(AssertionError):
    """A competitor does not compute what the definition says."""


class Contender:
    """A competitor, or a backend, with its own arguments for every input set of a row."""

    def __init__(self, name: str, row: Row, sets: Sequence[Arguments]) -> None:
        rival = row.rival(name)
        self.name = name
        self.row = row
        self.tolerance = rival.tolerance
        self._function = rival.build()
        self._sets = [self._own(arguments) for arguments in sets]
        self._directions: list[list[Tensor]] = []

    def _own(self, arguments: Arguments) -> Arguments:
        """Leaves of its own; the data is shared, but for what is written."""
        case = self.row.subject.case
        own = {n: pytree.tree_map_only(Tensor, Tensor.detach, x) for n, x in arguments.items()}
        for name in case.written:
            own[name] = pytree.tree_map_only(Tensor, Tensor.clone, own[name])
        for leaf in case.leaves(own) if self.row.backward else ():
            leaf.requires_grad_()
        if self.name == PUBLISHED:
            for name in own.keys() & {*_DRAWS, "index"}:
                x = own[name].cpu()
                own[name] = x.numpy() if name == "uniforms" else x.tolist()
        return own

    def forward(self, i: int) -> Any:
        """The result on input set i; records a graph if the row has a backward."""
        return self._function(**self._sets[i])

    def backward(self, i: int, result: Any) -> tuple[Tensor, ...]:
        """Gradients of all leaves, from a gradient of the result that stays the same."""
        if not self._directions:
            direction = self._direction(result)
            self._directions = [[part.clone() for part in direction] for _ in self._sets]
        outputs = result if isinstance(result, list) else [result]
        leaves = self.row.subject.case.leaves(self._sets[i])
        return torch.autograd.grad(outputs, leaves, self._directions[i])

    def _direction(self, result: Any) -> list[Tensor]:
        """A random gradient of the result, the same for a tensor and for the list of its slices."""
        whole = torch.stack(result) if isinstance(result, list) else result
        generator = torch.Generator(whole.device).manual_seed(1)
        if whole.dim() < 4:
            values = torch.randn(whole.shape, generator=generator, device=whole.device)
        else:
            values = photograph(whole.shape, generator)
        direction = torch.empty_like(whole).copy_(values.to(self.row.dtype))
        return list(direction) if isinstance(result, list) else [direction]

    def forwards(self) -> list[Call]:
        """Calls of the forward, one per input set, with nothing around them."""
        return [partial(self._function, **own) for own in self._sets]

    def calls(self) -> list[Call]:
        """What is timed, one call per input set."""
        if not self.row.backward:
            return self.forwards()
        return [partial(self._both, i) for i in range(len(self._sets))]

    def _both(self, i: int) -> Any:
        result = self.forward(i)
        return result, self.backward(i, result)

    def outcome(self) -> Iterator[tuple[str, Tensor]]:
        """Named tensors that a call on input set 0 gives, what it writes included."""
        with torch.set_grad_enabled(self.row.backward):
            result = self.forward(0)
            gradients = self.backward(0, result) if self.row.backward else ()
        result = torch.stack(result) if isinstance(result, list) else result
        yield "result", result.detach()
        for i, gradient in enumerate(gradients):
            yield f"gradient {i}", gradient
        for name in self.row.subject.case.written:
            for value in tensors_of(self._sets[0][name]):
                yield name, value


def definition(row: Row, arguments: Arguments) -> list[Wanted]:
    """What a call must give: the reference on float64 copies of the activations."""
    wide = {
        name: x if name in _DRAWS else pytree.tree_map_only(Tensor, _widened, x)
        for name, x in arguments.items()
    }
    exact = list(Contender(EAGER, row, [wide]).outcome())
    if row.dtype == torch.float32:
        return [(value, 0.0) for _, value in exact]
    pairs = zip(exact, Contender(EAGER, row, [arguments]).outcome(), strict=True)
    return [(value, _error(own, value)) for (_, value), (_, own) in pairs]


def _widened(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


def check(contender: Contender, wanted: list[Wanted]) -> None:
    """Compare one call with the definition; raises WrongResult."""
    times = _PUBLISHED if contender.name == PUBLISHED else _OTHERS
    for (what, found), (value, error_of_reference) in zip(contender.outcome(), wanted, strict=True):
        where = f"{contender.row}, {contender.name}: {what}"
        if found.shape != value.shape:
            raise WrongResult(f"{where} has shape {tuple(found.shape)}, not {tuple(value.shape)}")
        if not found.is_floating_point():
            off = int((found != value).sum())
            if off:
                raise WrongResult(f"{where}: {off} of {found.numel()} entries differ")
            continue
        error = _error(found, value)
        allowed = contender.tolerance + times * error_of_reference
        if not error <= allowed:  # NaN is wrong too
            raise WrongResult(f"{where}: relative error {error:.3g}, allowed {allowed:.3g}")


def _error(found: Tensor, wanted: Tensor) -> float:
    """Distance over the length of what is wanted, in float64."""
    distance = torch.linalg.vector_norm(found.double() - wanted.double())
    length = torch.linalg.vector_norm(wanted.double())
    return float(distance / length.clamp(min=torch.finfo(torch.float64).tiny))
