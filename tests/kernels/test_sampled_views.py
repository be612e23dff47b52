"""sampled_views: the draws and the views of the single operations, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import magsd_kernels as mk
from magsd_kernels.guided_views import sampled_views

from .support import (
    Target,
    all_dtypes,
    all_layouts,
    all_sizes,
    attention_maps,
    both_corners,
    gradcheck,
    identical,
    launches,
    make_strided,
    on,
    poisoned_memory,
    random,
    uniform,
)

BATCH = 4
each_count = pytest.mark.parametrize("views", [2, 3])


def given(
    views: int, maps: int = 5, low: tuple[int, int] = (5, 4), batch: int = BATCH
) -> dict[str, Tensor]:
    """Attention, uniforms, theta and, for three views, offsets."""
    arguments = {
        "attention": attention_maps(batch, maps, *low, seed=41),
        "uniforms": uniform(batch, views, seed=42),
        "theta": uniform(batch, views, seed=43, low=0.2, high=0.6),
    }
    return arguments | ({"offsets": uniform(batch, 2, seed=44)} if views == 3 else {})


def by_single_operations(
    target: Target, images: Tensor, arguments: dict[str, Any], **options: Any
) -> tuple[list[Tensor], Tensor]:
    """Views and index, by a launch for the draws and two or one for each view."""
    attention, theta = arguments["attention"], arguments["theta"].unbind(1)
    index = target.call(mk.sample_attention, attention, arguments["uniforms"])
    maps = index.unbind(1)
    boxed = {name: value for name, value in options.items() if name not in ("weight", "floor")}
    mix = boxed | {name: value for name, value in options.items() if name == "weight"}
    dim = {name: value for name, value in options.items() if name in ("floor", "align_corners")}
    views = [
        target.call(mk.attention_mixup, images, attention, theta[0], index=maps[0], **mix),
        target.call(mk.attention_dim, images, attention, theta[1], index=maps[1], **dim),
    ]
    if "offsets" in arguments:
        views += [
            target.call(
                mk.attention_patch,
                images,
                attention,
                theta[2],
                arguments["offsets"],
                index=maps[2],
                **boxed,
            )
        ]
    return views, index


def check(
    target: Target,
    arguments: dict[str, Tensor],
    dtype: torch.dtype = torch.float32,
    size: tuple[int, int] = (25, 23),
    layout: str = "contiguous",
    **options: Any,
) -> None:
    arguments["attention"] = arguments["attention"].to(dtype)
    moved = {k: make_strided(v.to(target.device), layout) for k, v in arguments.items()}
    images = random(len(moved["theta"]), 3, *size, seed=45, dtype=dtype).to(target.device)
    images = make_strided(images, layout)
    found, index = target.call(sampled_views, images, **moved, **options)
    wanted, wanted_index = by_single_operations(target, images, moved, **options)
    assert index.dtype == torch.int64
    assert torch.equal(index, wanted_index)
    assert found.shape == (len(wanted), *images.shape)
    for view, single in zip(found, wanted, strict=True):
        assert identical(view, single)
        assert view.stride() == single.stride()


@all_dtypes
@both_corners
@each_count
def test_equals_the_single_operations(target, dtype, align_corners, views):
    check(target, given(views), dtype, align_corners=align_corners)


@all_layouts
@each_count
def test_any_strides(target, layout, views):
    check(target, given(views), layout=layout)


@all_sizes
@each_count
def test_sizes(target, size, low, views):
    check(target, given(views, low=low), size=size)


@pytest.mark.parametrize("maps", [1, 2, 32, 33, 700])
def test_numbers_of_maps(target, maps):
    check(target, given(3, maps, (3, 2)))


def test_more_maps_than_shared_memory_weighs(target):
    """Their weights, 48 KB, lie in global memory."""
    check(target, given(3, 6000, (2, 1), batch=2))


def test_maps_that_shared_memory_does_not_hold(target):
    """They are read where they lie, behind the weights."""
    check(target, given(3, 3, (101, 103), batch=2))


def test_options(target):
    options = {"padding": 0.3, "weight": 0.7, "floor": 0.25}
    check(target, given(3), **options)
    check(target, given(2), **options)


@each_count
def test_crop_and_drop(target, views):
    """A weight of 1 and a floor of 0, as WS-DAN has them."""
    check(target, given(views), weight=1.0, floor=0.0, align_corners=True)


@each_count
@pytest.mark.parametrize("spoiled", ["pixel", "map", "maps", "peak", "zero"])
def test_maps_that_are_not_finite(target, views, spoiled):
    arguments = given(views)
    attention = arguments["attention"]
    if spoiled == "pixel":
        attention[:, :, 1, 2] = float("nan")
    elif spoiled == "map":
        attention[:, 2] = float("nan")
    elif spoiled == "maps":
        attention.fill_(float("nan"))
    elif spoiled == "peak":
        attention[:, 1, 0, 0] = float("inf")
    else:
        attention.zero_()
    check(target, arguments)


@pytest.mark.parametrize("batch", [0, 1])
@each_count
def test_small_batches(target, batch, views):
    check(target, given(views, batch=batch))


def test_uniforms_of_one_draw_the_last_map(target):
    arguments = given(3)
    arguments["uniforms"].fill_(1.0)
    check(target, arguments)


@both_corners
@each_count
def test_gradient_equals_that_of_the_single_operations(target, align_corners, views):
    arguments = on(target.device, given(views))
    direction = random(views, BATCH, 3, 25, 23, seed=46).to(target.device)

    def gradient(run: Any) -> Tensor:
        images = random(BATCH, 3, 25, 23, seed=45).to(target.device).requires_grad_()
        made = run(images, align_corners=align_corners)[0]
        return torch.autograd.grad(list(made), images, list(direction))[0]

    found = gradient(lambda x, **o: target.call(sampled_views, x, **arguments, **o))
    wanted = gradient(lambda x, **o: by_single_operations(target, x, arguments, **o))
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@each_count
def test_gradcheck(target, views):
    arguments = on(target.device, given(views, low=(3, 3), batch=2))
    images = random(2, 2, 6, 5).to(target.device).requires_grad_()
    assert gradcheck(target, lambda x: target.call(sampled_views, x, **arguments)[0], images)


@each_count
def test_no_gradient_but_for_the_images(target, views):
    arguments = on(target.device, given(views))
    for name in ("attention", "theta", "uniforms"):
        arguments[name].requires_grad_()
    images = random(BATCH, 3, 25, 23, dtype=torch.float32).to(target.device)
    made, index = target.call(sampled_views, images, **arguments)
    assert not made.requires_grad
    made, index = target.call(sampled_views, images.requires_grad_(), **arguments)
    assert not index.requires_grad
    inputs = [images, *(arguments[name] for name in ("attention", "theta", "uniforms"))]
    gradients = torch.autograd.grad(made.sum(), inputs, allow_unused=True)
    assert gradients[0] is not None
    assert gradients[1:] == (None, None, None)


@all_layouts
@each_count
def test_two_launches(target, layout, views):
    """One for the draws and the boxes, one for the views; uniforms are read in place."""
    arguments = on(target.device, given(views))
    arguments["uniforms"] = uniform(BATCH, 8, seed=42).to(target.device)[:, :views]
    arguments["attention"] = make_strided(arguments["attention"], layout)
    images = random(BATCH, 3, 24, 24, dtype=torch.float32).to(target.device)
    assert launches(target, lambda: target.call(sampled_views, images, **arguments)) == 2


@each_count
def test_does_not_read_uninitialized_memory(target, views):
    arguments = on(target.device, given(views))
    images = random(BATCH, 3, 25, 23, dtype=torch.float32).to(target.device)
    clean = target.call(sampled_views, images, **arguments)
    with poisoned_memory():
        poisoned = target.call(sampled_views, images, **arguments)
    assert all(identical(a, b) for a, b in zip(clean, poisoned, strict=True))


IMAGES = torch.ones(2, 3, 9, 8)
GOOD: dict[str, Any] = {"images": IMAGES, **given(3, batch=2)}
ERRORS: dict[str, tuple[dict[str, Any], type[Exception], str, str]] = {
    "images": ({"images": IMAGES[0]}, ValueError, "images", r"\(3, 9, 8\)"),
    "attention": ({"attention": GOOD["attention"].long()}, TypeError, "attention", "int64"),
    "attention batch": ({"attention": GOOD["attention"][:1]}, ValueError, "attention", "1, 5"),
    "uniforms": ({"uniforms": GOOD["uniforms"].double()}, TypeError, "uniforms", "float64"),
    "uniforms columns": ({"uniforms": torch.ones(2, 2)}, ValueError, "uniforms", r"\(2, 2\)"),
    "uniforms of a pair": ({"offsets": None}, ValueError, "uniforms", r"\(2, 3\)"),
    "theta columns": ({"theta": torch.ones(2, 4)}, ValueError, "theta", r"\(2, 4\)"),
    "theta": ({"theta": 0.5}, TypeError, "theta", "float"),
    "offsets": ({"offsets": torch.ones(2, 3)}, ValueError, "offsets", r"\(2, 3\)"),
    "offsets device": ({"offsets": torch.ones(2, 2, device="meta")}, ValueError, "offsets", "meta"),
    "padding": ({"padding": -1.0}, ValueError, "padding", "-1"),
    "weight": ({"weight": 1.5}, ValueError, "weight", "1.5"),
    "floor": ({"floor": -0.5}, ValueError, "floor", "-0.5"),
    "align_corners": ({"align_corners": 1}, TypeError, "align_corners", "int"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    changes, kind, argument, came = ERRORS[name]
    with pytest.raises(kind, match=came) as caught:
        sampled_views(**(GOOD | changes))
    assert f"sampled_views: {argument}" in str(caught.value)
