"""attention_boxes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from . import oracles
from .support import (
    all_dtypes,
    all_layouts,
    all_sizes,
    attention_maps,
    both_corners,
    boxes,
    examples,
    guide,
    make_strided,
)


@all_dtypes
@both_corners
@all_sizes
def test_boxes(target, dtype, align_corners, size, low):
    g = guide(low=low, seed=3)
    g["attention"] = g["attention"].to(dtype)
    wanted = oracles.attention_boxes(**g, size=size, align_corners=align_corners)
    found = boxes(target, **g, size=size, align_corners=align_corners)
    assert found == [list(box) for box in wanted]


@pytest.mark.parametrize("padding", [0.0, 0.05, 0.1, 0.37, 1.0, 3.0])
def test_boxes_padding(target, padding):
    g = guide(batch=6, seed=11)
    wanted = oracles.attention_boxes(**g, size=(30, 41), padding=padding)
    assert boxes(target, **g, size=(30, 41), padding=padding) == [list(box) for box in wanted]


def test_boxes_default_padding(target):
    g = guide(batch=6, seed=11)
    assert boxes(target, **g, size=(30, 41)) == boxes(target, **g, size=(30, 41), padding=0.1)


@pytest.mark.parametrize("height", [1, 3, 50, 100, 180, 224])
@pytest.mark.parametrize("padding", [0.07, 0.1, 0.3, 0.7])
def test_box_arithmetic_is_in_double_precision(target, height, padding):
    """One hot pixel on every row, at sizes where float32 would truncate to another pixel."""
    attention = torch.zeros(height, 1, height, 2)
    attention[torch.arange(height), 0, torch.arange(height), 1] = 1.0
    found = boxes(target, attention, 0.5, (height, 2), padding=padding)
    masks = attention[:, 0].numpy() > 0
    assert found == [list(oracles.box_of(mask, padding)) for mask in masks]


def test_box_arithmetic_of_columns(target):
    """16 - 0.3 * 50 is 1 in double precision and 0.9999995 in float32, where 0.3 is too large."""
    attention = torch.zeros(50, 1, 2, 50)
    attention[torch.arange(50), 0, 0, torch.arange(50)] = 1.0
    masks = attention[:, 0].numpy() > 0
    found = boxes(target, attention, 0.5, (2, 50), padding=0.3)
    assert found == [list(oracles.box_of(mask, 0.3)) for mask in masks]
    assert found[16][1] == 1


def test_published_box_by_hand(target):
    """Pixels 4..9 of 20 pass; padding 0.1 is 2 pixels: rows 2 to 11, exclusive."""
    attention = torch.zeros(1, 1, 20, 20)
    attention[0, 0, 4:10, 6:8] = 1.0
    assert boxes(target, attention, 0.5, (20, 20), padding=0.1) == [[2, 4, 11, 9]]


def test_threshold_takes_the_low_resolution_maximum(target):
    """U of this map at two columns is 0.5 and 0, while its own maximum is 1.

    Theta 0.4 passes the first column, 0.6 none: the whole image. Relative to the maximum of U,
    0.6 would pass the first column.
    """
    attention = torch.tensor([[[[0.0, 1.0, 0.0, 0.0]]]])
    assert boxes(target, attention, 0.4, (1, 2), padding=0.0) == [[0, 0, 1, 1]]
    assert boxes(target, attention, 0.6, (1, 2), padding=0.0) == [[0, 0, 1, 2]]


def test_a_pixel_at_the_threshold_passes(target):
    attention = torch.tensor([[[[0.0, 0.5, 0.0, 1.0, 0.25, 0.0]]]])
    assert boxes(target, attention, 0.5, (1, 6), padding=0.0) == [[0, 1, 1, 3]]


@all_dtypes
@pytest.mark.parametrize(
    "fill", [0.0, 1.0, 0.3, -1.0, float("nan")], ids=["zero", "one", "third", "negative", "nan"]
)
@both_corners
def test_constant_maps_give_the_whole_image(target, dtype, fill, align_corners):
    """Zero and positive constants pass everywhere, negative ones and NaN nowhere."""
    attention = torch.full((2, 1, 5, 4), fill, dtype=dtype)
    # Without padding the exclusive end is the last passing pixel, by the published rule.
    passes = fill >= 0
    end = [12, 10] if passes else [13, 11]
    found = boxes(target, attention, 0.5, (13, 11), padding=0.0, align_corners=align_corners)
    assert found == [[0, 0, *end]] * 2
    found = boxes(target, attention, 0.5, (13, 11), align_corners=align_corners)
    assert found == [[0, 0, 13, 11]] * 2


def test_negative_map_gives_the_whole_image(target):
    attention = -attention_maps(3, 1, 5, 4, seed=2) - 0.1
    assert boxes(target, attention, 0.5, (13, 11), padding=0.0) == [[0, 0, 13, 11]] * 3


@pytest.mark.parametrize("count", [1, 7])
def test_nan_in_a_map_gives_the_whole_image(target, count):
    attention = attention_maps(2, 1, 5, 4, seed=2)
    attention[0].view(-1)[:count] = float("nan")
    clean = boxes(target, attention_maps(2, 1, 5, 4, seed=2), 0.5, (13, 11), padding=0.0)
    found = boxes(target, attention, 0.5, (13, 11), padding=0.0)
    assert found == [[0, 0, 13, 11], clean[1]]
    assert clean[0] != [0, 0, 13, 11]


def test_nan_theta_gives_the_whole_image(target):
    theta = torch.tensor([float("nan"), 0.5])
    found = boxes(target, attention_maps(2, 1, 5, 4, seed=2), theta, (13, 11), padding=0.0)
    assert found[0] == [0, 0, 13, 11]


def test_theta_above_one_gives_the_whole_image(target):
    found = boxes(target, attention_maps(2, 1, 5, 4, seed=2), 1.5, (13, 11), padding=0.0)
    assert found == [[0, 0, 13, 11]] * 2


def test_theta_zero_passes_rectified_maps(target):
    found = boxes(target, attention_maps(2, 1, 5, 4, seed=2), 0.0, (13, 11))
    assert found == [[0, 0, 13, 11]] * 2


def test_index_names_the_map(target):
    attention = attention_maps(4, 5, 6, 6, seed=7)
    theta = torch.full((4,), 0.4)
    index = torch.tensor([3, 0, 4, 3])
    found = boxes(target, attention, theta, (20, 20), index=index)
    single = attention[torch.arange(4), index].unsqueeze(1)
    assert found == boxes(target, single, theta, (20, 20))
    other = boxes(target, attention, theta, (20, 20), index=(index + 1) % 5)
    assert found != other


@all_layouts
def test_boxes_any_strides(target, layout):
    g = guide(seed=3)
    wanted = oracles.attention_boxes(**g, size=(25, 23))
    moved = {
        k: make_strided(v.to(target.device), layout) if isinstance(v, Tensor) else v
        for k, v in g.items()
    }
    assert boxes(target, **moved, size=(25, 23)) == [list(box) for box in wanted]


def test_boxes_empty_batch_and_single_pixel(target):
    assert boxes(target, torch.zeros(0, 1, 5, 4), torch.zeros(0), (13, 11)) == []
    assert boxes(target, torch.ones(1, 1, 1, 1), 0.5, (1, 1)) == [[0, 0, 1, 1]]


@examples(25)
@given(st.data())
def test_box_of_a_box(target, data):
    """A map that is 1 inside a box and 0 outside gives that box back.

    The published rule takes the last passing pixel as the exclusive end, hence the - 1.
    """
    height, width = data.draw(st.integers(2, 40)), data.draw(st.integers(2, 40))
    top = data.draw(st.integers(0, height - 1))
    left = data.draw(st.integers(0, width - 1))
    bottom = data.draw(st.integers(top + 1, height))
    right = data.draw(st.integers(left + 1, width))
    theta = data.draw(st.floats(0.125, 1.0, width=32))
    attention = torch.zeros(1, 1, height, width)
    attention[..., top:bottom, left:right] = 1.0
    found = boxes(target, attention, theta, (height, width), padding=0.0)
    assert found == [[top, left, max(bottom - 1, top + 1), max(right - 1, left + 1)]]


@examples(20)
@given(st.integers(0, 10**6), st.floats(0.1, 0.9), st.floats(0.0, 0.5), st.floats(0.0, 0.5))
def test_boxes_grow_with_padding_and_shrink_with_theta(target, seed, theta, less, more):
    """At full resolution the maximum always passes, so that a box is never the fallback.

    The exclusive end is the last passing pixel, so that the end of a box of one pixel, which holds
    that pixel, may be one more than that of a larger box.
    """
    attention, size = attention_maps(2, 1, 17, 19, seed=seed), (17, 19)
    inner = boxes(target, attention, theta, size, padding=min(less, more))
    outer = boxes(target, attention, theta, size, padding=max(less, more))
    lower = boxes(target, attention, theta / 2, size, padding=min(less, more))
    for a, b, c in zip(inner, outer, lower, strict=True):
        for larger in (b, c):
            assert larger[0] <= a[0]
            assert larger[1] <= a[1]
            assert larger[2] >= a[2] - (a[2] - a[0] == 1)
            assert larger[3] >= a[3] - (a[3] - a[1] == 1)


@examples(15)
@given(st.integers(0, 10**6), st.integers(-8, 8))
def test_boxes_ignore_the_brightness_of_a_map(target, seed, exponent):
    """Scaling by a power of two is exact, so no pixel may change sides."""
    attention = attention_maps(2, 1, 5, 5, seed=seed)
    found = boxes(target, attention * 2.0**exponent, 0.45, (21, 16))
    assert found == boxes(target, attention, 0.45, (21, 16))
