"""What the CUDA kernels of batch_norm_act promise beyond the contract: launches, spread of work.

Calls that a small emulated GPU splits in other ways than a large one, and the bits that must not
depend on what ran before.
"""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from torch import Tensor

from magsd_kernels.backends import implementation
from magsd_kernels.reference import batch_norm_act as reference

from .support import (
    Target,
    assert_agrees,
    blocks,
    dtype_id,
    identical,
    launches,
    make_strided,
    multiprocessors,
    random,
)

pytestmark = pytest.mark.filterwarnings("error")

ACTS = ("relu", "silu", "none")
LAYOUTS = ("contiguous", "channels_last")
both_layouts = pytest.mark.parametrize("layout", LAYOUTS)


@pytest.fixture
def kernels(target: Target):
    if target.backend != "cuda":
        pytest.skip("a matter of the CUDA kernels alone")
    return implementation(target.backend, "batch_norm_act")


def inputs(target: Target, shape, layout: str, dtype=torch.float32) -> dict[str, Tensor]:
    x, residual, grad = (
        make_strided(random(*shape, seed=i).to(target.device, dtype), layout) for i in range(3)
    )
    parameters = [random(shape[1], seed=3 + i).to(target.device, torch.float32) for i in range(3)]
    return {
        "x": x,
        "weight": parameters[0],
        "bias": parameters[1],
        "running_mean": parameters[2],
        "running_var": parameters[2].abs() + 0.5,
        "residual": residual,
        "grad": grad,
    }


def forward(kernels, given, groups=1, act="relu", training=True, residual=True):
    names = ("x", "weight", "bias", "running_mean", "running_var")
    kept = given["residual"] if residual else None
    arguments = [given[name] for name in names]
    return kernels.batch_norm_act(*arguments, kept, groups, act, training, 0.1, 1e-5)


def backward(kernels, given, results, act="relu", training=True, residual=True, needs=(True,) * 3):
    output, mean, rstd = results
    kept = {"relu": output, "silu": given["residual"], "none": None}[act] if residual else None
    arguments = [given[name] for name in ("grad", "x", "weight", "bias")]
    return kernels.batch_norm_act_backward(*arguments, kept, mean, rstd, act, training, list(needs))


@both_layouts
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
def test_launches(target, kernels, layout, act, residual):
    given = inputs(target, (4, 24, 8, 8), layout)
    with multiprocessors(target, 132):
        for training in (True, False):
            options = {"act": act, "training": training, "residual": residual}
            results = forward(kernels, given, **options)
            found = launches(target, functools.partial(forward, kernels, given, **options))
            assert found == (2 if training else 1)
            for needs in itertools.product((False, True), repeat=3):
                if needs[2] and not residual:
                    continue
                call = functools.partial(backward, kernels, given, results, needs=needs, **options)
                wanted = (2 if training and needs[0] else 1) if any(needs) else 0
                assert launches(target, call) == wanted, (training, needs)


@both_layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize(
    ("shape", "groups"),
    [((6, 5, 28, 28), 1), ((12, 40, 14, 14), 6), ((4, 72, 7, 7), 2), ((15, 16, 9, 8), 5)],
    ids=str,
)
@pytest.mark.parametrize("count", [1, 5, 132])
def test_any_number_of_multiprocessors(target, kernels, layout, dtype, shape, groups, count):
    given = inputs(target, shape, layout, dtype)
    master = {name: value.cpu().double() for name, value in given.items()}
    with multiprocessors(target, count):
        results = forward(kernels, given, groups, "silu")
        gradients = backward(kernels, given, results, "silu")
    expected = forward(reference, master, groups, "silu")
    for i, (found, want) in enumerate(zip(results, expected, strict=True)):
        assert_agrees(found, want, f"result {i}")
    statistics = [x.cpu().double() for x in results[1:]]
    wanted = backward(reference, master, (None, *statistics), "silu")
    for i, (found, want) in enumerate(zip(gradients, wanted, strict=True)):
        assert_agrees(found, want, f"gradient {i}")
    for name in ("running_mean", "running_var"):
        assert_agrees(given[name], master[name], name)


@both_layouts
def test_same_bits_whatever_ran_before(target, kernels, layout):
    """Blocks end in any order, and what they count by is left as it was found."""

    def run(seed_shape, groups):
        given = inputs(target, seed_shape, layout)
        results = forward(kernels, given, groups)
        gradients = backward(kernels, given, results)
        return [*results, *gradients, given["running_mean"], given["running_var"]]

    with multiprocessors(target, 132):
        first = run((6, 40, 16, 16), 3)
        run((4, 70, 12, 12), 1)
        for _ in range(2):
            for a, b in zip(first, run((6, 40, 16, 16), 3), strict=True):
                assert identical(a, b)


@both_layouts
@pytest.mark.parametrize("place", [0, -1], ids=["first", "last"])
def test_a_value_far_off_does_not_take_the_digits_of_the_others(target, kernels, layout, place):
    """Whoever shifts the sums by it alone loses as many digits as it is far off."""
    given = inputs(target, (8, 24, 28, 28), layout)
    given["x"][place, :, place, place] = 3e3
    given["x"] += 100
    results = forward(kernels, given)
    var, mean = torch.var_mean(given["x"].double(), (0, 2, 3), correction=0)
    assert_agrees(results[1][0], mean, "mean")
    assert_agrees(results[2][0], (var + 1e-5).rsqrt(), "rstd")


@both_layouts
@pytest.mark.parametrize(
    ("channels", "side"), [(64, 56), (128, 28), (256, 14), (512, 7), (2048, 7)], ids=str
)
def test_blocks_fill_a_large_device(target, kernels, layout, channels, side):
    """More than half of it in each of the two launches, at sizes of ResNet-50 and 16 images."""
    given = inputs(target, (16, channels, side, side), layout, torch.bfloat16)
    with multiprocessors(target, 132):
        found = blocks(target, lambda: forward(kernels, given))
    assert found > 132
