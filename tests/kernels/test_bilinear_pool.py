"""bilinear_attention_pool and its module."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import magsd_kernels as mk

from . import oracles
from .support import (
    all_dtypes,
    all_layouts,
    assert_agrees,
    assert_matches_oracle,
    attention_maps,
    examples,
    gradcheck,
    identical,
    make_strided,
    poisoned_memory,
    random,
)

both_pools = pytest.mark.parametrize("pool", ["avg", "max"])


def inputs_of(features=(2, 5, 6, 7), attention=(2, 3, 4, 3)):
    return [random(*features, seed=1), attention_maps(*attention, seed=2, dtype=torch.float64)]


def check(target, dtype, inputs=None, layout="contiguous", **options):
    return assert_matches_oracle(
        lambda f, a: target.call(mk.bilinear_attention_pool, f, a, **options),
        lambda f, a: oracles.bilinear_attention_pool(f, a, **options),
        inputs or inputs_of(),
        target,
        dtype,
        layout,
    )


@all_dtypes
@both_pools
def test_forward_and_gradients(target, dtype, pool):
    check(target, dtype, pool=pool)


@all_dtypes
@both_pools
def test_same_size_needs_no_resize(target, dtype, pool):
    check(target, dtype, inputs_of(attention=(2, 3, 6, 7)), pool=pool)


@pytest.mark.parametrize(
    ("signed_sqrt", "normalize", "scale"),
    list(itertools.product([True, False], [True, False], [1.0, 100.0])),
)
@both_pools
def test_every_option(target, pool, signed_sqrt, normalize, scale):
    check(
        target,
        torch.float32,
        pool=pool,
        signed_sqrt=signed_sqrt,
        normalize=normalize,
        scale=scale,
    )


def test_defaults_are_the_published_pooling(target):
    f, a = (x.float().to(target.device) for x in inputs_of())
    explicit = target.call(
        mk.bilinear_attention_pool,
        f,
        a,
        pool="avg",
        signed_sqrt=True,
        normalize=True,
        scale=1.0,
        eps=1e-12,
    )
    assert torch.equal(target.call(mk.bilinear_attention_pool, f, a), explicit)


@all_layouts
@both_pools
def test_any_strides(target, layout, pool):
    check(target, torch.float32, layout=layout, pool=pool)


@both_pools
@pytest.mark.parametrize(
    ("features", "attention"),
    [
        ((1, 5, 7, 7), (1, 3, 7, 7)),
        ((3, 2, 1, 1), (3, 2, 1, 1)),
        ((2, 4, 5, 5), (2, 3, 1, 1)),
        ((2, 4, 1, 1), (2, 3, 5, 5)),
        ((1, 3, 12, 12), (1, 2, 25, 25)),
        ((1, 3, 12, 5), (1, 2, 5, 12)),
        ((2, 17, 5, 5), (2, 33, 5, 5)),
    ],
    ids=str,
)
def test_sizes(target, pool, features, attention):
    check(target, torch.float32, inputs_of(features, attention), pool=pool)


@both_pools
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("batch", [1, 3])
def test_channels_of_several_blocks(target, pool, layout, batch):
    """More channels and maps than a kernel takes at once, with some left over of each.

    Features are rectified: among so many entries some would else cancel to nearly 0, where the
    root's derivative enlarges any rounding.
    """
    f, a = inputs_of((batch, 261, 2, 3), (batch, 5, 2, 3))
    check(target, torch.float32, [f.abs() + 0.1, a], layout, pool=pool)
    f, a = inputs_of((batch, 7, 3, 3), (batch, 53, 3, 3))
    check(target, torch.bfloat16, [f.abs() + 0.1, a], layout, pool=pool)


def check_in_place(target, inputs, **options):
    """Compare with the reference in float64: at such sizes the oracle's loops are slow."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    masters = [x.detach().cpu().double().requires_grad_() for x in inputs]
    out = target.call(mk.bilinear_attention_pool, *leaves, **options)
    wanted = mk.bilinear_attention_pool(*masters, backend="reference", **options)
    assert_agrees(out, wanted)
    direction = random(*wanted.shape, seed=99, dtype=out.dtype)
    found = torch.autograd.grad(out, leaves, direction.to(target.device))
    for i, want in enumerate(torch.autograd.grad(wanted, masters, direction.double())):
        assert_agrees(found[i], want, f"gradient {i}")


@all_dtypes
@both_pools
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("size", [(11, 10), (5, 6)], ids=["same size", "resized"])
def test_several_tiles_of_every_kind(target, dtype, pool, layout, size):
    """Channels whose rows are aligned, maps and pixels past what a kernel takes at once."""
    batch = 1 if target.interpreted else 2
    f, a = inputs_of((batch, 72, 11, 10), (batch, 35, *size))
    inputs = [make_strided(x.to(target.device, dtype), layout) for x in (f.abs() + 0.1, a)]
    check_in_place(target, inputs, pool=pool)


@all_dtypes
@both_pools
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("offset", [0, 1, 8])
def test_features_amid_others(target, dtype, pool, channels_last, offset):
    """Not one byte beside the features counts, wherever they begin."""
    f, a = (x.to(target.device, dtype) for x in inputs_of((2, 16, 5, 7), (2, 3, 5, 7)))
    f = f.abs() + 0.1
    if channels_last:
        parent = torch.full((2, 5, 7, 32), torch.nan, dtype=dtype, device=target.device)
        view = parent[..., offset : offset + 16].permute(0, 3, 1, 2)
    else:
        parent = torch.full((f.numel() + 16,), torch.nan, dtype=dtype, device=target.device)
        view = parent[offset : offset + f.numel()].view(f.shape)
    view.copy_(f)
    check_in_place(target, [view, a], pool=pool)


@both_pools
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_what_is_not_finite_stays_in_its_channel(target, pool, layout):
    f, a = (x.float().to(target.device) for x in inputs_of((1, 70, 5, 7), (1, 3, 5, 7)))
    f, a = f.abs() + 0.1, a.abs() + 0.1
    f[0, 3, 4, 6], f[0, 64, 0, 0] = torch.nan, torch.inf
    f = make_strided(f, layout)
    out = target.call(mk.bilinear_attention_pool, f, a, pool=pool, normalize=False).view(3, 70)
    assert out[:, 3].isnan().all()
    assert out[:, 64].isposinf().all()
    assert int(out.isfinite().sum()) == 3 * 68


def test_entry_is_map_times_channels_plus_channel(target):
    features = torch.zeros(1, 4, 2, 2, device=target.device)
    attention = torch.zeros(1, 3, 2, 2, device=target.device)
    features[0, 3], attention[0, 2] = 2.0, 5.0
    out = target.call(
        mk.bilinear_attention_pool, features, attention, signed_sqrt=False, normalize=False
    )
    assert out.shape == (1, 12)
    assert out.nonzero().tolist() == [[0, 2 * 4 + 3]]
    assert float(out[0, 11]) == 10.0


def test_rows_have_norm_scale(target):
    f, a = (x.float().to(target.device) for x in inputs_of())
    out = target.call(mk.bilinear_attention_pool, f, a, scale=100.0)
    torch.testing.assert_close(out.norm(dim=1), torch.full((2,), 100.0, device=target.device))


@both_pools
@pytest.mark.parametrize("which", ["features", "attention", "both"])
def test_all_zero_inputs(target, pool, which):
    """P = 0: the square root's derivative is 0 there, so every gradient is 0 and finite."""
    f, a = inputs_of()
    f = f * (which == "attention")
    a = a * (which == "features")
    out = check(target, torch.float32, [f, a], pool=pool)
    assert not out.any()


def test_zero_pooled_entries_among_others(target):
    """One channel and one map are zero: their entries get gradient 0 through the square root."""
    f, a = inputs_of(attention=(2, 3, 6, 7))
    f[:, 1], a[:, 2] = 0.0, 0.0
    check(target, torch.float32, [f, a])


def test_square_root_eps(target):
    check(target, torch.float32, eps=0.5, normalize=False)
    check(target, torch.float32, eps=0.5)


def test_tiny_norm_is_clamped(target):
    """||P|| under 1e-12 is divided by 1e-12."""
    f, a = (1e-8 * x for x in inputs_of(attention=(2, 3, 6, 7)))
    check(target, torch.float64, [f, a], signed_sqrt=False)


def test_max_gradient_goes_to_the_first_maximal_pixel(target):
    features = torch.ones(2, 2, 3, 4, device=target.device).requires_grad_()
    attention = torch.ones(2, 3, 3, 4, device=target.device)
    attention[:, :, 1, 2] = 2.0
    attention[:, :, 2, 1] = 2.0
    attention.requires_grad_()
    out = target.call(
        mk.bilinear_attention_pool,
        features,
        attention,
        pool="max",
        signed_sqrt=False,
        normalize=False,
    )
    assert torch.equal(out, torch.full((2, 6), 2.0, device=target.device))
    by_features, by_attention = torch.autograd.grad(out.sum(), [features, attention])
    wanted_f, wanted_a = torch.zeros(2, 2, 3, 4), torch.zeros(2, 3, 3, 4)
    wanted_f[:, :, 1, 2] = 3 * 2.0
    wanted_a[:, :, 1, 2] = 2 * 1.0
    assert torch.equal(by_features.cpu(), wanted_f)
    assert torch.equal(by_attention.cpu(), wanted_a)


def test_max_of_negative_products(target):
    f, a = inputs_of()
    check(target, torch.float32, [-f.abs() - 0.1, a + 0.1], pool="max")


@both_pools
@pytest.mark.parametrize("normalize", [True, False])
def test_gradcheck(target, pool, normalize):
    f, a = inputs_of((2, 3, 3, 4), (2, 2, 2, 3))
    leaves = [(x + 0.3).to(target.device).requires_grad_() for x in (f.abs(), a)]
    assert gradcheck(
        target,
        lambda f, a: target.call(
            mk.bilinear_attention_pool, f, a, pool=pool, normalize=normalize, scale=3.0
        ),
        leaves,
    )


@both_pools
def test_gradient_of_one_input_alone(target, pool):
    f, a = (x.to(target.device) for x in inputs_of())
    both = [f.clone().requires_grad_(), a.clone().requires_grad_()]
    out = target.call(mk.bilinear_attention_pool, *both, pool=pool)
    wanted = torch.autograd.grad(out.square().sum() + out.sum(), both)
    for i in range(2):
        leaves = [f.clone(), a.clone()]
        leaves[i].requires_grad_()
        out = target.call(mk.bilinear_attention_pool, *leaves, pool=pool)
        (found,) = torch.autograd.grad(out.square().sum() + out.sum(), leaves[i])
        torch.testing.assert_close(found, wanted[i])


@both_pools
def test_empty_batch(target, pool):
    f, a = (
        x.float().to(target.device).requires_grad_() for x in inputs_of((0, 5, 6, 7), (0, 3, 4, 3))
    )
    out = target.call(mk.bilinear_attention_pool, f, a, pool=pool)
    assert out.shape == (0, 15)
    gradients = torch.autograd.grad(out.sum(), [f, a])
    assert [g.shape for g in gradients] == [f.shape, a.shape]


@both_pools
def test_does_not_read_uninitialized_memory(target, pool):
    def run():
        leaves = [x.float().to(target.device).requires_grad_() for x in inputs_of()]
        out = target.call(mk.bilinear_attention_pool, *leaves, pool=pool)
        return [out.detach(), *torch.autograd.grad(out.sum(), leaves)]

    clean = run()
    with poisoned_memory():
        poisoned = run()
    for a, b in zip(clean, poisoned, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@examples(12)
@given(
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(1, 4),
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.sampled_from(["avg", "max"]),
)
def test_any_shapes(target, batch, channels, maps, size, attention_size, pool):
    f = random(batch, channels, *size, seed=3)
    a = attention_maps(batch, maps, *attention_size, seed=4, dtype=torch.float64)
    found = target.call(
        mk.bilinear_attention_pool,
        f.float().to(target.device),
        a.float().to(target.device),
        pool=pool,
    )
    assert_agrees(
        found,
        oracles.bilinear_attention_pool(f.float().double(), a.float().double(), pool=pool),
    )


@examples(8)
@given(st.permutations(range(4)), st.sampled_from(["avg", "max"]))
def test_images_do_not_see_each_other(target, order, pool):
    f = random(4, 3, 5, 5, dtype=torch.float32).to(target.device)
    a = attention_maps(4, 2, 3, 3).to(target.device)
    out = target.call(mk.bilinear_attention_pool, f, a, pool=pool)
    shuffled = target.call(mk.bilinear_attention_pool, f[order], a[order], pool=pool)
    torch.testing.assert_close(shuffled, out[order], rtol=1e-6, atol=1e-7)


@examples(8)
@given(st.floats(0.125, 8.0))
def test_normalized_pooling_ignores_brightness(target, factor):
    f, a = (x.to(target.device) for x in inputs_of())
    found = target.call(mk.bilinear_attention_pool, factor * f, a)
    torch.testing.assert_close(
        found, target.call(mk.bilinear_attention_pool, f, a), rtol=1e-6, atol=1e-7
    )


def test_module_is_the_function():
    f, a = (x.float() for x in inputs_of())
    options = {"pool": "max", "signed_sqrt": False, "normalize": True, "scale": 7.0}
    module = mk.BilinearAttentionPool(**options)
    assert isinstance(module, torch.nn.Module)
    assert not list(module.parameters())
    assert not module.state_dict()
    assert identical(module(f, a), mk.bilinear_attention_pool(f, a, **options))
    assert identical(mk.BilinearAttentionPool()(f, a), mk.bilinear_attention_pool(f, a))


F4, A4 = torch.zeros(2, 5, 4, 4), torch.zeros(2, 3, 4, 4)
ERRORS: dict[str, tuple[dict[str, Any], type[Exception], str, str]] = {
    "features not a tensor": ({"features": [1.0]}, TypeError, "features", "list"),
    "features integers": ({"features": F4.int()}, TypeError, "features", "int32"),
    "features dimensions": ({"features": F4[0]}, ValueError, "features", r"\(5, 4, 4\)"),
    "features empty": ({"features": F4[..., :0]}, ValueError, "features", r"\(2, 5, 4, 0\)"),
    "attention not a tensor": ({"attention": None}, TypeError, "attention", "NoneType"),
    "attention integers": ({"attention": A4.bool()}, TypeError, "attention", "bool"),
    "attention dimensions": ({"attention": A4[0]}, ValueError, "attention", r"\(3, 4, 4\)"),
    "attention batch": ({"attention": A4[:1]}, ValueError, "attention", r"\(1, 3, 4, 4\)"),
    "attention device": ({"attention": A4.to("meta")}, ValueError, "attention", "meta"),
    "attention empty": ({"attention": A4[:, :, :0]}, ValueError, "attention", r"\(2, 3, 0, 4\)"),
    "pool": ({"pool": "sum"}, ValueError, "pool", "sum"),
    "scale": ({"scale": "large"}, TypeError, "scale", "str"),
    "eps": ({"eps": "small"}, TypeError, "eps", "str"),
    "eps negative": ({"eps": -1.0}, ValueError, "eps", "-1"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    changes, kind, argument, came = ERRORS[name]
    with pytest.raises(kind, match=came) as caught:
        mk.bilinear_attention_pool(**({"features": F4, "attention": A4} | changes))
    assert "bilinear_attention_pool" in str(caught.value)
    assert argument in str(caught.value)
