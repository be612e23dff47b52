"""Run an operation on every backend that can run here, and compare it with the reference.

Results, gradients and tensors that are updated in place are compared, in both memory formats, by
the bounds that the backends promise: float64 to 1e-11 of the largest entry, the others to 1e-5 of
it, and half precision to one rounding more. Integers must be equal.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from magsd_kernels.backends import (
    BACKENDS,
    OPERATIONS,
    BackendUnavailable,
    backends,
    why_not,
)
from magsd_kernels.cases import CASES, UNEVEN, Case, Size, random, tensors_of

LAYOUTS = ("contiguous", "channels_last")
DTYPES = {str(d).removeprefix("torch."): d for d in (torch.float32, torch.float64, torch.float16,
          torch.bfloat16)}  # fmt: skip
SEEDS = (0, 100)


def runnable() -> list[tuple[str, str]]:
    """Every backend that is available, with every device here whose tensors it takes."""
    devices = ["cpu", *(name for name in ("cuda", "xpu") if getattr(torch, name).is_available())]
    return [
        (name, device)
        for name in BACKENDS
        for device in devices
        if why_not(name, OPERATIONS[0], device, torch.float32) is None
    ]


def error_bound(expected: Tensor, dtype: torch.dtype) -> Tensor:
    """Largest error allowed for each entry of a floating tensor.

    float64 computes in float64, the rest in float32 to 1e-5 of the largest entry; in half
    precision one rounding comes on top, and the error may be twice that of the rounding. Entries
    that are not finite must be met, and give no room to the others.
    """
    finite = expected.isfinite()
    expected = expected.masked_fill(~finite, 0.0)
    scale = expected.abs().max() if expected.numel() else expected.new_zeros(())
    if dtype == torch.float64:
        return (1e-11 * scale).expand_as(expected)
    bound = (1e-5 * scale).expand_as(expected)
    if dtype == torch.float32:
        return bound
    info = torch.finfo(dtype)
    return bound + info.eps * expected.abs() + info.smallest_normal * info.eps


@dataclass(frozen=True)
class Difference:
    """Where a tensor first differs from what was expected by more than its bound."""

    tensor: str
    index: tuple[int, ...]
    found: float
    expected: float
    bound: float
    count: int

    def __str__(self) -> str:
        entries = "entry differs" if self.count == 1 else "entries differ"
        return (
            f"{self.tensor} at {list(self.index)}: found {self.found:.9g}, expected "
            f"{self.expected:.9g}, allowed error {self.bound:.3g}; {self.count} {entries}"
        )


def difference(found: Tensor, expected: Tensor, name: str = "result") -> Difference | None:
    """The first entry by which `found` misses `expected`, or None.

    Both may be of any dtype; that of `found` decides the bound.

    Raises:
        ValueError: the shapes differ.
    """
    if found.shape != expected.shape:
        raise ValueError(f"{name}: shape {tuple(found.shape)}, expected {tuple(expected.shape)}")
    a, b = (x.detach().cpu().double() for x in (found, expected))
    floating = found.is_floating_point()
    bound = error_bound(b, found.dtype) if floating else torch.zeros_like(b)
    # NaN must be met by NaN, and an infinity by the same one, whose difference is NaN.
    wrong = (a.isnan() != b.isnan()) | ((a - b).abs() > bound)
    if not bool(wrong.any()):
        return None
    first = int(wrong.flatten().int().argmax())
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(first), wrong.shape))
    return Difference(
        name, index, float(a[index]), float(b[index]), float(bound[index]), int(wrong.sum())
    )


def in_layout(tensor: Tensor, layout: str) -> Tensor:
    """The same values in a memory format; what has not four dimensions is contiguous."""
    if layout == "channels_last" and tensor.dim() == 4:
        return tensor.contiguous(memory_format=torch.channels_last)
    return tensor.contiguous()


def outcome(case: Case, backend: str, arguments: dict[str, Any]) -> dict[str, Tensor]:
    """Results, gradients and updated arguments of one call, by name, on the CPU."""
    out = tensors_of(case.function(**arguments, backend=backend))
    named = _numbered("result", out)
    leaves = case.leaves(arguments)
    if leaves:
        directions = [random(*x.shape, seed=90 + i).to(x) for i, x in enumerate(out)]
        gradients = iter(torch.autograd.grad(out, leaves, directions))
        for name in case.differentiable:
            own = [next(gradients) for _ in tensors_of(arguments[name])]
            named |= _numbered(f"gradient of {name}", own)
    for name in case.written:
        named |= _numbered(name, tensors_of(arguments[name]))
    return {name: x.detach().cpu() for name, x in named.items()}


def _numbered(name: str, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    if len(tensors) == 1:
        return {name: tensors[0]}
    return {f"{name}[{i}]": x for i, x in enumerate(tensors)}


def run(
    case: Case,
    backend: str,
    device: str,
    dtype: torch.dtype,
    layout: str,
    seed: int,
    size: Size = UNEVEN,
) -> dict[str, Tensor]:
    """`outcome` of the case's arguments at a size."""
    arguments = case.arguments(size, seed=seed, dtype=dtype, device=device, requires_grad=False)
    arguments = pytree.tree_map_only(Tensor, lambda x: in_layout(x, layout), arguments)
    for leaf in case.leaves(arguments):
        leaf.requires_grad_()
    return outcome(case, backend, arguments)


def compare(
    case: Case, backend: str, device: str, dtype: torch.dtype
) -> tuple[str, Difference] | None:
    """Where a backend first differs from the reference: in which memory format, and how."""
    for layout in LAYOUTS:
        for seed in SEEDS:
            expected = run(case, "reference", device, dtype, layout, seed)
            for name, x in run(case, backend, device, dtype, layout, seed).items():
                found = difference(x, expected[name], name)
                if found is not None:
                    return layout, found
    return None


def _parser() -> argparse.ArgumentParser:
    functions = sorted({case.function.__name__ for case in CASES})
    parser = argparse.ArgumentParser(
        prog="python -m magsd_kernels.compare",
        description="Compare an operation, forward and backward, on the backends that can run "
        "here with the reference. The exit status is 1 where one differs.",
        epilog=f"OP is one of: {', '.join(functions)}. "
        "The cases of an operation are its variants, see --list.",
    )
    parser.add_argument("op", metavar="OP", choices=functions, help="name of a function")
    parser.add_argument(
        "--case", metavar="NAME", action="append", help="only this case; may be given again"
    )
    parser.add_argument(
        "--backend", metavar="NAME", nargs="+", choices=[n for n in BACKENDS if n != "reference"],
        help="only these backends (default: all that can run here)",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", metavar="DTYPE", nargs="+", choices=list(DTYPES), default=list(DTYPES),
        help=f"only these dtypes (default: {' '.join(DTYPES)})",
    )  # fmt: skip
    parser.add_argument("--list", action="store_true", help="print the names of the cases and stop")
    return parser


def main(words: Sequence[str] | None = None, write: Callable[[str], Any] = print) -> int:
    """Run the command line; returns the exit status."""
    parser = _parser()
    options = parser.parse_args(words)
    cases = [case for case in CASES if case.function.__name__ == options.op]
    names = [case.name for case in cases]
    if options.list:
        write("\n".join(names))
        return 0
    for name in options.case or ():
        if name not in names:
            parser.error(f"{options.op} has no case {name!r}, but {', '.join(names)}")
    states = backends()
    for name in options.backend or ():
        if states[name] != "available":
            parser.error(f"backend {name!r} cannot run here: {states[name]}")
    places = [
        (name, device)
        for name, device in runnable()
        if name != "reference" and (not options.backend or name in options.backend)
    ]
    if not places:
        reasons = "; ".join(f"{n}: {why}" for n, why in states.items() if why != "available")
        parser.error(f"only the reference can run here ({reasons})")
    differing = 0
    for case in cases:
        if options.case and case.name not in options.case:
            continue
        for dtype in options.dtype:
            for backend, device in places:
                what = f"{case.name}, {dtype}, {backend} on {device}"
                try:
                    found = compare(case, backend, device, DTYPES[dtype])
                except BackendUnavailable as reason:
                    write(f"{what}: not run: {reason}")
                    continue
                if found is None:
                    write(f"{what}: agrees")
                else:
                    differing += 1
                    layout, first = found
                    write(f"{what}: DIFFERS, {layout}: {first}")
    return min(differing, 1)


if __name__ == "__main__":
    sys.exit(main())
