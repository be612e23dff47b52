"""Whether a result is right, by the tolerance of the contract."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from benchmarks.harness.subject import DRAWS, EAGER, PUBLISHED, Contender, Row
from magsd_kernels.cases import Arguments

#: A result of the definition: its value, and the relative error that the reference in the row's
#: dtype has.
Wanted = tuple[Tensor, float]
#: In half precision as many times the reference's error is allowed; the published code rounds after
#: every operation.
_OTHERS, _PUBLISHED = 2, 16


class WrongResult(AssertionError):
    """A competitor does not compute what the definition says."""


def definition(row: Row, arguments: Arguments) -> list[Wanted]:
    """What a call must give: the reference on float64 copies of the activations."""
    wide = {
        name: x if name in DRAWS else pytree.tree_map_only(Tensor, _widened, x)
        for name, x in arguments.items()
    }
    exact = list(Contender(EAGER, row, [wide]).outcome())
    if row.dtype == torch.float32:
        return [(value, 0.0) for _, value in exact]
    pairs = zip(exact, Contender(EAGER, row, [arguments]).outcome(), strict=True)
    return [(value, _error(own, value)) for (_, value), (_, own) in pairs]


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


def _widened(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x
