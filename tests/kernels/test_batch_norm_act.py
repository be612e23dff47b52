"""batch_norm_act."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import magsd_kernels as mk
from magsd_kernels.backends import implementation

from . import oracles
from .support import (
    DTYPES,
    LAYOUTS,
    Target,
    all_dtypes,
    assert_agrees,
    dtype_id,
    gradcheck,
    identical,
    make_strided,
    poisoned_memory,
    random,
)

ACTS = ("relu", "silu", "none")
NAMES = ("x", "weight", "bias", "running_mean", "running_var")
STATISTICS = ("running_mean", "running_var")
all_acts = pytest.mark.parametrize("act", ACTS)
in_both_modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
with_or_without = pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
#: Triton's interpreter computes in numpy.
numpy_may_warn = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
both_formats = pytest.mark.parametrize("layout", ["contiguous", "channels_last"])


def inputs(
    shape: tuple[int, int, int, int] = (4, 5, 6, 7),
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    *,
    residual: bool = False,
    parameters: torch.dtype | None = None,
    statistics: torch.dtype | None = None,
    mean: float = 0.3,
) -> dict[str, Tensor]:
    """Arguments by name; parameters and statistics are of x's dtype if no other is named."""
    channels = shape[1]
    made = {
        "x": (2 * random(*shape, seed=1) + mean).to(dtype),
        "weight": random(channels, seed=2).to(parameters or dtype),
        "bias": random(channels, seed=3).to(parameters or dtype),
        "running_mean": random(channels, seed=4).to(statistics or parameters or dtype),
        "running_var": (random(channels, seed=5).abs() + 0.5).to(statistics or parameters or dtype),
    }
    if residual:
        made["residual"] = random(*shape, seed=6).to(dtype)
    return {name: value.to(device) for name, value in made.items()}


def strided(tensor: Tensor, layout: str) -> Tensor:
    """`make_strided`, and memory that begins one element past where vectors may."""
    if not layout.startswith("offset"):
        return make_strided(tensor, layout)
    dense = make_strided(tensor, layout.removeprefix("offset ") or "contiguous")
    parent = dense.new_empty(dense.numel() + 1)
    return parent[1:].as_strided(dense.shape, dense.stride(), 1).copy_(dense)


def gradients_of(out: Tensor, leaves: dict[str, Tensor], grad: Tensor) -> dict[str, Tensor]:
    found = torch.autograd.grad(out, list(leaves.values()), grad)
    return dict(zip(leaves, found, strict=True))


def leaves_of(given: dict[str, Tensor]) -> dict[str, Tensor]:
    """What has a gradient, asking for one."""
    return {n: v.requires_grad_() for n, v in given.items() if n not in STATISTICS}


def statistics_after(
    given: dict[str, Tensor], groups: int, training: bool, momentum: float
) -> dict[str, Tensor]:
    """As that many calls of torch's batch norm leave them, each rounded to their dtype."""
    kept = {name: given[name].detach().cpu() for name in STATISTICS}
    if not training:
        return kept
    for part in given["x"].detach().cpu().double().chunk(groups):
        wide = {name: value.double() for name, value in kept.items()}
        F.batch_norm(part, **wide, training=True, momentum=momentum)
        kept = {name: value.to(kept[name].dtype) for name, value in wide.items()}
    return kept


def check(
    target: Target,
    given: dict[str, Tensor],
    *,
    layouts: dict[str, str] | None = None,
    momentum: float = 0.1,
    training: bool,
    **options: Any,
) -> dict[str, Tensor]:
    """Result, gradients and running statistics against the oracle; `layouts` by name, or `grad`."""
    layouts = layouts or {}
    given = {
        name: strided(value.to(target.device), layouts.get(name, "contiguous"))
        for name, value in given.items()
    }
    masters = {n: v.detach().cpu().double().contiguous() for n, v in given.items()}
    after = statistics_after(given, options.get("groups", 1), training, momentum)
    leaves, wide = leaves_of(given), leaves_of(masters)
    options["training"] = training

    expected = oracles.batch_norm_act(**masters, **options)
    direction = random(*expected.shape, seed=99, dtype=given["x"].dtype)
    wanted = gradients_of(expected, wide, direction.double())
    out = target.call(mk.batch_norm_act, **given, momentum=momentum, **options)
    grad = strided(direction.to(target.device), layouts.get("grad", "contiguous"))
    found = gradients_of(out, leaves, grad)

    assert out.dtype == given["x"].dtype
    assert out.device.type == target.device
    assert_agrees(out, expected)
    for name, value in found.items():
        assert value.dtype == given[name].dtype, name
        assert_agrees(value, wanted[name], f"gradient of {name}")
        if layouts.get(name, "").endswith("channels_last"):
            assert value.is_contiguous(memory_format=torch.channels_last), name
    for name, value in after.items():
        assert given[name].dtype == value.dtype
        assert_agrees(given[name], value.double(), name)
    return {"result": out.detach(), **found, **{name: given[name] for name in STATISTICS}}


# ---------------------------------------------------------------- values and gradients


@all_dtypes
@all_acts
@with_or_without
@in_both_modes
def test_forward_and_gradients(target, dtype, act, residual, training):
    given = inputs(dtype=dtype, residual=residual)
    groups = 2 if training else 1
    check(target, given, act=act, training=training, groups=groups)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_id)
@pytest.mark.parametrize("wide", ["all", "parameters", "statistics"])
@both_formats
@in_both_modes
def test_float32_parameters_beside_half_precision(target, dtype, wide, layout, training):
    given = inputs(
        dtype=dtype,
        residual=True,
        parameters=dtype if wide == "statistics" else torch.float32,
        statistics=dtype if wide == "parameters" else torch.float32,
    )
    layouts = dict.fromkeys(("x", "residual", "grad"), layout)
    check(target, given, act="silu", training=training, layouts=layouts)


@pytest.mark.parametrize("layout", [*LAYOUTS, "offset contiguous", "offset channels_last"])
@pytest.mark.parametrize("other", [*LAYOUTS, "offset contiguous", "offset channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
def test_any_strides(target, layout, other, dtype):
    """x in one, residual and gradient in another, and each the only one that differs."""
    shape = (4, 8, 6, 8) if "offset" in layout + other else (4, 5, 6, 7)
    given = inputs(shape, dtype, residual=True)
    check(
        target, given, act="silu", training=True, groups=2,
        layouts={"x": layout, "residual": other, "grad": other},
    )  # fmt: skip
    if dtype == torch.float32 and layout != other:
        check(
            target, given, training=True, groups=2,
            layouts={"x": layout, "residual": layout, "grad": other},
        )  # fmt: skip
        check(
            target, given, training=False,
            layouts={"x": layout, "residual": other, "grad": layout},
        )  # fmt: skip


@both_formats
@pytest.mark.parametrize("groups", [1, 2, 3, 4])
@pytest.mark.parametrize("residual", [None, "relu", "silu"], ids=str)
def test_groups(target, layout, groups, residual):
    given = inputs((12, 5, 3, 5), residual=residual is not None)
    layouts = dict.fromkeys(("x", "residual", "grad"), layout)
    check(target, given, act=residual or "relu", groups=groups, training=True, layouts=layouts)


@both_formats
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=dtype_id)
@pytest.mark.parametrize("channels", [1, 3, 17, 64, 67, 130, 513, 600, 1030])
def test_any_number_of_channels(target, layout, dtype, channels):
    """Past the blocks by which kernels cut them, and no multiple of any."""
    # Two roundings of statistics, the first of which may be up or down, say nothing of channels.
    given = inputs((6, channels, 3, 2), dtype, residual=True, statistics=torch.float32)
    layouts = dict.fromkeys(("x", "residual", "grad"), layout)
    check(target, given, groups=2, training=True, layouts=layouts)
    del given["residual"]
    check(target, given, training=False, act="silu", layouts=layouts)


@both_formats
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("channels", [3, 16])
@pytest.mark.parametrize(
    "size", [(1, 1), (7, 7), (7, 9), (8, 8), (5, 13), (16, 1), (130, 131)], ids=str
)
def test_any_size_of_a_plane(target, layout, dtype, channels, size):
    if size[0] > 100:
        channels = min(channels, 3 if layout == "contiguous" else 4)
    # Of two values a gradient leaves nothing but rounding.
    given = inputs((16 if size == (1, 1) else 4, channels, *size), dtype, residual=True)
    layouts = dict.fromkeys(("x", "residual", "grad"), layout)
    check(target, given, groups=2, training=True, act="silu", layouts=layouts)
    if size[0] < 100:
        del given["residual"]
        check(target, given, training=True, layouts=layouts)
        check(target, given, training=False, layouts=layouts)


@both_formats
@pytest.mark.parametrize("shape", [(70, 12, 7, 7), (5, 70, 20, 21), (33, 256, 4, 4)], ids=str)
def test_many_rows(target, layout, shape):
    """Sums of several parts, and what is left over of the last."""
    if target.interpreted:
        shape = (min(shape[0], 12), *shape[1:])
    given = inputs(shape, residual=True)
    layouts = dict.fromkeys(("x", "residual", "grad"), layout)
    check(target, given, training=True, layouts=layouts)


@pytest.mark.parametrize("momentum", [0.0, 0.35, 1.0])
@pytest.mark.parametrize("eps", [1e-3, 0.5])
def test_momentum_and_eps(target, momentum, eps):
    check(target, inputs(), training=True, groups=2, momentum=momentum, eps=eps)
    check(target, inputs(), training=False, momentum=momentum, eps=eps)


@both_formats
def test_strided_parameters_and_statistics(target, layout):
    given = {
        name: torch.stack([value, value + 1], 1)[:, 0] if value.dim() == 1 else value
        for name, value in inputs(residual=True).items()
    }
    assert given["weight"].stride() == (2,)
    others = {name: torch.stack([v, v], 1).to(target.device) for name, v in given.items()}
    arguments = {n: others[n][:, 0] if v.dim() == 1 else v for n, v in given.items()}
    arguments = {n: v.to(target.device) for n, v in arguments.items()}
    arguments = {n: make_strided(v, layout) if v.dim() == 4 else v for n, v in arguments.items()}
    leaves = leaves_of(arguments)
    out = target.call(mk.batch_norm_act, **arguments, training=True, groups=2)
    found = gradients_of(out, leaves, torch.ones_like(out))
    dense = {n: v.detach().cpu().contiguous() for n, v in given.items()}
    wanted = check(target, dense, training=True, groups=2)
    torch.testing.assert_close(out, wanted["result"], rtol=1e-5, atol=1e-5)
    assert found["weight"].shape == (5,)
    for name in STATISTICS:
        torch.testing.assert_close(arguments[name], wanted[name], rtol=1e-6, atol=1e-6)
        assert torch.equal(others[name][:, 1].cpu(), given[name]), "what lies between is left alone"


@pytest.mark.parametrize("act", ACTS)
@with_or_without
@in_both_modes
def test_gradcheck(target, act, residual, training):
    given = inputs((4, 2, 2, 3), torch.float64, target.device, residual=residual)
    leaves = leaves_of(given)

    def run(*values: Tensor) -> Tensor:
        arguments = {name: value.detach().clone() for name, value in given.items()}
        arguments |= dict(zip(leaves, values, strict=True))
        groups = 2 if training else 1
        return target.call(
            mk.batch_norm_act, **arguments, act=act, training=training, groups=groups
        )

    assert gradcheck(target, run, list(leaves.values()))


def test_gradient_of_a_sum(target):
    """A gradient whose elements all lie in one place."""
    given = inputs(residual=True)
    leaves = leaves_of({n: v.to(target.device) for n, v in given.items()})
    rest = {name: given[name].to(target.device) for name in STATISTICS}
    out = target.call(mk.batch_norm_act, **leaves, **rest, training=True)
    expanded = torch.autograd.grad(out.sum(), list(leaves.values()), retain_graph=True)
    dense = torch.autograd.grad(out, list(leaves.values()), torch.ones_like(out))
    for a, b in zip(expanded, dense, strict=True):
        assert identical(a, b)


# ---------------------------------------------------------------- statistics


@pytest.mark.parametrize("groups", [1, 2, 4])
@both_formats
def test_running_statistics_are_those_of_so_many_batch_norms(target, groups, layout):
    given = inputs((8, 5, 6, 7), torch.float64, target.device)
    given["x"] = make_strided(given["x"], layout)
    wanted = statistics_after(given, groups, True, 0.35)
    places = [given[name].data_ptr() for name in STATISTICS]
    target.call(mk.batch_norm_act, **given, training=True, groups=groups, momentum=0.35)
    assert places == [given[name].data_ptr() for name in STATISTICS]
    for name in STATISTICS:
        torch.testing.assert_close(given[name].cpu(), wanted[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("momentum", [0.1, 0.75])
def test_statistics_of_every_dtype_are_rounded_group_by_group(target, dtype, momentum):
    """Rounding once in the end moves what a small momentum adds to half precision."""
    given = inputs((12, 40, 6, 7), dtype, target.device)
    for statistics in (dtype, torch.float32):
        arguments = given | {name: given[name].to(statistics, copy=True) for name in STATISTICS}
        wanted = statistics_after(arguments, 4, True, momentum)
        target.call(mk.batch_norm_act, **arguments, training=True, groups=4, momentum=momentum)
        for name in STATISTICS:
            assert arguments[name].dtype == statistics
            assert_agrees(arguments[name], wanted[name].double(), name)
            if statistics.itemsize == 2:
                # Rounding a sum otherwise is rare: the kernels' is within 1e-6 of the oracle's.
                assert (arguments[name].cpu() != wanted[name]).sum() <= 1


def test_evaluation_and_an_empty_batch_leave_the_statistics_alone(target):
    for shape, training, groups in [
        ((4, 5, 6, 7), False, 1), ((0, 5, 6, 7), True, 3), ((0, 5, 6, 7), False, 1),
    ]:  # fmt: skip
        given = inputs(shape, device=target.device)
        before = {name: given[name].clone() for name in STATISTICS}
        versions = [given[name]._version for name in STATISTICS]
        target.call(mk.batch_norm_act, **given, training=training, groups=groups)
        assert all(torch.equal(given[name], before[name]) for name in STATISTICS)
        if not training:
            assert versions == [given[name]._version for name in STATISTICS]


@in_both_modes
@with_or_without
@both_formats
def test_an_empty_batch(target, training, residual, layout):
    given = inputs((0, 5, 6, 7), device=target.device, residual=residual)
    given["x"] = make_strided(given["x"], layout)
    leaves = leaves_of(given)
    groups = 3 if training else 1
    out = target.call(mk.batch_norm_act, **given, training=training, groups=groups)
    assert out.shape == (0, 5, 6, 7)
    for name, value in gradients_of(out, leaves, torch.ones_like(out)).items():
        assert value.shape == given[name].shape
        assert not value.any(), name


@pytest.mark.parametrize("recording", [True, False], ids=["grad", "no_grad"])
def test_autograd_notices_that_running_statistics_change(target, recording):
    given = inputs(device=target.device)
    given["x"].requires_grad_()
    factor = torch.ones(5, device=target.device, requires_grad=True)
    for name, training in itertools.product(STATISTICS, (False, True)):
        product = (factor * given[name]).sum()
        with torch.set_grad_enabled(recording):
            target.call(mk.batch_norm_act, **given, training=training)
        if training:
            with pytest.raises(RuntimeError, match="modified by an inplace"):
                torch.autograd.grad(product, factor)
        else:
            assert torch.equal(torch.autograd.grad(product, factor)[0], given[name])


@in_both_modes
def test_backward_sees_the_statistics_of_its_own_forward(target, training):
    given = inputs(dtype=torch.float64, device=target.device)

    def gradient(change: float) -> Tensor:
        arguments = {name: value.clone() for name, value in given.items()}
        x = arguments["x"].requires_grad_()
        out = target.call(mk.batch_norm_act, **arguments, training=training, act="silu")
        for name in STATISTICS:
            arguments[name] += change
        return torch.autograd.grad(out.square().sum(), x)[0]

    assert torch.equal(gradient(0.0), gradient(2.0))


# ---------------------------------------------------------------- unusual values


@both_formats
@pytest.mark.parametrize("far", [1e4, -3e3])
def test_a_large_mean_keeps_its_variance(target, layout, far):
    """E[x^2] - E[x]^2 in float32 would lose a deviation of 1 around 1e4."""
    given = inputs((8, 5, 16, 16), device=target.device)
    given["x"] = make_strided(random(8, 5, 16, 16).float().to(target.device) + far, layout)
    before = {name: value.clone() for name, value in given.items()}
    found = target.call(mk.batch_norm_act, **given, training=True, groups=2, act="none")
    wide = {name: value.cpu().double() for name, value in before.items()}
    wanted = oracles.batch_norm_act(**wide, training=True, groups=2, act="none")
    # Half a last place of the mean is as much, times the weight, of the result.
    place = torch.finfo(torch.float32).eps * abs(far)
    assert (found.cpu().double() - wanted).abs().max() < 4 * place
    after = statistics_after(before, 2, True, 0.1)
    for name in STATISTICS:
        torch.testing.assert_close(given[name].cpu(), after[name], rtol=1e-5, atol=1e-5)


@both_formats
@pytest.mark.parametrize("place", [0, -1], ids=["first", "last"])
def test_statistics_beside_a_value_far_off(target, layout, place):
    """Sums shifted by one value of a channel must not lose the others' digits to it."""
    given = inputs((4, 3, 16, 16), device=target.device)
    given["x"][place, :, place, place] = torch.tensor([3e3, -1e4, 1e2], device=target.device)
    given["x"] = make_strided(given["x"], layout)
    wanted = statistics_after(given, 1, True, 0.1)
    target.call(mk.batch_norm_act, **given, training=True)
    for name in STATISTICS:
        torch.testing.assert_close(given[name].cpu(), wanted[name], rtol=1e-5, atol=1e-5)


@both_formats
@pytest.mark.parametrize("size", [(14, 14), (3, 2)], ids=str)
def test_squares_past_float32(target, layout, size):
    """Squares of float32 that float32 cannot hold; other backends than the CPU's add up in it."""
    if target.backend != "cpu":
        pytest.skip("only the C++ kernels add up in double")
    given = inputs((4, 20, *size), residual=True)
    given["x"] = make_strided(1e25 * given["x"], layout)
    given["running_var"].fill_(1)
    wide = {name: value.double() for name, value in given.items()}
    wanted = oracles.batch_norm_act(**wide, training=True, groups=2)
    found = target.call(mk.batch_norm_act, **given, training=True, groups=2)
    assert_agrees(found, wanted)


@numpy_may_warn
@both_formats
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), float("-inf")], ids=str)
@all_acts
@with_or_without
def test_evaluation_carries_what_is_not_finite_as_torch(target, layout, wrong, act, residual):
    given = inputs(device=target.device, residual=residual)
    given["weight"].abs_()
    given["x"][1, 2, 3, 4] = wrong
    if residual:
        given["residual"][2, 3, 1, 1] = wrong
    given["x"] = make_strided(given["x"], layout)
    leaves = leaves_of(given)
    out = target.call(mk.batch_norm_act, **given, training=False, act=act)
    grads = gradients_of(out, leaves, torch.ones_like(out))

    masters = {name: value.detach().cpu().double() for name, value in given.items()}
    wide = leaves_of(masters)
    z = F.batch_norm(*(masters[n] for n in ("x", *STATISTICS, "weight", "bias")), eps=1e-5)
    z = z + masters["residual"] if residual else z
    expected = {"relu": torch.relu, "silu": F.silu, "none": lambda value: value}[act](z)
    wanted = gradients_of(expected, wide, torch.ones_like(expected))
    assert_agrees(out, expected)
    for name in ("x", "bias", *(["residual"] if residual else [])):
        assert_agrees(grads[name], wanted[name], f"gradient of {name}")


@numpy_may_warn
@both_formats
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), float("-inf")], ids=str)
@all_acts
def test_training_carries_what_is_not_finite_through_its_channel_and_group(
    target, layout, wrong, act
):
    given = inputs((6, 20, 3, 4), device=target.device)
    clean = {name: value.clone() for name, value in given.items()}
    given["x"][3, 17, 1, 1] = wrong
    touched = torch.zeros(6, 20, 3, 4, dtype=torch.bool)
    touched[2:4, 17] = True
    results = []
    for arguments in (given, clean):
        arguments["x"] = make_strided(arguments["x"], layout)
        leaves = leaves_of(arguments)
        out = target.call(mk.batch_norm_act, **arguments, training=True, groups=3, act=act)
        results.append([out.detach(), gradients_of(out, leaves, torch.ones_like(out))["x"]])
    for found, wanted in zip(*results, strict=True):
        assert torch.equal(found.isnan().cpu(), touched)
        assert torch.equal(found.cpu()[~touched], wanted.cpu()[~touched])
    for name in STATISTICS:
        assert not given[name][17].isfinite()
        others = torch.arange(20, device=target.device) != 17
        assert torch.equal(given[name][others], clean[name][others])


@both_formats
@in_both_modes
@with_or_without
def test_the_gradient_of_relu_at_0_is_0(target, layout, training, residual):
    given = inputs(device=target.device, residual=residual)
    given["weight"].zero_()
    given["bias"].copy_(torch.tensor([0.0, 1.0, 0.0, -1.0, 2.0]))
    if residual:
        given["residual"].zero_()
    given["x"] = make_strided(given["x"], layout)
    leaves = leaves_of(given)
    out = target.call(mk.batch_norm_act, **given, training=training)
    grads = gradients_of(out, leaves, torch.ones_like(out))
    passes = torch.tensor([0.0, 1.0, 0.0, 0.0, 1.0])
    assert torch.equal(out.cpu(), (passes * given["bias"].cpu())[:, None, None].expand_as(out))
    torch.testing.assert_close(grads["bias"].cpu(), passes * 4 * 6 * 7, rtol=0, atol=1e-3)
    assert not grads["weight"][[0, 2, 3]].any()
    if residual:
        assert torch.equal(grads["residual"].cpu(), passes[:, None, None].expand_as(out))


# ---------------------------------------------------------------- which gradients are wanted


@both_formats
@all_acts
@with_or_without
@in_both_modes
def test_the_gradients_of_some_are_those_of_all(target, layout, act, residual, training):
    given = inputs(residual=residual)
    given = {name: make_strided(v.to(target.device), layout) for name, v in given.items()}
    names = [name for name in given if name not in STATISTICS]
    grad = make_strided(random(4, 5, 6, 7, seed=9).float().to(target.device), layout)

    def run(*wanted: str) -> dict[str, Tensor]:
        arguments = {name: value.detach().clone() for name, value in given.items()}
        leaves = {name: arguments[name].requires_grad_() for name in wanted}
        out = target.call(mk.batch_norm_act, **arguments, act=act, training=training)
        return gradients_of(out, leaves, grad)

    every = run(*names)
    subsets = [(name,) for name in names] + [("weight", "bias"), ("x", names[-1])]
    for subset in {tuple(dict.fromkeys(s)) for s in subsets}:
        for name, found in run(*subset).items():
            torch.testing.assert_close(found, every[name], rtol=1e-5, atol=1e-5)


@both_formats
@with_or_without
@in_both_modes
def test_what_is_not_needed_is_empty(target, layout, residual, training):
    given = {
        name: make_strided(value.to(target.device), layout)
        for name, value in inputs(residual=residual).items()
    }
    kernels = implementation(target.backend, "batch_norm_act")
    arguments = [given[name] for name in NAMES]
    kept = given.get("residual")
    out, mean, rstd = kernels.batch_norm_act(
        *arguments, kept, 2 if training else 1, "silu", training, 0.1, 1e-5
    )
    assert mean.shape == rstd.shape == (2 if training else 1, 5)
    call = functools.partial(
        kernels.batch_norm_act_backward, out, *arguments[:3], kept, mean, rstd, "silu", training
    )
    every = call([True, True, residual])
    for needs in itertools.product((True, False), repeat=3):
        if needs[2] and not residual:
            continue
        found = call(list(needs))
        for i, needed in enumerate((needs[0], needs[1], needs[1], needs[2])):
            if needed:
                torch.testing.assert_close(found[i], every[i], rtol=1e-5, atol=1e-5)
            else:
                assert found[i].numel() == 0


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("other", ["contiguous", "channels_last"])
def test_without_an_activation_the_residual_gets_the_gradient(target, layout, other):
    given = inputs(device=target.device, residual=True)
    given["x"] = make_strided(given["x"], layout)
    given["residual"] = make_strided(given["residual"], other).requires_grad_()
    grad = make_strided(random(4, 5, 6, 7, seed=9).float().to(target.device), layout)
    out = target.call(mk.batch_norm_act, **given, training=True, act="none")
    found = torch.autograd.grad(out, given["residual"], grad)[0]
    assert identical(found, grad)
    assert found.stride() == given["residual"].stride()


# ---------------------------------------------------------------- memory, threads, the compiler


@both_formats
@with_or_without
@in_both_modes
def test_does_not_read_uninitialized_memory(target, layout, residual, training):
    def run() -> list[Tensor]:
        given = inputs((4, 20, 6, 7), residual=residual)
        given = {name: make_strided(v.to(target.device), layout) for name, v in given.items()}
        leaves = leaves_of(given)
        out = target.call(
            mk.batch_norm_act, **given, training=training, groups=2 if training else 1
        )
        found = gradients_of(out, leaves, torch.ones_like(out))
        return [out.detach(), *found.values(), *(given[name] for name in STATISTICS)]

    clean = run()
    with poisoned_memory():
        poisoned = run()
    for a, b in zip(clean, poisoned, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@both_formats
@pytest.mark.parametrize("shape", [(8, 70, 28, 28), (33, 5, 40, 40)], ids=str)
def test_threads_do_not_change_a_bit(target, layout, shape):
    """Enough elements for several pieces of work, of which no thread decides the size."""
    if target.backend != "cpu":
        pytest.skip("only the C++ kernels share their work out among threads of the host")
    groups = 2 if shape[0] % 2 == 0 else 3
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            given = inputs(shape, residual=True)
            given = {name: make_strided(v, layout) for name, v in given.items()}
            leaves = leaves_of(given)
            out = target.call(mk.batch_norm_act, **given, training=True, groups=groups)
            found = gradients_of(out, leaves, given["residual"].detach())
            results.append([out, *found.values(), *(given[name] for name in STATISTICS)])
    finally:
        torch.set_num_threads(before)
    for again in results[1:]:
        for a, b in zip(results[0], again, strict=True):
            assert identical(a, b)


def test_compiles_for_any_number_of_groups():
    """Another number of views is another number of groups; one graph serves them."""
    torch._dynamo.reset()
    call = functools.partial(mk.batch_norm_act, training=True)
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")

    def run(function: Callable[..., Tensor], groups: int) -> list[Tensor]:
        given = inputs((12, 5, 3, 4), residual=True)
        leaves = leaves_of(given)
        out = function(**given, groups=groups)
        found = gradients_of(out, leaves, torch.ones_like(out))
        return [out, *found.values(), *(given[name] for name in STATISTICS)]

    run(compiled, 2)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for a, b in zip(run(compiled, 3), run(call, 3), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    torch._dynamo.reset()


# ---------------------------------------------------------------- what is refused

X = torch.zeros(4, 3, 2, 2)
V = torch.ones(3)
ERRORS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "groups do not divide": ({"groups": 3}, ValueError, "groups must divide the batch of 4, got 3"),
    "groups 0": ({"groups": 0}, ValueError, "groups must be .*, got 0"),
    "groups negative": ({"groups": -2}, ValueError, "groups must be .*, got -2"),
    "groups bool": ({"groups": True}, TypeError, "groups must be .*, got bool"),
    "groups float": ({"groups": 2.0}, TypeError, "groups must be .*, got float"),
    "one value": (
        {"x": X[:2, :, :1, :1], "groups": 2}, ValueError,
        r"x must have more than one value per channel and group in training, "
        r"got shape \(2, 3, 1, 1\) and groups=2",
    ),
    "eps 0": ({"eps": 0}, ValueError, "eps must be above 0, got 0"),
    "eps negative": ({"eps": -1e-5}, ValueError, "eps must be .*, got -1e-05"),
    "eps not a number": ({"eps": "small"}, TypeError, "eps must be .*, got str"),
    "momentum past 1": ({"momentum": 1.5}, ValueError, "momentum must be .*, got 1.5"),
    "momentum None": ({"momentum": None}, TypeError, "momentum must be .*, got NoneType"),
    "act unknown": ({"act": "gelu"}, ValueError, "act must be .*; got 'gelu'"),
    "act None": ({"act": None}, TypeError, "act must be .*, got NoneType"),
    "training not a flag": ({"training": 1}, TypeError, "training must be .*, got int"),
    "x integers": ({"x": X.int()}, TypeError, "x must be .*int32"),
    "x dimensions": ({"x": X[0]}, ValueError, r"x must .*\(3, 2, 2\)"),
    "residual shape": ({"residual": X[:2]}, ValueError, r"residual must .*\(2, 3, 2, 2\)"),
    "residual dtype": ({"residual": X.double()}, TypeError, "residual must .*float64"),
    "residual device": ({"residual": X.to("meta")}, ValueError, "residual must .*meta"),
    "weight shape": ({"weight": V[:2]}, ValueError, r"weight must .*\(2,\)"),
    "weight dtype": ({"weight": V.half()}, TypeError, "weight must .*float16"),
    "bias device": ({"bias": V.to("meta")}, ValueError, "bias must .*meta"),
    "mean dimensions": ({"running_mean": V[None]}, ValueError, r"running_mean must .*\(1, 3\)"),
    "mean missing": ({"running_mean": None}, TypeError, "running_mean must .*NoneType"),
    "variance dtype": ({"running_var": V.double()}, TypeError, "running_var must .*float64"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    changes, kind, message = ERRORS[name]
    arguments: dict[str, Any] = {"x": X, "training": True}
    arguments |= {key: V.clone() for key in NAMES[1:]}
    with pytest.raises(kind, match=f"^batch_norm_act: {message}"):
        mk.batch_norm_act(**(arguments | changes))
    assert torch.equal(arguments["running_mean"], V)


def test_one_value_per_channel_is_enough_in_evaluation(target):
    given = inputs((2, 5, 1, 1), device=target.device)
    assert target.call(mk.batch_norm_act, **given, training=False, groups=2).shape == (2, 5, 1, 1)
