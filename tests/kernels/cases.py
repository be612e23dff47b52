"""The package's own list of cases, for tests that hold for all of them alike."""

from __future__ import annotations

import pytest

from magsd_kernels.cases import CASES, Case

BY_NAME = {case.name: case for case in CASES}


def each(cases: list[Case]) -> pytest.MarkDecorator:
    """A parameter `case` that takes these."""
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


all_cases = each(list(CASES))
differentiable_cases = each([case for case in CASES if case.differentiable])
