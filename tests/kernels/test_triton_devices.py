"""Triton launches on the current device: every launch must happen under its tensors' device.

A stand-in for the driver keeps the current device, the second one, and tensors without memory lie
on the first. With two GPUs the results are compared as well.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

import triton
from triton.runtime.jit import JITFunction

from magsd_kernels import registry
from magsd_kernels.backends import OPERATIONS, implementation

from .cases import BY_NAME, Case, all_cases
from .support import random, tensors_of
from .test_triton_tuning import tunables

compiled_only = pytest.mark.skipif(
    triton.knobs.runtime.interpret or not torch.backends.cuda.is_built(),
    reason="Triton interprets its kernels here, or torch knows no CUDA tensors",
)


class Calls(TorchDispatchMode):
    """The package's operators that are called, with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "magsd":
            self.made.append((func, args))
        return func(*args, **(kwargs or {}))


def calls_of(case: Case) -> list[tuple[Any, tuple[Any, ...]]]:
    """The operators of a case, forward and backward."""
    given = case.arguments()
    with Calls() as calls:
        made = tensors_of(case.function(**given, backend="reference"))
        if case.differentiable:
            total = sum((x * random(*x.shape).to(x)).sum() for x in made if x.requires_grad)
            torch.autograd.grad(total, case.leaves(given))
    return calls.made


def moved(value: Any, device: str) -> Any:
    """An argument whose tensors lie on another device, without memory."""
    if isinstance(value, torch.Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
    return [moved(each, device) for each in value] if isinstance(value, list) else value


def run(operator: Any, arguments: tuple[Any, ...], device: str) -> None:
    """An operator's kernel by Triton, on tensors that lie on another device."""
    name = operator._schema.name.partition("::")[2]
    holders = (o for o in OPERATIONS if hasattr(implementation("reference", o), name))
    with FakeTensorMode():
        moved_there = [moved(value, device) for value in arguments[:-1]]
        registry.call_backend("triton", next(holders), name, moved_there)


@pytest.fixture
def current(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The current device in a list, which the stand-in for the driver changes."""
    device = [1]

    def exchange(index: int) -> int:
        before, device[0] = device[0], index
        return before

    monkeypatch.setattr(torch._C, "_accelerator_exchangeDevice", exchange)
    monkeypatch.setattr(torch._C, "_accelerator_maybeExchangeDevice", exchange)
    return device


@pytest.fixture(params=["fixed", "tuned"])
def launches(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Records the current device at every launch, of the kernels as they are or tuned."""
    current: list[int] = request.getfixturevalue("current")
    seen: list[int] = []

    def note(self: Any, *args: Any, **kwargs: Any) -> None:
        seen.append(current[0])

    def time(call: Callable[[], None], quantiles: tuple[float, ...]) -> list[float]:
        call()
        return [1.0] * len(quantiles)

    if request.param == "tuned":
        for module, name, kernel in tunables():
            monkeypatch.setattr(module, name, kernel.tuned(do_bench=time))
    monkeypatch.setattr(JITFunction, "run", note)
    return seen


@compiled_only
@all_cases
def test_every_launch_is_on_the_device_of_the_tensors(case, current, launches):
    calls = calls_of(case)
    assert calls
    for operator, arguments in calls:
        launches.clear()
        run(operator, arguments, "cuda:0")
        assert set(launches) == {0}, operator
        assert current == [1]


@compiled_only
def test_intel_gpus_are_changed_to_as_well(current, launches):
    for operator, arguments in calls_of(BY_NAME["dim"]):
        run(operator, arguments, "xpu:0")
    assert set(launches) == {0}
    assert current == [1]


@compiled_only
@all_cases
def test_an_error_leaves_the_current_device(case, current, monkeypatch):
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of resources")

    monkeypatch.setattr(JITFunction, "run", fail)
    for operator, arguments in calls_of(case):
        with pytest.raises(RuntimeError, match="out of resources"):
            run(operator, arguments, "cuda:0")
        assert current == [1]


@all_cases
@pytest.mark.skipif(torch.accelerator.device_count() < 2, reason="there are fewer than two GPUs")
def test_tensors_on_the_second_gpu(case, target):
    if target.device == "cpu":
        pytest.skip("takes CPU tensors")

    def results(index: int) -> list[torch.Tensor]:
        device = f"{target.device}:{index}"
        given = case.arguments(device=device)
        made = tensors_of(target.call(case.function, **given))
        found = list(made)
        if case.differentiable:
            total = sum((x * random(*x.shape).to(x)).sum() for x in made if x.requires_grad)
            found += torch.autograd.grad(total, case.leaves(given))
        found += [x for name in case.written for x in tensors_of(given[name])]
        assert {x.device for x in found} == {torch.device(device)}
        assert torch.accelerator.current_device_index() == 0
        return [x.cpu() for x in found]

    torch.testing.assert_close(results(1), results(0), rtol=0, atol=0, equal_nan=True)
