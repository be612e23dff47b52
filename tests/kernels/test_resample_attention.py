"""resample_attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import magsd_kernels as mk

from . import oracles
from .support import (
    all_dtypes,
    all_layouts,
    assert_agrees,
    assert_matches_oracle,
    examples,
    gradcheck,
    random,
)

MODES = [("area", False), ("bilinear", False), ("bilinear", True), ("nearest", False)]
all_modes = pytest.mark.parametrize(("mode", "align_corners"), MODES)
INCEPTION = ((25, 25), (12, 12), (5, 5))


def maps_of(*sizes: tuple[int, int], batch: int = 2, channels: int = 3) -> list[Tensor]:
    return [random(batch, channels, *size, seed=i) for i, size in enumerate(sizes)]


@all_dtypes
@all_modes
def test_resample_forward_and_gradients(target, dtype, mode, align_corners):
    assert_matches_oracle(
        lambda *maps: target.call(
            mk.resample_attention, maps, mode=mode, align_corners=align_corners
        ),
        lambda *maps: oracles.resample_attention(maps, None, mode, align_corners),
        maps_of((9, 7), (8, 8), (4, 3)),
        target,
        dtype,
    )


@all_layouts
@all_modes
def test_resample_takes_any_strides(target, layout, mode, align_corners):
    assert_matches_oracle(
        lambda *maps: target.call(
            mk.resample_attention, maps, mode=mode, align_corners=align_corners
        ),
        lambda *maps: oracles.resample_attention(maps, None, mode, align_corners),
        maps_of((8, 6), (4, 3)),
        target,
        torch.float32,
        layout,
    )


@all_modes
@pytest.mark.parametrize("size", [(5, 5), (12, 12), (25, 25), (7, 3), (1, 1), (30, 26)])
def test_resample_inception_sizes_to_any_size(target, mode, align_corners, size):
    assert_matches_oracle(
        lambda *maps: target.call(
            mk.resample_attention, maps, size, mode=mode, align_corners=align_corners
        ),
        lambda *maps: oracles.resample_attention(maps, size, mode, align_corners),
        maps_of(*INCEPTION, batch=1, channels=2),
        target,
        torch.float32,
    )


@pytest.mark.parametrize("count", [2, 8])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@all_modes
def test_resample_to_long_rows_and_columns(target, mode, align_corners, layout, count):
    """More rows and columns of outputs than a kernel may keep what they weigh of."""
    sizes = [(2 + i, 300 - 40 * i) for i in range(count)]
    assert_matches_oracle(
        lambda *maps: target.call(
            mk.resample_attention, maps, (4, 600), mode=mode, align_corners=align_corners
        ),
        lambda *maps: oracles.resample_attention(maps, (4, 600), mode, align_corners),
        maps_of(*sizes, batch=3, channels=2),
        target,
        torch.float64,
        layout,
    )


@pytest.mark.parametrize("mode", ["area", "bilinear", "nearest"])
def test_resample_is_interpolate_of_one_map(target, mode):
    x = random(2, 3, 11, 10, dtype=torch.float32).to(target.device)
    found = target.call(mk.resample_attention, [x], (4, 7), mode=mode)
    torch.testing.assert_close(found, F.interpolate(x, (4, 7), mode=mode), rtol=1e-5, atol=1e-6)


def test_resample_of_a_whole_ratio_is_average_pooling(target):
    x = random(2, 3, 28, 28, dtype=torch.float32).to(target.device)
    found = target.call(mk.resample_attention, [x], (7, 7))
    torch.testing.assert_close(found, F.avg_pool2d(x, 4), rtol=1e-5, atol=1e-6)


def test_resample_size_defaults_to_the_last_map(target):
    maps = [x.to(target.device) for x in maps_of((3, 2), (9, 7))]
    assert target.call(mk.resample_attention, maps).shape == (2, 3, 9, 7)


@pytest.mark.parametrize("count", [1, 2, 8])
def test_resample_takes_one_to_eight_maps(target, count):
    assert_matches_oracle(
        lambda *maps: target.call(mk.resample_attention, maps),
        lambda *maps: oracles.resample_attention(maps),
        maps_of(*[(12 - i, 11 - i) for i in range(count)]),
        target,
        torch.float32,
    )


def test_resample_single_pixel_maps(target):
    for mode, align_corners in MODES:
        assert_matches_oracle(
            lambda *maps, m=mode, a=align_corners: target.call(
                mk.resample_attention, maps, (3, 2), mode=m, align_corners=a
            ),
            lambda *maps, m=mode, a=align_corners: oracles.resample_attention(maps, (3, 2), m, a),
            maps_of((1, 1), (1, 4), (5, 1)),
            target,
            torch.float32,
        )


def test_resample_one_rounding_for_the_sum_of_maps(target):
    """Entries that cancel between scales: rounding each scale on its own would show."""
    x = 100 * random(1, 2, 6, 6)
    maps = [x, -x + 0.01 * random(1, 2, 6, 6, seed=5)]
    assert_matches_oracle(
        lambda *maps: target.call(mk.resample_attention, maps, (3, 3)),
        lambda *maps: oracles.resample_attention(maps, (3, 3)),
        maps,
        target,
        torch.float16,
    )


@pytest.mark.parametrize("mode", ["area", "bilinear", "nearest"])
def test_resample_gradcheck(target, mode):
    maps = [x.to(target.device).requires_grad_() for x in maps_of((5, 4), (3, 2), channels=2)]
    assert gradcheck(
        target, lambda *maps: target.call(mk.resample_attention, maps, mode=mode), maps
    )


@examples(15)
@given(
    st.sampled_from(MODES),
    st.lists(st.tuples(st.integers(1, 13), st.integers(1, 13)), min_size=1, max_size=3),
    st.tuples(st.integers(1, 13), st.integers(1, 13)),
)
def test_resample_any_sizes(target, mode, sizes, size):
    name, align_corners = mode
    maps = maps_of(*sizes, batch=1, channels=2)
    found = target.call(
        mk.resample_attention,
        [x.float().to(target.device) for x in maps],
        size,
        mode=name,
        align_corners=align_corners,
    )
    assert_agrees(found, oracles.resample_attention(maps, size, name, align_corners))


@examples(10)
@given(st.floats(-4, 4, width=32), st.sampled_from(MODES))
def test_resample_keeps_constants(target, value, mode):
    """The weights of every output pixel sum to one."""
    maps = [torch.full((1, 2, n, n), value, device=target.device) for n in (9, 5)]
    found = target.call(mk.resample_attention, maps, (4, 7), mode=mode[0], align_corners=mode[1])
    torch.testing.assert_close(found, torch.full_like(found, 2 * value))


def resample_arguments(**changes: Any) -> dict[str, Any]:
    maps = [torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 2, 2)]
    return {"maps": maps, **changes}


X = torch.zeros(2, 3, 4, 4)
RESAMPLE_ERRORS = {
    "not a sequence": ({"maps": X}, TypeError, "maps", "Tensor"),
    "entry not a tensor": ({"maps": [X, "map"]}, TypeError, "maps", "str"),
    "integers": ({"maps": [X.int()]}, TypeError, "maps", "int32"),
    "complex": ({"maps": [X.to(torch.complex64)]}, TypeError, "maps", "complex64"),
    "mixed dtypes": ({"maps": [X, X.double()]}, TypeError, "maps", "float"),
    "no maps": ({"maps": []}, ValueError, "maps", "0"),
    "nine maps": ({"maps": [X] * 9}, ValueError, "maps", "9"),
    "three dimensions": ({"maps": [X[0]]}, ValueError, "maps", r"\(3, 4, 4\)"),
    "other batch": ({"maps": [X, X[:1]]}, ValueError, "maps", r"\(1, 3, 4, 4\)"),
    "other channels": ({"maps": [X, X[:, :2]]}, ValueError, "maps", r"\(2, 2, 4, 4\)"),
    "other device": ({"maps": [X, X.to("meta")]}, ValueError, "maps", "meta"),
    "empty map": ({"maps": [X[..., :0]]}, ValueError, "maps", r"\(2, 3, 4, 0\)"),
    "size zero": ({"size": (0, 4)}, ValueError, "size", r"\(0, 4\)"),
    "size of three": ({"size": (1, 2, 3)}, ValueError, "size", r"\(1, 2, 3\)"),
    "size of floats": ({"size": (1.5, 2.0)}, TypeError, "size", "1.5"),
    "size not a pair": ({"size": "big"}, TypeError, "size", "str"),
    "mode": ({"mode": "bicubic"}, ValueError, "mode", "bicubic"),
}


@pytest.mark.parametrize("name", RESAMPLE_ERRORS)
def test_resample_errors(name):
    changes, kind, argument, came = RESAMPLE_ERRORS[name]
    with pytest.raises(kind, match=came) as caught:
        mk.resample_attention(**resample_arguments(**changes))
    assert "resample_attention" in str(caught.value)
    assert argument in str(caught.value)
