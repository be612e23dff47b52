"""The same random inputs through every backend that is available here, compared pair by pair.

Results and gradients lie within the contract's bounds of each other; boxes, indices and the pixels
that a threshold chooses are equal.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import magsd_kernels as mk
from magsd_kernels import compare, registry
from magsd_kernels.cases import UNEVEN, Case, sampled_views

from . import oracles
from .cases import BY_NAME, CASES, all_cases, each
from .support import DTYPES, INTERPRETED, all_dtypes, available_targets, dtype_id

GUIDED = [case for case in CASES if "theta" in case.arguments()]


@all_cases
@pytest.mark.parametrize("dtype", DTYPES[1:3] if INTERPRETED else DTYPES, ids=dtype_id)
@pytest.mark.parametrize("layout", compare.LAYOUTS)
def test_backends_agree(case: Case, dtype: torch.dtype, layout: str) -> None:
    for seed in compare.SEEDS[:1] if INTERPRETED else compare.SEEDS:
        outcomes, reasons = {}, []
        for target in available_targets():
            try:
                outcomes[target] = compare.run(
                    case, target.backend, target.device, dtype, layout, seed
                )
            except mk.BackendUnavailable as reason:
                reasons.append(str(reason))
        if len(outcomes) < 2:
            pytest.skip(f"only the reference can run here; {'; '.join(reasons)}")
        for (one, first), (other, second) in itertools.combinations(outcomes.items(), 2):
            assert first.keys() == second.keys()
            for name, x in first.items():
                what = f"{name} of {one} beside {other}"
                assert x.dtype == second[name].dtype, what
                assert compare.difference(x, second[name], what) is None


@each(GUIDED)
@pytest.mark.parametrize("seed", compare.SEEDS)
@all_dtypes
def test_no_pixel_lies_within_rounding_of_its_threshold(case, seed, dtype):
    """Else backends that agree could differ, see `magsd_kernels.cases`."""
    guide = case.arguments(UNEVEN, seed=seed, dtype=dtype)
    theta = guide["theta"].view(UNEVEN.batch, -1)
    if case.function is sampled_views:
        index = torch.tensor(oracles.sample_attention(guide["attention"], guide["uniforms"]))
    else:
        index = guide["index"].view(UNEVEN.batch, -1)
    for b, view in itertools.product(range(UNEVEN.batch), range(theta.shape[1])):
        low = guide["attention"][b, index[b, view]]
        sides = oracles.threshold_sides(low, theta[b, view], UNEVEN.image, False)
        assert not sides.undecided.any()


# ---------------------------------------------------------------- python -m magsd_kernels.compare


POOL = ["bilinear_attention_pool", "--dtype", "float32"]


def report(*words: str) -> tuple[int, list[str]]:
    lines: list[str] = []
    return compare.main(words, lines.append), lines


@pytest.fixture
def other() -> str:
    """A backend beside the reference."""
    names = {target.backend for target in available_targets()} - {"reference"}
    if not names:
        pytest.skip("only the reference can run here")
    return min(names)


def test_the_command_says_that_backends_agree(other):
    status, lines = report(*POOL, "--case", "pool_max", "--backend", other)
    assert status == 0
    assert lines == [f"pool_max, float32, {other} on {compare.runnable()[-1][1]}: agrees"]


@pytest.mark.parametrize(
    ("operator", "entry", "where"),
    [
        ("bilinear_attention_pool", (1, 70), "result at [1, 70]: "),
        ("bilinear_attention_pool_backward", (2, 3, 4, 5), "gradient of features at [2, 3, 4, 5]"),
    ],
)
@pytest.mark.parametrize("wrong", [1e-3, float("nan")])
def test_the_command_finds_a_planted_difference(monkeypatch, other, operator, entry, where, wrong):
    class Planted:
        """A backend that errs in one entry of one operator's first result."""

        def __init__(self, real: Any) -> None:
            self.real = real

        def __getattr__(self, name: str) -> Any:
            def call(*arguments: Any) -> Any:
                first, *rest = getattr(self.real, name)(*arguments)
                if name == operator:
                    first[entry] += wrong
                return first, *rest

            return call

    def implementation(backend: str, operation: str) -> Any:
        real = original(backend, operation)
        return Planted(real) if backend == other else real

    original = registry.implementation
    monkeypatch.setattr(registry, "implementation", implementation)
    status, lines = report(*POOL, "--case", "pool_avg", "--backend", other)
    assert status == 1
    assert len(lines) == 1
    assert where in lines[0]
    assert lines[0].endswith("1 entry differs")
    assert all(word in lines[0] for word in ("DIFFERS", "found", "expected", "allowed error"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["attention_zap"], "invalid choice: 'attention_zap'"),
        ([*POOL, "--case", "pool"], "bilinear_attention_pool has no case 'pool', but pool_avg"),
        ([*POOL, "--backend", "reference"], "invalid choice: 'reference'"),
    ],
)
def test_the_command_names_what_is_wrong(words, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        report(*words)
    assert message in capsys.readouterr().err


def test_the_command_says_why_a_backend_cannot_run(capsys):
    missing = [name for name, state in mk.backends().items() if state != "available"]
    if not missing:
        pytest.skip("every backend can run here")
    with pytest.raises(SystemExit, match="2"):
        report(*POOL, "--backend", missing[0])
    assert f"{missing[0]!r} cannot run here: {mk.backends()[missing[0]]}" in capsys.readouterr().err


def test_the_command_lists_the_cases(capsys):
    assert report("attention_views", "--list") == (0, ["views"])
    with pytest.raises(SystemExit, match="0"):
        report("--help")
    assert "soft_distance_loss" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("found", "expected", "index"),
    [
        ([[1.0, 2.0], [3.0, 4.5]], [[1.0, 2.0], [3.0, 4.0]], (1, 1)),
        ([[1.0, float("nan")], [3.0, 4.5]], [[1.0, 2.0], [3.0, 4.0]], (0, 1)),
        ([[float("inf"), 2.0], [3.0, 4.0]], [[float("-inf"), 2.0], [3.0, 4.0]], (0, 0)),
        ([[1, 2], [3, 4]], [[1, 2], [4, 4]], (1, 0)),
        (
            [[float("nan"), 2.0], [float("inf"), 4.0]],
            [[float("nan"), 2.0], [float("inf"), 4]],
            None,
        ),
    ],
)
def test_the_first_difference(found, expected, index):
    first = compare.difference(torch.tensor(found), torch.tensor(expected))
    assert (first and first.index) == index


def test_tensors_of_other_shapes_are_no_match():
    with pytest.raises(ValueError, match=r"shape \(2,\), expected \(3,\)"):
        compare.difference(Tensor([1, 2]), Tensor([1, 2, 3]))


def test_every_case_is_found_by_name():
    assert len(BY_NAME) == len(CASES)
