"""multiscale_attention."""

from __future__ import annotations

import copy
from collections.abc import Sequence
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
    Target,
    all_dtypes,
    all_layouts,
    assert_agrees,
    assert_matches_oracle,
    dtype_id,
    gradcheck,
    identical,
    launches,
    make_strided,
    multiprocessors,
    poisoned_memory,
    random,
)

MODES = [("area", False), ("bilinear", False), ("bilinear", True), ("nearest", False)]
all_modes = pytest.mark.parametrize(("mode", "align_corners"), MODES)
INCEPTION = ((25, 25), (12, 12), (5, 5))


def maps_of(*sizes: tuple[int, int], batch: int = 2, channels: int = 3) -> list[Tensor]:
    return [random(batch, channels, *size, seed=i) for i, size in enumerate(sizes)]


def scale_inputs(
    sizes: Sequence[tuple[int, int]] = ((9, 7), (4, 3)), batch: int = 2, channels: int = 3
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    n = len(sizes)
    return (
        [2 * random(batch, channels, *s, seed=i) + 0.3 for i, s in enumerate(sizes)],
        [random(channels, seed=10 + i) for i in range(n)],
        [random(channels, seed=20 + i) for i in range(n)],
        [random(channels, seed=30 + i) for i in range(n)],
        [random(channels, seed=40 + i).abs() + 0.5 for i in range(n)],
    )


def check_multiscale(
    target: Target,
    dtype: torch.dtype,
    *,
    training: bool,
    parameters: torch.dtype | None = None,
    inputs: tuple[list[Tensor], ...] | None = None,
    layout: str = "contiguous",
    size: tuple[int, int] | None = None,
    **options: Any,
) -> None:
    """Forward and gradients of projections, weights and biases against the oracle."""
    parameters = parameters or dtype
    xs, ws, bs, means, variances = inputs or scale_inputs()
    n = len(xs)
    means, variances = ([s.to(parameters) for s in group] for group in (means, variances))

    def run(*leaves: Tensor) -> Tensor:
        on_device = [[s.clone().to(target.device) for s in group] for group in (means, variances)]
        groups = [leaves[:n], leaves[n : 2 * n], leaves[2 * n :]]
        return target.call(
            mk.multiscale_attention, *groups, *on_device, size, training=training, **options
        )

    def oracle(*leaves: Tensor) -> Tensor:
        groups = [leaves[:n], leaves[n : 2 * n], leaves[2 * n :]]
        doubles = [[s.double() for s in group] for group in (means, variances)]
        known = {k: v for k, v in options.items() if k != "momentum"}
        return oracles.multiscale_attention(*groups, *doubles, size, training=training, **known)

    dtypes = [dtype] * n + [parameters] * (2 * n)
    assert_matches_oracle(run, oracle, [*xs, *ws, *bs], target, dtypes, layout)


in_both_modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


@all_dtypes
@in_both_modes
def test_multiscale_forward_and_gradients(target, dtype, training):
    check_multiscale(target, dtype, training=training)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_id)
@in_both_modes
def test_multiscale_half_activations_with_float32_parameters(target, dtype, training):
    if dtype == torch.float16 and target.backend != "reference":
        pytest.skip("the contract promises float32 parameters for bfloat16 activations only")
    check_multiscale(target, dtype, training=training, parameters=torch.float32)


@all_layouts
@in_both_modes
def test_multiscale_takes_any_strides(target, layout, training):
    check_multiscale(target, torch.float32, training=training, layout=layout)


@all_modes
@in_both_modes
def test_multiscale_every_mode(target, mode, align_corners, training):
    check_multiscale(
        target,
        torch.float32,
        training=training,
        mode=mode,
        align_corners=align_corners,
        size=(6, 5),
    )


@in_both_modes
@pytest.mark.parametrize("channels", [1, 5, 33])
def test_multiscale_inception_sizes_and_odd_channels(target, training, channels):
    inputs = scale_inputs(INCEPTION, batch=2, channels=channels)
    check_multiscale(target, torch.float32, training=training, inputs=inputs)


@in_both_modes
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
def test_multiscale_published_number_of_maps(target, training, layout, dtype):
    """32 maps, for which kernels may have a path of their own, with blocks of rows left over."""
    inputs = scale_inputs(((10, 9), (5, 3)), batch=3, channels=32)
    check_multiscale(target, dtype, training=training, inputs=inputs, layout=layout)


@in_both_modes
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("channels", [2, 40])
def test_multiscale_maps_of_many_blocks(target, training, layout, channels):
    """Planes past a block's threads, even and odd, and vectors of maps that end inside a group."""
    batch = 1 if target.interpreted else 5
    inputs = scale_inputs(((24, 26), (37, 19), (6, 8)), batch=batch, channels=channels)
    check_multiscale(
        target, torch.float32, training=training, inputs=inputs, layout=layout, size=(19, 18)
    )


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("channels", [5, 40])
def test_multiscale_parts_of_a_large_device(target, layout, dtype, channels):
    """More parts of a channel than a warp has lanes, of maps of very different sizes."""
    batch = 2 if target.interpreted else 6
    inputs = scale_inputs(((28, 28), (14, 14), (7, 7)), batch=batch, channels=channels)
    with multiprocessors(target, 132):
        check_multiscale(target, dtype, training=True, inputs=inputs, layout=layout)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_multiscale_same_bits_whatever_ran_before(target, layout):
    """Blocks end in any order, and what they count by is left as it was found."""
    xs, *rest = scale_inputs(((20, 24), (10, 12)), batch=5, channels=20)
    others = scale_inputs(((9, 8), (16, 16), (4, 4)), batch=3, channels=40)

    def run(inputs):
        maps, *parameters = [[x.float().to(target.device) for x in group] for group in inputs]
        maps = [make_strided(x, layout).requires_grad_() for x in maps]
        weights = [x.requires_grad_() for x in parameters[0]]
        found = target.call(mk.multiscale_attention, maps, weights, *parameters[1:], training=True)
        gradients = torch.autograd.grad(found.square().sum(), [*maps, *weights])
        return [found.detach(), *gradients, *parameters[2], *parameters[3]]

    with multiprocessors(target, 132):
        first = run((xs, *rest))
        run(others)
        for _ in range(2):
            for a, b in zip(first, run((xs, *rest)), strict=True):
                assert identical(a, b)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_multiscale_two_launches_each_way_without_a_fill(target, layout):
    xs, *rest = scale_inputs(((20, 24), (10, 12)), batch=5, channels=20)
    maps, *parameters = [[x.float().to(target.device) for x in group] for group in (xs, *rest)]
    maps = [make_strided(x, layout) for x in maps]
    kernels = implementation(target.backend, "multiscale_attention")
    results = []

    def forward(training=True):
        options = (training, 0.1, 1e-3, "area", False)
        results[:] = kernels.multiscale_attention(maps, *parameters, [10, 12], *options)

    def backward():
        grad, mean, rstd = results
        kernels.multiscale_attention_backward(
            grad, maps, *parameters[:2], mean, rstd, True, "area", False
        )

    with multiprocessors(target, 132):
        assert launches(target, forward) == 2
        assert launches(target, backward) == 2
        assert launches(target, lambda: forward(False)) == 1


@in_both_modes
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("ratios", [(2, 2), (4, 4), (1, 6), (3, 1), (5, 8), (8, 7)], ids=str)
@pytest.mark.parametrize("size", [(7, 7), (2, 11)], ids=str)
def test_multiscale_whole_ratios(target, training, layout, dtype, ratios, size):
    """Average pooling without a rest, of rows shorter and longer than any vector."""
    fine = (size[0] * ratios[0], size[1] * ratios[1])
    inputs = scale_inputs((fine, size), batch=2, channels=5)
    check_multiscale(target, dtype, training=training, inputs=inputs, layout=layout)


@in_both_modes
@pytest.mark.parametrize("last", [(True, False), (False, True)], ids=str)
def test_multiscale_scales_in_different_memory_formats(target, training, last):
    xs, *groups = scale_inputs(channels=8)
    formats = [torch.channels_last if yes else torch.contiguous_format for yes in last]

    def run(*formats: torch.memory_format) -> list[Tensor]:
        pairs = zip(xs, formats, strict=True)
        leaves = [
            x.to(target.device).contiguous(memory_format=f).requires_grad_() for x, f in pairs
        ]
        rest = [[t.to(target.device) for t in group] for group in copy.deepcopy(groups)]
        out = target.call(mk.multiscale_attention, leaves, *rest, training=training)
        gradients = torch.autograd.grad(out.square().sum(), leaves)
        assert [g.stride() for g in gradients] == [x.stride() for x in leaves]
        return [out.detach(), *gradients]

    found, wanted = run(*formats), run(torch.contiguous_format, torch.contiguous_format)
    assert found[0].is_contiguous(memory_format=formats[0])
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_multiscale_one_image_one_scale(target):
    check_multiscale(target, torch.float32, training=True, inputs=scale_inputs([(5, 5)], batch=1))


def test_multiscale_single_pixel_maps(target):
    """Two images of 1 x 1: two values per channel, enough for batch statistics."""
    check_multiscale(
        target, torch.float64, training=True, inputs=scale_inputs([(3, 3), (1, 1)], batch=2)
    )


@pytest.mark.parametrize("eps", [1e-5, 0.5])
def test_multiscale_eps(target, eps):
    check_multiscale(target, torch.float32, training=True, eps=eps)
    check_multiscale(target, torch.float32, training=False, eps=eps)


def test_multiscale_default_eps_is_the_published_one(target):
    x = 1e-2 * random(2, 3, 4, 4, dtype=torch.float32).to(target.device)
    one, zero = torch.ones(3, device=target.device), torch.zeros(3, device=target.device)
    arguments = [[x], [one], [zero], [zero.clone()], [one.clone()]]
    default = target.call(mk.multiscale_attention, *arguments, training=True)
    explicit = target.call(mk.multiscale_attention, *arguments, training=True, eps=1e-3)
    assert torch.equal(default, explicit)


def test_multiscale_large_mean_keeps_its_variance(target):
    """Batch statistics by E[x^2] - E[x]^2 in float32 would lose a spread of 1 around 3000."""
    xs, ws, bs, means, variances = scale_inputs([(16, 16), (4, 4)])
    inputs = ([x / 2 + 3000.0 for x in xs], ws, bs, means, variances)
    leaves = [x.float().to(target.device) for x in inputs[0]]
    rest = [[t.float().to(target.device) for t in group] for group in inputs[1:]]
    found = target.call(mk.multiscale_attention, leaves, *rest, training=True)
    wanted = oracles.multiscale_attention(
        [x.cpu().double() for x in leaves],
        *[[t.cpu().double() for t in group] for group in rest],
        training=True,
    )
    assert (found.cpu().double() - wanted).abs().max() < 1e-3


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_running_statistics_with_a_first_value_far_off(target, layout):
    """Sums shifted by the first value of a channel must not lose the others' digits to it."""
    x = random(4, 3, 16, 16)
    x[0, :, 0, 0] = torch.tensor([3e3, -1e4, 1e2])
    x = make_strided(x.float().to(target.device), layout)
    one, zero = torch.ones(3, device=target.device), torch.zeros(3, device=target.device)
    mean, var = zero.clone(), one.clone()
    target.call(mk.multiscale_attention, [x], [one], [zero], [mean], [var], training=True)
    wanted = zero.cpu().double(), one.cpu().double()
    F.batch_norm(x.cpu().double(), *wanted, training=True)
    for found, want in zip((mean, var), wanted, strict=True):
        torch.testing.assert_close(found.cpu().double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("side", [3, 7, 67])
def test_running_statistics_with_a_first_image_far_off(target, layout, side):
    """Nor must the digits go where most of a batch lies close together, far from its start."""
    if target.backend != "cpu":
        pytest.skip("torch's own batch norm loses them; only the C++ kernels add up in double")
    x = random(48, 3, side, side)
    x[0] += torch.tensor([3e3, -1e4, 1e2])[:, None, None]
    x = make_strided(x.float().to(target.device), layout)
    one, zero = torch.ones(3, device=target.device), torch.zeros(3, device=target.device)
    mean, var = zero.clone(), one.clone()
    target.call(mk.multiscale_attention, [x], [one], [zero], [mean], [var], training=True)
    wanted = zero.cpu().double(), one.cpu().double()
    F.batch_norm(x.cpu().double(), *wanted, training=True)
    for found, want in zip((mean, var), wanted, strict=True):
        torch.testing.assert_close(found.cpu().double(), want, rtol=1e-5, atol=1e-5)


def test_multiscale_squares_past_float32(target):
    """Squares of float32 that float32 cannot hold; other backends than the CPU's add up in it."""
    if target.backend != "cpu":
        pytest.skip("only the C++ kernels add up in double")
    xs, ws, bs, means, variances = scale_inputs([(14, 14), (7, 7)])
    inputs = ([1e25 * x for x in xs], ws, bs, means, variances)
    leaves, *rest = ([t.float() for t in group] for group in inputs)
    found = target.call(mk.multiscale_attention, leaves, *rest, training=True)
    doubles = [[t.double() for t in group] for group in (leaves, *rest)]
    wanted = oracles.multiscale_attention(*doubles, training=True)
    assert_agrees(found, wanted)


@pytest.mark.parametrize("momentum", [0.1, 0.35, 1.0])
@pytest.mark.parametrize(
    ("dtype", "parameters"),
    [(d, d) for d in DTYPES] + [(torch.bfloat16, torch.float32)],
    ids=str,
)
def test_running_statistics_are_those_of_batch_norm(target, dtype, parameters, momentum):
    xs, ws, bs, means, variances = scale_inputs()
    xs = [x.to(target.device, dtype) for x in xs]
    ws, bs, means, variances = (
        [t.to(target.device, parameters) for t in group] for group in (ws, bs, means, variances)
    )
    wanted = [[t.double().clone() for t in group] for group in (means, variances)]
    for x, mean, var in zip(xs, *wanted, strict=True):
        F.batch_norm(x.double(), mean, var, training=True, momentum=momentum)
    identities = [id(t) for t in (*means, *variances)]
    target.call(
        mk.multiscale_attention, xs, ws, bs, means, variances, training=True, momentum=momentum
    )
    assert identities == [id(t) for t in (*means, *variances)]
    for kind, found_group, wanted_group in zip(
        ("mean", "var"), (means, variances), wanted, strict=True
    ):
        for found, want in zip(found_group, wanted_group, strict=True):
            assert found.dtype == parameters
            assert_agrees(found, want, f"running {kind}")


def test_evaluation_leaves_running_statistics_alone(target):
    groups = [[t.float().to(target.device) for t in group] for group in scale_inputs()]
    before = copy.deepcopy(groups)
    target.call(mk.multiscale_attention, *groups, training=False)
    for group, saved in zip(groups, before, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(group, saved, strict=True))


def test_an_empty_batch_leaves_running_statistics_alone(target):
    groups = [[t.float().to(target.device) for t in g] for g in scale_inputs(batch=0)]
    before = copy.deepcopy(groups[3:])
    target.call(mk.multiscale_attention, *groups, training=True)
    for group, saved in zip(groups[3:], before, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(group, saved, strict=True))


@pytest.mark.parametrize("recording", [True, False], ids=["grad", "no_grad"])
def test_autograd_notices_that_running_statistics_change(target, recording):
    """A gradient that was to read them as they were is refused, never computed from new values."""
    groups = [[t.float().to(target.device) for t in group] for group in scale_inputs()]
    groups[0][0].requires_grad_()
    factor = torch.ones(3, device=target.device, requires_grad=True)

    for statistic in (*groups[3], *groups[4]):
        for training in (False, True):
            product = (factor * statistic).sum()
            with torch.set_grad_enabled(recording):
                target.call(mk.multiscale_attention, *groups, training=training)
            if training:
                with pytest.raises(RuntimeError, match="modified by an inplace"):
                    torch.autograd.grad(product, factor)
            else:
                assert torch.equal(torch.autograd.grad(product, factor)[0], statistic)


def test_backward_sees_the_statistics_of_its_own_forward(target):
    """Running statistics that change between forward and backward do not change the gradient."""
    groups = [[t.double().to(target.device) for t in group] for group in scale_inputs()]

    def gradient(steps: int) -> Tensor:
        xs, ws, bs, means, variances = copy.deepcopy(groups)
        xs[0].requires_grad_()
        out = target.call(mk.multiscale_attention, xs, ws, bs, means, variances, training=True)
        for _ in range(steps):
            detached = [x.detach() + 1 for x in xs]
            target.call(mk.multiscale_attention, detached, ws, bs, means, variances, training=True)
        return torch.autograd.grad(out.square().sum(), xs[0])[0]

    assert torch.equal(gradient(0), gradient(2))


@in_both_modes
def test_multiscale_gradcheck(target, training):
    groups = [
        [t.to(target.device) for t in group]
        for group in scale_inputs([(4, 3), (2, 2)], batch=2, channels=2)
    ]
    leaves = [t.requires_grad_() for group in groups[:3] for t in group]

    def run(*leaves: Tensor) -> Tensor:
        statistics = [[t.clone() for t in group] for group in groups[3:]]
        return target.call(
            mk.multiscale_attention,
            leaves[:2],
            leaves[2:4],
            leaves[4:],
            *statistics,
            training=training,
        )

    assert gradcheck(target, run, leaves)


def test_multiscale_gradient_of_a_subset(target):
    """Frozen affine parameters: the others' gradients are unchanged and theirs are absent."""
    groups = [[t.to(target.device) for t in group] for group in scale_inputs()]
    every = [t.clone().requires_grad_() for group in groups[:3] for t in group]
    out = target.call(
        mk.multiscale_attention, every[:2], every[2:4], every[4:], *groups[3:], training=True
    )
    full = torch.autograd.grad(out.square().sum(), every)
    x = groups[0][1].clone().requires_grad_()
    out = target.call(
        mk.multiscale_attention,
        [groups[0][0], x],
        *groups[1:3],
        *groups[3:],
        training=True,
    )
    assert torch.equal(torch.autograd.grad(out.square().sum(), x)[0], full[1])
    assert all(t.grad is None for group in groups[1:3] for t in group)


@in_both_modes
def test_multiscale_empty_batch(target, training):
    groups = [[t.float().to(target.device) for t in g] for g in scale_inputs(batch=0)]
    groups[0] = [x.requires_grad_() for x in groups[0]]
    out = target.call(mk.multiscale_attention, *groups, training=training)
    assert out.shape == (0, 3, 4, 3)
    assert [g.shape for g in torch.autograd.grad(out.sum(), groups[0])] == [
        x.shape for x in groups[0]
    ]


def test_multiscale_one_value_per_channel_is_refused(target):
    groups = [
        [t.float().to(target.device) for t in g] for g in scale_inputs([(3, 3), (1, 1)], batch=1)
    ]
    with pytest.raises(ValueError, match="multiscale_attention") as caught:
        target.call(mk.multiscale_attention, *groups, training=True)
    assert "projections" in str(caught.value)
    assert target.call(mk.multiscale_attention, *groups, training=False).shape == (1, 3, 1, 1)


def test_multiscale_does_not_read_uninitialized_memory(target):
    def run() -> list[Tensor]:
        groups = [[t.float().to(target.device) for t in g] for g in scale_inputs()]
        leaves = [t.requires_grad_() for group in groups[:3] for t in group]
        out = target.call(mk.multiscale_attention, *groups, training=True)
        return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves), *groups[4]]

    clean = run()
    with poisoned_memory():
        poisoned = run()
    for a, b in zip(clean, poisoned, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


X = torch.zeros(2, 3, 4, 4)
V = torch.ones(3)
MULTISCALE_ERRORS = {
    "no scales": ({"projections": []}, ValueError, "projections", "0"),
    "nine scales": ({"projections": [X] * 9}, ValueError, "projections", "9"),
    "not a sequence": ({"projections": X}, TypeError, "projections", "Tensor"),
    "integers": ({"projections": [X.long(), X]}, TypeError, "projections", "int64"),
    "mixed dtypes": ({"projections": [X, X.double()]}, TypeError, "projections", "float"),
    "three dimensions": ({"projections": [X, X[0]]}, ValueError, "projections", r"\(3, 4, 4\)"),
    "other batch": ({"projections": [X, X[:1]]}, ValueError, "projections", r"\(1, 3, 4, 4\)"),
    "other device": ({"projections": [X, X.to("meta")]}, ValueError, "projections", "meta"),
    "size": ({"size": (4, -1)}, ValueError, "size", r"\(4, -1\)"),
    "mode": ({"mode": "cubic"}, ValueError, "mode", "cubic"),
    "eps not a number": ({"eps": "small"}, TypeError, "eps", "str"),
    "eps negative": ({"eps": -1e-3}, ValueError, "eps", "-0.001"),
    "momentum not a number": ({"momentum": "slow"}, TypeError, "momentum", "str"),
    "weights fewer": ({"weights": [V]}, ValueError, "weights", "1"),
    "weights shape": ({"weights": [V, V[:2]]}, ValueError, "weights", r"\(2,\)"),
    "weights dimensions": ({"weights": [V, X]}, ValueError, "weights", r"\(2, 3, 4, 4\)"),
    "weights integers": ({"weights": [V, V.int()]}, TypeError, "weights", "int32"),
    "weights not a tensor": ({"weights": [V, 1.0]}, TypeError, "weights", "float"),
    "weights device": ({"weights": [V, V.to("meta")]}, ValueError, "weights", "meta"),
    "biases shape": ({"biases": [V, V[:2]]}, ValueError, "biases", r"\(2,\)"),
    "biases fewer": ({"biases": [V]}, ValueError, "biases", "1"),
    "biases device": ({"biases": [V, V.to("meta")]}, ValueError, "biases", "meta"),
    "means shape": ({"running_means": [V, V[:2]]}, ValueError, "running_means", r"\(2,\)"),
    "means integers": ({"running_means": [V, V.int()]}, TypeError, "running_means", "int32"),
    "means device": ({"running_means": [V, V.to("meta")]}, ValueError, "running_means", "meta"),
    "vars fewer": ({"running_vars": [V]}, ValueError, "running_vars", "1"),
    "vars shape": ({"running_vars": [V, V[:2]]}, ValueError, "running_vars", r"\(2,\)"),
    "vars device": ({"running_vars": [V, V.to("meta")]}, ValueError, "running_vars", "meta"),
}


@pytest.mark.parametrize("name", MULTISCALE_ERRORS)
def test_multiscale_errors(name):
    changes, kind, argument, came = MULTISCALE_ERRORS[name]
    groups = ("weights", "biases", "running_means", "running_vars")
    arguments: dict[str, Any] = {"projections": [X, X], "training": True}
    arguments |= {group: [V.clone(), V.clone()] for group in groups}
    with pytest.raises(kind, match=came) as caught:
        mk.multiscale_attention(**(arguments | changes))
    assert "multiscale_attention" in str(caught.value)
    assert argument in str(caught.value)
