"""Crop, mix-up, patch, dim and drop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import magsd_kernels as mk

from . import oracles
from .support import (
    Target,
    all_dtypes,
    all_layouts,
    all_sizes,
    assert_matches_oracle,
    attention_maps,
    both_corners,
    boxes,
    dtype_id,
    examples,
    gradcheck,
    guide,
    make_strided,
    on,
    poisoned_memory,
    random,
    uniform,
)


def view_table() -> dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], dict[str, Any]]]:
    offsets = {"offsets": uniform(4, 2, seed=21)}
    return {
        "crop": (mk.attention_crop, oracles.attention_crop, {}),
        "mixup": (mk.attention_mixup, oracles.attention_mixup, {}),
        "patch": (mk.attention_patch, oracles.attention_patch, offsets),
        "dim": (mk.attention_dim, oracles.attention_dim, {}),
        "drop": (mk.attention_drop, oracles.attention_drop, {}),
    }


VIEWS = view_table()
all_views = pytest.mark.parametrize("view", VIEWS)


def check_view(
    target: Target,
    view: str,
    dtype: torch.dtype,
    *,
    size: tuple[int, int] = (25, 23),
    low: tuple[int, int] = (5, 4),
    channels: int = 3,
    maps: int = 3,
    layout: str = "contiguous",
    attention_dtype: torch.dtype | None = None,
    seed: int = 3,
    **options: Any,
) -> Tensor:
    function, oracle, extra = VIEWS[view]
    options = guide(maps=maps, low=low, seed=seed) | extra | options
    options["attention"] = options["attention"].to(attention_dtype or dtype)
    moved = {
        k: make_strided(v.to(target.device), layout) if isinstance(v, Tensor) else v
        for k, v in options.items()
    }
    return assert_matches_oracle(
        lambda images: target.call(function, images, **moved),
        lambda images: oracle(images, **options),
        [random(4, channels, *size, seed=17)],
        target,
        dtype,
        layout,
    )


@all_dtypes
@all_views
@both_corners
def test_view_forward_and_gradient(target, view, dtype, align_corners):
    check_view(target, view, dtype, align_corners=align_corners)


@all_views
@all_sizes
@both_corners
def test_view_sizes(target, view, size, low, align_corners):
    check_view(target, view, torch.float32, size=size, low=low, align_corners=align_corners)


@all_views
@pytest.mark.parametrize("channels", [1, 2, 5, 33])
def test_view_channels(target, view, channels):
    check_view(target, view, torch.float32, channels=channels)


@all_views
def test_view_single_map_without_index(target, view):
    check_view(target, view, torch.float32, maps=1)


@all_views
@all_layouts
def test_view_takes_any_strides(target, view, layout):
    check_view(target, view, torch.float32, layout=layout)


@all_views
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
def test_view_keeps_the_memory_format(target, view, dtype):
    out = check_view(target, view, dtype, layout="contiguous")
    assert out.is_contiguous()
    out = check_view(target, view, dtype, layout="channels_last")
    assert out.is_contiguous(memory_format=torch.channels_last)


@all_views
def test_view_of_float32_images_by_half_precision_attention(target, view):
    """What autocast gives: the images are not rounded to the attention's dtype."""
    check_view(target, view, torch.float32, attention_dtype=torch.bfloat16)


@all_views
@pytest.mark.parametrize("padding", [0.0, 0.05, 0.4])
def test_view_padding(target, view, padding):
    if view in ("dim", "drop"):
        pytest.skip("has no box")
    check_view(target, view, torch.float32, padding=padding)


@pytest.mark.parametrize("weight", [0.0, 0.25, 1.0])
def test_mixup_weight(target, weight):
    out = check_view(target, "mixup", torch.float32, weight=weight)
    images = random(4, 3, 25, 23, seed=17).float().to(target.device)
    assert torch.equal(out, images) == (weight == 0)


def test_mixup_default_is_published(target):
    """0.6 image + 0.4 crop."""
    images = random(4, 3, 25, 23).to(target.device)
    g = on(target.device, guide(seed=3))
    crop = target.call(mk.attention_crop, images, **g)
    found = target.call(mk.attention_mixup, images, **g)
    torch.testing.assert_close(found, 0.6 * images + 0.4 * crop, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("floor", [0.0, 0.5])
def test_dim_floor(target, floor):
    check_view(target, "dim", torch.float32, floor=floor)


def test_dim_default_is_published(target):
    """Pixels keep 1.001 or 0.001 of their value."""
    images = torch.ones(4, 1, 25, 23, dtype=torch.float64, device=target.device)
    found = target.call(mk.attention_dim, images, **on(target.device, guide(seed=3)))
    levels = found.unique().cpu()
    torch.testing.assert_close(levels, torch.tensor([0.001, 1.001], dtype=torch.float64))


def test_drop_is_dim_without_a_floor(target):
    images = random(4, 3, 25, 23, dtype=torch.float32).to(target.device)
    g = on(target.device, guide(seed=3))
    dropped = target.call(mk.attention_drop, images, **g)
    assert torch.equal(dropped, target.call(mk.attention_dim, images, floor=0.0, **g))
    assert ((dropped == 0) | (dropped == images)).all()
    assert (dropped == 0).any()
    assert (dropped == images).any()


def test_crop_is_interpolate_of_the_sliced_box(target):
    images = random(4, 3, 25, 23, dtype=torch.float32).to(target.device)
    g = on(target.device, guide(seed=3))
    for align_corners in (False, True):
        found = target.call(mk.attention_crop, images, **g, align_corners=align_corners)
        for image, row, (top, left, bottom, right) in zip(
            images,
            found,
            boxes(target, **g, size=(25, 23), align_corners=align_corners),
            strict=True,
        ):
            wanted = F.interpolate(
                image[None, :, top:bottom, left:right],
                (25, 23),
                mode="bilinear",
                align_corners=align_corners,
            )
            torch.testing.assert_close(row, wanted[0], rtol=1e-5, atol=1e-5)


@both_corners
def test_crop_of_the_whole_image_is_the_image(target, align_corners):
    images = random(2, 3, 25, 23, dtype=torch.float32).to(target.device)
    attention = torch.ones(2, 1, 5, 4, device=target.device)
    theta = torch.full((2,), 0.5, device=target.device)
    found = target.call(mk.attention_crop, images, attention, theta, align_corners=align_corners)
    torch.testing.assert_close(found, images, rtol=1e-5, atol=1e-5)


@both_corners
def test_crop_of_one_pixel_fills_the_image(target, align_corners):
    images = random(1, 3, 9, 8, dtype=torch.float32).to(target.device)
    attention = torch.zeros(1, 1, 9, 8, device=target.device)
    attention[0, 0, 6, 2] = 1.0
    theta = torch.full((1,), 0.5, device=target.device)
    found = target.call(
        mk.attention_crop, images, attention, theta, padding=0.0, align_corners=align_corners
    )
    assert torch.equal(found, images[:, :, 6:7, 2:3].expand(1, 3, 9, 8))


@all_views
@pytest.mark.parametrize(
    "fill", [0.0, 2.0, -1.0, float("nan")], ids=["zero", "constant", "negative", "nan"]
)
def test_view_of_constant_attention(target, view, fill):
    attention = torch.full((4, 1, 5, 4), fill)
    function, oracle, extra = VIEWS[view]
    images = random(4, 3, 25, 23, dtype=torch.float32)
    theta = torch.full((4,), 0.5)
    found = target.call(
        function,
        images.to(target.device),
        attention.to(target.device),
        theta.to(target.device),
        **on(target.device, extra),
    )
    wanted = oracle(images.double(), attention, theta, **extra)
    torch.testing.assert_close(found.cpu().double(), wanted, rtol=1e-5, atol=1e-5)
    assert torch.isfinite(found).all()


@all_views
def test_view_with_one_nan_in_the_map(target, view):
    """No comparison holds: the box is the whole image and [U < t] is 0 everywhere."""
    function, oracle, extra = VIEWS[view]
    attention = attention_maps(4, 1, 5, 4, seed=3)
    attention[:, :, 2, 1] = float("nan")
    images, theta = random(4, 3, 25, 23, dtype=torch.float32), torch.full((4,), 0.4)
    found = target.call(
        function,
        images.to(target.device),
        attention.to(target.device),
        theta.to(target.device),
        **on(target.device, extra),
    )
    whole = torch.full((4, 1, 5, 4), float("nan"))
    wanted = oracle(images.double(), whole, theta, **extra)
    torch.testing.assert_close(found.cpu().double(), wanted, rtol=1e-5, atol=1e-5)


def test_one_nan_map_leaves_the_other_images_alone(target):
    g = guide(seed=3)
    images = random(4, 3, 25, 23, dtype=torch.float32).to(target.device)
    broken = {**g, "attention": g["attention"].clone()}
    broken["attention"][1] = float("nan")
    for function, _, extra in VIEWS.values():
        clean = target.call(function, images, **on(target.device, g | extra))
        found = target.call(function, images, **on(target.device, broken | extra))
        assert torch.equal(found[[0, 2, 3]], clean[[0, 2, 3]])


@pytest.mark.parametrize(
    ("u", "place"), [((0.0, 0.0), "start"), ((1 - 2**-24, 1 - 2**-24), "end")], ids=["0", "1"]
)
def test_patch_lands_inside(target, u, place):
    """Offsets at the ends of [0, 1) put the box at the image's first and last place."""
    attention = torch.zeros(1, 1, 10, 12)
    attention[0, 0, 3:6, 4:9] = 1.0
    images = torch.arange(120.0).view(1, 1, 10, 12)
    found = target.call(
        mk.attention_patch,
        images.to(target.device),
        attention.to(target.device),
        torch.tensor([0.5], device=target.device),
        torch.tensor([u], device=target.device),
        padding=0.0,
    ).cpu()
    wanted = images.clone()
    rows, columns = (slice(0, 2), slice(0, 4)) if place == "start" else (slice(8, 10), slice(8, 12))
    wanted[0, 0, rows, columns] = images[0, 0, 3:5, 4:8]
    assert torch.equal(found, wanted)


def test_patch_reads_the_original_where_it_overlaps(target):
    """Source and destination overlap: the copy must not see its own writes."""
    attention = torch.zeros(1, 1, 8, 8)
    attention[0, 0, 1:7, 1:7] = 1.0
    images = torch.arange(64.0).view(1, 1, 8, 8)
    arguments = (
        images.to(target.device),
        attention.to(target.device),
        torch.tensor([0.5], device=target.device),
    )
    for u in (0.0, 0.3, 0.9):
        offsets = torch.tensor([[u, u]])
        found = target.call(mk.attention_patch, *arguments, offsets.to(target.device), padding=0.0)
        wanted = oracles.attention_patch(
            images.double(), attention, torch.tensor([0.5]), offsets, padding=0.0
        )
        assert torch.equal(found.cpu().double(), wanted)


def test_patch_places_evenly(target):
    """Evenly spaced offsets reach every place equally often."""
    count = 60
    attention = torch.zeros(count, 1, 7, 1)
    attention[:, 0, 0:3] = 1.0
    images = torch.zeros(count, 1, 7, 1)
    images[:, 0, 0] = 1.0
    offsets = torch.stack([(torch.arange(count) + 0.5) / count, torch.zeros(count)], dim=1)
    found = target.call(
        mk.attention_patch,
        images.to(target.device),
        attention.to(target.device),
        torch.full((count,), 0.5, device=target.device),
        offsets.to(target.device),
        padding=0.0,
    ).cpu()
    # The box is rows 0 and 1; its first row, the bright one, lands on rows 0 to 5.
    last = found[:, 0, :, 0].flip(1).argmax(1)
    assert np.bincount(6 - last.numpy(), minlength=6)[:6].tolist() == [10] * 6


@all_views
def test_view_has_no_gradient_for_attention_and_theta(target, view):
    function, _, extra = VIEWS[view]
    options = on(target.device, guide(seed=3) | extra)
    options["attention"].requires_grad_()
    options["theta"].requires_grad_()
    images = random(4, 3, 25, 23, dtype=torch.float32).to(target.device)
    assert not target.call(function, images, **options).requires_grad
    images.requires_grad_()
    out = target.call(function, images, **options)
    wanted = [images, options["attention"], options["theta"]]
    gradients = torch.autograd.grad(out.sum(), wanted, allow_unused=True)
    assert gradients[0] is not None
    assert gradients[1:] == (None, None)


@all_views
@both_corners
def test_view_gradcheck(target, view, align_corners):
    function, _, extra = VIEWS[view]
    options = on(target.device, guide(seed=3, low=(3, 3)) | extra)
    images = random(4, 2, 6, 5).to(target.device).requires_grad_()
    assert gradcheck(
        target, lambda x: target.call(function, x, **options, align_corners=align_corners), images
    )


@all_views
def test_view_empty_batch(target, view):
    function, _, extra = VIEWS[view]
    options = on(target.device, guide(batch=0) | {k: v[:0] for k, v in extra.items()})
    images = torch.zeros(0, 3, 25, 23, device=target.device, requires_grad=True)
    out = target.call(function, images, **options)
    assert out.shape == (0, 3, 25, 23)
    assert torch.autograd.grad(out.sum(), images)[0].shape == (0, 3, 25, 23)


@all_views
def test_view_one_pixel_image(target, view):
    check_view(target, view, torch.float32, size=(1, 1), low=(1, 1))


@all_views
def test_view_does_not_read_uninitialized_memory(target, view):
    function, _, extra = VIEWS[view]
    options = on(target.device, guide(seed=3) | extra)

    def run() -> tuple[Tensor, Tensor]:
        images = random(4, 3, 25, 23, dtype=torch.float32).to(target.device).requires_grad_()
        out = target.call(function, images, **options)
        return out.detach(), torch.autograd.grad(out.square().sum(), images)[0]

    clean = run()
    with poisoned_memory():
        poisoned = run()
    for a, b in zip(clean, poisoned, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@examples(8)
@given(st.integers(0, 10**6), st.floats(-3, 3), st.sampled_from(sorted(VIEWS)))
def test_views_are_linear_in_images(target, seed, factor, view):
    function, _, extra = VIEWS[view]
    options = on(target.device, guide(seed=seed) | extra)
    x = random(4, 2, 11, 9, seed=seed).to(target.device)
    y = random(4, 2, 11, 9, seed=seed + 1).to(target.device)
    together = target.call(function, factor * x + y, **options)
    apart = factor * target.call(function, x, **options) + target.call(function, y, **options)
    torch.testing.assert_close(together, apart, rtol=1e-11, atol=1e-11)


@examples(8)
@given(st.permutations(range(4)), st.sampled_from(sorted(VIEWS)))
def test_images_do_not_see_each_other(target, order, view):
    function, _, extra = VIEWS[view]
    options = on(target.device, guide(seed=5) | extra)
    images = random(4, 2, 11, 9, dtype=torch.float32).to(target.device)
    out = target.call(function, images, **options)
    shuffled = {k: v[order] for k, v in options.items()}
    assert torch.equal(target.call(function, images[order], **shuffled), out[order])


@both_corners
def test_crop_does_not_see_pixels_outside_its_box(target, align_corners):
    """Neither a NaN nor an infinity beside the box may leak in, not even with weight 0."""
    g = on(target.device, guide(seed=3))
    images = random(4, 3, 25, 23, dtype=torch.float32).to(target.device)
    spoiled = torch.full_like(images, float("nan"))
    for image, kept, box in zip(
        spoiled, images, boxes(target, **g, size=(25, 23), align_corners=align_corners), strict=True
    ):
        rows, columns = slice(box[0], box[2]), slice(box[1], box[3])
        image[:, rows, columns] = kept[:, rows, columns]
    assert spoiled.isnan().any()
    found = target.call(mk.attention_crop, spoiled, **g, align_corners=align_corners)
    wanted = target.call(mk.attention_crop, images, **g, align_corners=align_corners)
    assert torch.equal(found, wanted)
