"""Tuning of the Triton kernels, with a stand-in for the clock.

What times them runs every configuration of a kernel on the call's own tensors.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import magsd_kernels as mk
import magsd_kernels.triton
from magsd_kernels.triton._common import Tunable

from .cases import CASES, Case, all_cases
from .support import Target, available_targets, random, tensors_of

every_triton = pytest.mark.parametrize(
    "target", [t for t in available_targets() if t.backend == "triton"], ids=str
)
#: The cases whose kernels have one configuration.
FIXED = {"sample", "resample_area", "resample_bilinear", "resample_nearest"}


def tunables() -> Iterator[tuple[Any, str, Tunable]]:
    """Module, name and kernel wherever a module of the package has a kernel with a choice."""
    for module in pkgutil.iter_modules(magsd_kernels.triton.__path__):
        inside = importlib.import_module(f"magsd_kernels.triton.{module.name}")
        for name, value in list(vars(inside).items()):
            if isinstance(value, Tunable):
                yield inside, name, value


@dataclass
class Clock:
    """Runs what it times, and finds the first or the last configuration the fastest."""

    tuned: list[Any]
    last_is_fastest: bool = True
    times: list[float] = field(default_factory=list)

    def __call__(self, call: Callable[[], None], quantiles: tuple[float, ...]) -> list[float]:
        call()
        self.times.append(1 / (1 + len(self.times)))
        return [self.times[-1] if self.last_is_fastest else -self.times[-1]] * len(quantiles)

    def tunings(self) -> int:
        """How often a kernel was timed."""
        return sum(len(kernel.cache) for kernel in self.tuned)

    def chosen(self) -> set[bool]:
        """Whether the last configuration was chosen, over all kernels and sizes."""
        return {
            config == kernel.configs[-1]
            for kernel in self.tuned
            for config in kernel.cache.values()
        }


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Every kernel with a choice, timed by this clock."""
    made = Clock([])
    tuned = {}
    for module, name, kernel in tunables():
        if kernel not in tuned:
            tuned[kernel] = kernel.tuned(do_bench=made)
        monkeypatch.setattr(module, name, tuned[kernel])
    made.tuned.extend(tuned.values())
    return made


def results(case: Case, target: Target, **arguments: Any) -> list[torch.Tensor]:
    """What a call returns, its gradients, and what it has written in place."""
    given = case.arguments(device=target.device, **arguments)
    made = tensors_of(target.call(case.function, **given))
    found = list(made)
    if case.differentiable:
        total = sum((x * random(*x.shape).to(x)).sum() for x in made if x.requires_grad)
        found += torch.autograd.grad(total, case.leaves(given))
    return found + [x for name in case.written for x in tensors_of(given[name])]


def test_keys_and_choices_name_arguments_of_the_kernel():
    found = {kernel for _, _, kernel in tunables()}
    assert len(found) >= 10
    for kernel in found:
        names = set(kernel.kernel.arg_names)
        assert names.issuperset(kernel.key), kernel.key
        assert all(names.issuperset(config.kwargs) for config in kernel.configs)
        assert 1 <= len(kernel.configs) == len(set(kernel.configs)) <= 4
        assert "batch" not in kernel.key  # The last batch of an epoch is not tuned anew.


@every_triton
@all_cases
def test_tuning_changes_no_result(case, target, request):
    expected = results(case, target)
    clock = request.getfixturevalue("clock")
    found = results(case, target)
    assert (clock.tunings() > 0) == (case.name not in FIXED)
    torch.testing.assert_close(found, expected, equal_nan=True)


@every_triton
@pytest.mark.parametrize("last", [True, False])
def test_the_fastest_is_kept(last, target, clock):
    clock.last_is_fastest = last
    for case in CASES:
        if case.name in ("pool_avg", "loss"):
            results(case, target)
    assert clock.chosen() == {last}


@every_triton
def test_each_size_is_tuned_once(target, clock):
    """Another number of images or other values are no other size."""

    def pool(batch: int, channels: int) -> int:
        features = torch.rand(batch, channels, 3, 3, device=target.device)
        attention = torch.rand(batch, 2, 3, 3, device=target.device)
        target.call(mk.bilinear_attention_pool, features, attention, normalize=False)
        return clock.tunings()

    assert [pool(1, 4), pool(1, 4), pool(2, 4)] == [1, 1, 1]
    assert [pool(1, 5), pool(1, 4), pool(1, 5)] == [2, 2, 2]
