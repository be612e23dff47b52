"""Share of attention inside masks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from magsd.evaluation import attention_inside
from magsd.evaluation.localization import summarize


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31 - 1), st.integers(1, 7), st.integers(8, 40))
def test_uniform_map_has_the_share_of_the_area(seed, low, high):
    masks = torch.rand(3, high, high + 3, generator=torch.manual_seed(seed)) > 0.6
    inside, uniform = attention_inside(torch.full((3, 1, low, low + 1), 2.5), masks)
    torch.testing.assert_close(inside, uniform)
    torch.testing.assert_close(uniform, masks.float().mean(dim=(1, 2)))


def test_scale_of_the_map_does_not_matter():
    saliency = torch.rand(2, 1, 7, 7)
    masks = torch.rand(2, 50, 50) > 0.5
    torch.testing.assert_close(
        attention_inside(saliency, masks)[0], attention_inside(1e4 * saliency, masks)[0]
    )


def test_map_of_the_masks_size_is_counted_as_it_is():
    saliency = torch.tensor([[[[1.0, 3.0], [0.0, 4.0]]]])
    masks = torch.tensor([[[0, 255], [255, 0]]], dtype=torch.uint8)
    inside, uniform = attention_inside(saliency, masks)
    assert inside.item() == pytest.approx(3 / 8)
    assert uniform.item() == pytest.approx(0.5)


def test_attention_on_one_half():
    saliency = torch.tensor([[[[1.0, 0.0]]]])
    left = torch.zeros(1, 4, 8, dtype=torch.uint8)
    left[..., :4] = 1
    # Bilinear weights of the left pixel at the eight columns: 1, 1, 7/8, 5/8 | 3/8, 1/8, 0, 0.
    assert attention_inside(saliency, left)[0].item() == pytest.approx(3.5 / 4)
    assert attention_inside(saliency, 1 - left)[0].item() == pytest.approx(0.5 / 4)


def test_empty_map_is_undefined():
    inside, uniform = attention_inside(torch.zeros(1, 1, 3, 3), torch.ones(1, 6, 6))
    assert math.isnan(inside.item())
    assert uniform.item() == 1


def test_summary_leaves_undefined_images_out():
    localization = summarize(
        np.array([0.5, np.nan, 0.1, 0.3, np.nan]),
        np.array([0.2, 0.4, 0.0, 0.1, 0.5]),
        np.array([0, 0, 1, 1, 2]),
        ("a", "b", "c", "d"),
    )
    assert set(localization.per_class) == {"a", "b", "c"}
    first = localization.per_class["a"]
    assert (first.images, first.left_out, first.inside, first.uniform) == (1, 1, 0.5, 0.2)
    assert first.gain == pytest.approx(2.5)
    assert math.isnan(localization.per_class["c"].inside)
    assert math.isnan(localization.per_class["c"].gain)
    assert localization.overall.images == 2
    assert localization.overall.inside == pytest.approx(0.4)
    assert localization.overall.left_out == 3


def test_refusals():
    with pytest.raises(ValueError, match="saliency"):
        attention_inside(torch.ones(2, 3, 7, 7), torch.ones(2, 9, 9))
    with pytest.raises(ValueError, match="masks"):
        attention_inside(torch.ones(2, 1, 7, 7), torch.ones(3, 9, 9))
