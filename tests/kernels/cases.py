"""The package's own list of cases, for tests that hold for all of them alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from magsd_kernels.cases import CASES, Case, tensors_of

BY_NAME = {case.name: case for case in CASES}


def each(cases: list[Case]) -> pytest.MarkDecorator:
    """A parameter `case` that takes these."""
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


all_cases = each(list(CASES))
differentiable_cases = each([case for case in CASES if case.differentiable])


def run(case: Case, arguments: dict[str, Any], function: Callable[..., Any] | None = None):
    """Outputs, then gradients of a fixed function of them."""
    out = tensors_of((function or case.function)(**arguments))
    leaves = case.leaves(arguments)
    if not leaves:
        return out
    total = sum((x.double() * (i + 1)).square().sum() + x.sum() for i, x in enumerate(out))
    return [*(x.detach() for x in out), *torch.autograd.grad(total, leaves)]
