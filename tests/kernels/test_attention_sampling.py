"""sample_attention."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import magsd_kernels as mk

from . import oracles
from .support import (
    all_dtypes,
    all_layouts,
    attention_maps,
    examples,
    launches,
    make_strided,
    poisoned_memory,
    uniform,
)


def sample(target, attention, uniforms, **options):
    out = target.call(
        mk.sample_attention, attention.to(target.device), uniforms.to(target.device), **options
    )
    assert out.dtype == torch.int64
    assert out.shape == uniforms.shape
    assert out.device.type == target.device
    assert not out.requires_grad
    return out.cpu().tolist()


def constant_maps(*values: float, size: int = 1) -> torch.Tensor:
    """One image whose maps sum to the given values."""
    maps = torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1)
    return maps.expand(1, len(values), size, size).clone() / size**2


@all_dtypes
@pytest.mark.parametrize(("maps", "draws"), [(1, 1), (3, 3), (32, 3), (33, 7), (5, 1)])
def test_indices(target, dtype, maps, draws):
    attention = attention_maps(4, maps, 7, 5, seed=1, dtype=dtype)
    uniforms = uniform(4, draws, seed=2)
    wanted = oracles.sample_attention(attention, uniforms)
    assert sample(target, attention, uniforms) == wanted


@all_layouts
def test_any_strides(target, layout):
    attention = attention_maps(3, 6, 4, 5, seed=3)
    uniforms = uniform(3, 4, seed=4)
    found = sample(
        target,
        make_strided(attention.to(target.device), layout),
        make_strided(uniforms.to(target.device), layout),
    )
    assert found == oracles.sample_attention(attention, uniforms)


@pytest.mark.parametrize("maps", [2, 5, 32])
def test_frequencies_are_square_roots_of_sums(target, maps):
    """Evenly spaced uniforms count the probabilities themselves."""
    attention = attention_maps(2, maps, 3, 4, seed=5)
    draws = 4000
    spaced = ((torch.arange(draws) + 0.5) / draws).expand(2, draws)
    found = sample(target, attention, spaced)
    wanted = oracles.sampling_probabilities(attention)
    for row, probabilities in zip(found, wanted, strict=True):
        counts = np.bincount(row, minlength=maps)
        assert np.abs(counts - draws * probabilities).max() <= 2


def test_a_boundary_belongs_to_the_next_map(target):
    """The index is the number of c[m] <= u: four equal maps, boundaries exact in float32."""
    below = float(np.nextafter(np.float32(0.25), np.float32(0)))
    uniforms = torch.tensor([[0.0, below, 0.25, 0.5, 0.75, 1 - 2**-24]])
    assert sample(target, constant_maps(1, 1, 1, 1), uniforms) == [[0, 0, 1, 2, 3, 3]]


def test_index_is_at_most_the_last_map(target):
    """A uniform of exactly 1 stands outside [0, 1); it must not give an index outside the maps."""
    assert sample(target, constant_maps(1, 3, 2), torch.tensor([[1.0, 1 - 2**-24]])) == [[2, 2]]


@all_dtypes
def test_all_zero_maps_are_drawn_evenly(target, dtype):
    attention = torch.zeros(1, 4, 3, 3, dtype=dtype)
    uniforms = torch.tensor([[0.1, 0.3, 0.6, 0.9]])
    assert sample(target, attention, uniforms) == [[0, 1, 2, 3]]


@pytest.mark.parametrize("bad", [float("nan"), -1.0, -float("inf")])
def test_negative_and_nan_sums_count_as_zero(target, bad):
    """The bad map has weight sqrt(1e-12), like a map that sums to zero."""
    attention = constant_maps(1.0, 0.0, 1.0, 0.0, size=2)
    wanted = attention.clone()
    attention[0, 1, 1, 0] = bad * 5
    attention[0, 3, 0, 1] = bad * 5
    uniforms = torch.tensor([[0.0, 0.2, 0.4999, 0.5001, 0.7, 0.99999]])
    found = sample(target, attention, uniforms)
    assert found == sample(target, wanted, uniforms) == [[0, 0, 0, 2, 2, 2]]


def test_only_the_sum_counts_not_single_negative_pixels(target):
    attention = torch.zeros(1, 2, 1, 2)
    attention[0, 0], attention[0, 1] = torch.tensor([[5.0, -4.0]]), torch.tensor([[1.0, 0.0]])
    assert sample(target, attention, torch.tensor([[0.49, 0.51]])) == [[0, 1]]


def test_all_bad_maps_are_drawn_evenly(target):
    attention = torch.full((1, 4, 2, 2), float("nan"))
    attention[0, :2] = -3.0
    assert sample(target, attention, torch.tensor([[0.1, 0.3, 0.6, 0.9]])) == [[0, 1, 2, 3]]


def test_eps(target):
    """A large eps makes the draw even."""
    attention = constant_maps(0.0, 100.0)
    uniforms = torch.tensor([[0.3]])
    assert sample(target, attention, uniforms) == [[1]]
    assert sample(target, attention, uniforms, eps=1e6) == [[0]]


def test_half_precision_sums_in_float32(target):
    """A map whose float16 sum would overflow is drawn like any other."""
    attention = torch.full((1, 2, 64, 64), 30.0, dtype=torch.float16)
    assert sample(target, attention, torch.tensor([[0.499, 0.501]])) == [[0, 1]]


def test_no_gradient(target):
    attention = attention_maps(2, 3, 4, 4).to(target.device).requires_grad_()
    out = target.call(mk.sample_attention, attention, uniform(2, 2).to(target.device))
    assert not out.requires_grad
    assert out.grad_fn is None


@pytest.mark.parametrize(("batch", "draws"), [(0, 3), (1, 3), (2, 0), (0, 0)])
def test_empty(target, batch, draws):
    found = sample(target, attention_maps(batch, 3, 4, 4), uniform(batch, draws))
    assert len(found) == batch


def test_many_maps(target):
    """More than a CUDA block keeps the weights of in shared memory."""
    attention, uniforms = attention_maps(2, 700, 3, 2, seed=10), uniform(2, 50, seed=11)
    assert sample(target, attention, uniforms) == oracles.sample_attention(attention, uniforms)


@all_layouts
def test_one_launch(target, layout):
    attention = make_strided(attention_maps(3, 5, 4, 4).to(target.device), layout)
    uniforms = uniform(3, 4).to(target.device)
    assert launches(target, lambda: target.call(mk.sample_attention, attention, uniforms)) == 1


def test_does_not_read_uninitialized_memory(target):
    attention, uniforms = attention_maps(3, 5, 4, 4, seed=6), uniform(3, 4, seed=7)
    with poisoned_memory():
        found = sample(target, attention, uniforms)
    assert found == oracles.sample_attention(attention, uniforms)


@examples(15)
@given(
    st.lists(st.floats(0, 1000, width=32), min_size=1, max_size=9),
    st.lists(st.floats(0, 1, exclude_max=True, width=32), min_size=1, max_size=5),
)
def test_index_grows_with_the_uniform(target, sums, uniforms):
    row = torch.tensor([sorted(uniforms)])
    (found,) = sample(target, constant_maps(*sums), row)
    assert found == sorted(found)
    assert 0 <= found[0] <= found[-1] < len(sums)


@examples(8)
@given(st.permutations(range(5)))
def test_images_do_not_see_each_other(target, order):
    attention, uniforms = attention_maps(5, 4, 3, 3, seed=8), uniform(5, 3, seed=9)
    found = sample(target, attention, uniforms)
    assert sample(target, attention[order], uniforms[order]) == [found[i] for i in order]


A4, U2 = torch.ones(2, 3, 4, 4), torch.zeros(2, 3)
ERRORS: dict[str, tuple[dict[str, Any], type[Exception], str, str]] = {
    "attention not a tensor": ({"attention": [1]}, TypeError, "attention", "list"),
    "attention integers": ({"attention": A4.long()}, TypeError, "attention", "int64"),
    "attention dimensions": ({"attention": A4[0]}, ValueError, "attention", r"\(3, 4, 4\)"),
    "no maps": ({"attention": A4[:, :0]}, ValueError, "attention", r"\(2, 0, 4, 4\)"),
    "uniforms not a tensor": ({"uniforms": 0.5}, TypeError, "uniforms", "float"),
    "uniforms double": ({"uniforms": U2.double()}, TypeError, "uniforms", "float64"),
    "uniforms half": ({"uniforms": U2.half()}, TypeError, "uniforms", "float16"),
    "uniforms integers": ({"uniforms": U2.int()}, TypeError, "uniforms", "int32"),
    "uniforms dimensions": ({"uniforms": U2[0]}, ValueError, "uniforms", r"\(3,\)"),
    "uniforms batch": ({"uniforms": U2[:1]}, ValueError, "uniforms", r"\(1, 3\)"),
    "uniforms device": ({"uniforms": U2.to("meta")}, ValueError, "uniforms", "meta"),
    "eps": ({"eps": "small"}, TypeError, "eps", "str"),
    "eps negative": ({"eps": -1.0}, ValueError, "eps", "-1"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    changes, kind, argument, came = ERRORS[name]
    with pytest.raises(kind, match=came) as caught:
        mk.sample_attention(**({"attention": A4, "uniforms": U2} | changes))
    assert "sample_attention" in str(caught.value)
    assert argument in str(caught.value)
