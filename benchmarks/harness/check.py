"""Whether a result is right, by the tolerance of the contract."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from benchmarks.harness.subject import DRAWS, EAGER, Arguments, Contender, Row, Tolerance


class WrongResult(AssertionError):
    """A competitor does not compute what the definition says."""


@dataclass(frozen=True)
class Wanted:
    """One result of the definition, and how far from it the reference in the row's dtype is."""

    what: str
    value: Tensor
    reference_error: float

    def allowed(self, tolerance: Tolerance) -> float:
        """Largest relative error."""
        return tolerance.single + tolerance.half * self.reference_error


def definition(row: Row, arguments: Arguments) -> list[Wanted]:
    """What a call must give: the reference on float64 copies of the activations."""
    wide = {
        name: x if name in DRAWS else pytree.tree_map_only(Tensor, _widened, x)
        for name, x in arguments.items()
    }
    exact = list(Contender(EAGER, row, [wide]).outcome())
    if row.precision.dtype == torch.float32:
        return [Wanted(what, value, 0.0) for what, value in exact]
    rounded = Contender(EAGER, row, [arguments]).outcome()
    return [
        Wanted(what, value, _error(own, value))
        for (what, value), (_, own) in zip(exact, rounded, strict=True)
    ]


def check(contender: Contender, wanted: list[Wanted]) -> None:
    """Compare one call with the definition; raises WrongResult."""
    for (what, found), want in zip(contender.outcome(), wanted, strict=True):
        where = f"{contender.row}, {contender.name}: {what}"
        if found.shape != want.value.shape:
            shapes = f"{tuple(found.shape)}, not {tuple(want.value.shape)}"
            raise WrongResult(f"{where} has shape {shapes}")
        if not found.is_floating_point():
            off = int((found != want.value).sum())
            if off:
                raise WrongResult(f"{where}: {off} of {found.numel()} entries differ")
            continue
        error, allowed = _error(found, want.value), want.allowed(contender.tolerance)
        if not error <= allowed:  # NaN is wrong too
            raise WrongResult(f"{where}: relative error {error:.3g}, allowed {allowed:.3g}")


def _error(found: Tensor, wanted: Tensor) -> float:
    """Distance over the length of what is wanted, in float64."""
    distance = torch.linalg.vector_norm(found.double() - wanted.double())
    length = torch.linalg.vector_norm(wanted.double())
    return float(distance / length.clamp(min=torch.finfo(torch.float64).tiny))


def _widened(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x
