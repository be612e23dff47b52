"""Every public operation over drawn shapes, values, dtypes, strides and options.

Results and gradients are compared with the float64 oracle by the contract's bounds. An example
whose oracle itself moves by a good part of a bound when its inputs move by a few roundings says
nothing about a kernel (sums that cancel, a maximum that two pixels share) and is passed over.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

import magsd_kernels as mk

from . import oracles
from . import strategies as draw
from .cases import CASES
from .strategies import SWEEP
from .support import Target, assert_agrees, error_bound, identical, make_strided, random

Run = Callable[..., Tensor]


def test_no_public_function_is_left_out() -> None:
    called = {*re.findall(r"\bmk\.(\w+)", Path(__file__).read_text())}
    called |= {f"attention_{view}" for view in VIEWS}
    assert {case.function.__name__ for case in CASES} - {"sampled_views"} <= called


def with_gradients(
    run: Run, leaves: Sequence[Tensor], layout: str = "contiguous", nudge: float = 0.0
) -> list[Tensor]:
    """The result and the gradient of every leaf, for a fixed gradient of the result.

    `nudge` moves every entry that goes in, of that gradient too, by about this share of itself.
    """
    leaves = [nudged(x.detach(), nudge, seed).requires_grad_() for seed, x in enumerate(leaves)]
    out = run(*leaves)
    # Exact in every dtype: oracle and kernel see the same numbers.
    direction = random(*out.shape, seed=99, dtype=torch.bfloat16).to(out.device, out.dtype)
    direction = make_strided(nudged(direction, nudge, 98), layout)
    return [out.detach(), *torch.autograd.grad(out, leaves, direction)]


def nudged(x: Tensor, share: float, seed: int) -> Tensor:
    return x * (1 + share * random(*x.shape, seed=seed)) if share else x


def assume_well_conditioned(
    expected: list[Tensor],
    oracle: Run,
    masters: Sequence[Tensor],
    dtype: torch.dtype,
) -> None:
    """No result moves by more than its bound when all that goes in moves by a few roundings."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    # Both ways, so that one of them passes whatever corner lies that near.
    for nudge in (8 * torch.finfo(wide).eps, -8 * torch.finfo(wide).eps):
        after = with_gradients(oracle, masters, nudge=nudge)
        for x, y in zip(expected, after, strict=True):
            change = (x - y).abs().nan_to_num(nan=0.0)
            assume(bool((change <= error_bound(x, wide)).all()))


def assume_gradients_remain(expected: list[Tensor], frozen: Run, masters: Sequence[Tensor]) -> None:
    """No gradient through a norm or a variance cancels to a trifle of that with it held fixed."""
    for x, y in zip(expected, with_gradients(frozen, masters), strict=True):
        assume(not x.numel() or bool(x.abs().max() >= y.abs().max() / 16))


def check(
    target: Target,
    run: Run,
    oracle: Run,
    leaves: Sequence[Tensor],
    layout: str = "contiguous",
    *,
    frozen: Run | None = None,
    exact: bool = False,
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """Result and gradients against the oracle, twice, the second time bit for bit the first.

    `frozen` is the oracle with its norm or statistics held fixed. `exact` inputs move nothing by
    rounding. `dtype` is that of the result where it is not the inputs'.
    """
    masters = [leaf.detach().cpu().double().contiguous() for leaf in leaves]
    expected = with_gradients(oracle, masters)
    largest = torch.finfo(leaves[0].dtype).max
    assume(not any(bool((x.abs() >= largest).any()) for x in expected if x.isfinite().all()))
    if not exact:
        assume_well_conditioned(expected, oracle, masters, leaves[0].dtype)
    if frozen is not None:
        assume_gradients_remain(expected, frozen, masters)
    found = with_gradients(run, leaves, layout)
    again = with_gradients(run, leaves, layout)
    dtypes = [dtype or leaves[0].dtype, *(leaf.dtype for leaf in leaves)]
    for i, (a, b, wanted) in enumerate(zip(found, again, expected, strict=True)):
        what = f"gradient {i - 1}" if i else "result"
        assert a.dtype == dtypes[i], what
        assert_agrees(a, wanted, what)
        assert identical(a, b), f"{what} differs from run to run"
    return found


def shuffled(shuffle: Random, count: int) -> list[int]:
    order = list(range(count))
    shuffle.shuffle(order)
    return order


# ---------------------------------------------------------------- attention


@SWEEP
@given(draw.resamples(), draw.layouts, draw.shuffles)
def test_resample(target, call, layout, shuffle):
    def run(*maps: Tensor) -> Tensor:
        return target.call(mk.resample_attention, maps, **call.options)

    def oracle(*maps: Tensor) -> Tensor:
        return oracles.resample_attention(maps, *call.options.values())

    maps = [x.build(call.dtype, target.device) for x in call.maps]
    found = check(target, run, oracle, maps, layout)[0]
    order = shuffled(shuffle, len(found))
    assert identical(run(*(x[order] for x in maps)), found[order])


@SWEEP
@given(draw.floats((2, 3, 5, 4), (*draw.SIGNED, *draw.NOT_FINITE)), draw.dtypes, draw.corners)
def test_resample_to_the_same_size_is_the_identity(target, maps, dtype, align_corners):
    x = maps.build(dtype, target.device)
    # Whether a weight of 0 carries a NaN is not said; the other modes have none.
    modes = ["area", "nearest"] if maps.fill in draw.NOT_FINITE else draw.MODES
    for mode in modes:
        options = {"mode": mode, "align_corners": align_corners}
        assert identical(target.call(mk.resample_attention, [x], **options), x)


@SWEEP
@given(draw.multiscales(), draw.layouts)
def test_multiscale(target, call, layout):
    n = len(call.maps)
    assume(not call.training or all(math.prod(x.shape) > x.shape[1] for x in call.maps))
    means, variances = call.parameters()[2:]

    def run(*leaves: Tensor) -> Tensor:
        groups = [leaves[i : i + n] for i in range(0, 3 * n, n)]
        statistics = call.parameters(target.device)[2:]
        out = target.call(
            mk.multiscale_attention, *groups, *statistics, momentum=call.momentum, **call.options
        )
        after = running_statistics(groups[0], means, variances, call)
        for found, wanted in zip([*statistics[0], *statistics[1]], after, strict=True):
            assert_agrees(found, wanted, "running statistics")
        return out

    def oracle(*leaves: Tensor) -> Tensor:
        groups = [leaves[i : i + n] for i in range(0, 3 * n, n)]
        statistics = [[x.double() for x in group] for group in (means, variances)]
        return oracles.multiscale_attention(*groups, *statistics, **call.options)

    def frozen(*leaves: Tensor) -> Tensor:
        groups = [leaves[i : i + n] for i in range(0, 3 * n, n)]
        flat = [x.detach().transpose(0, 1).flatten(1) for x in groups[0]]
        statistics = [x.mean(1) for x in flat], [x.var(1, correction=0) for x in flat]
        options = call.options | {"training": False}
        return oracles.multiscale_attention(*groups, *statistics, **options)

    parameters = [x for group in call.parameters(target.device)[:2] for x in group]
    maps = [x.build(call.dtype, target.device) for x in call.maps]
    leaves = [*maps, *parameters]
    check(target, run, oracle, leaves, layout, frozen=frozen if call.training else None)


@SWEEP
@given(draw.multiscales(("nan",)))
def test_multiscale_carries_nan(target, call):
    """To wherever a pixel that is NaN has a weight: a rectifier must not swallow it."""
    assume(not call.training or all(math.prod(x.shape) > x.shape[1] for x in call.maps))
    # Whether a weight of 0 carries a NaN is not said; these modes have none.
    assume(call.mode != "bilinear")
    maps = [x.build(call.dtype, target.device) for x in call.maps]
    groups = call.parameters(target.device)
    found = target.call(mk.multiscale_attention, maps, *groups, **call.options).cpu()
    nans = [x.isnan().cpu() for x in maps]
    if call.training:
        nans = [x.any(3).any(2).any(0)[None, :, None, None].expand_as(x) for x in nans]
    size = call.size or call.maps[-1].shape[2:]
    reached = [oracles.resize(x.double(), size, call.mode) > 0 for x in nans]
    assert torch.equal(found.isnan(), torch.stack(reached).any(0))


def running_statistics(
    maps: Sequence[Tensor], means: list[Tensor], variances: list[Tensor], call: draw.Multiscale
) -> list[Tensor]:
    """What a call leaves behind: the means, then the unbiased variances."""
    before = [x.double() for x in (*means, *variances)]
    if not call.training:
        return before
    wide = [x.detach().cpu().double().transpose(0, 1).flatten(1) for x in maps]
    batch = [*(x.mean(1) for x in wide), *(x.var(1) for x in wide)]
    return [(1 - call.momentum) * a + call.momentum * b for a, b in zip(before, batch, strict=True)]


# ---------------------------------------------------------------- pooling


@SWEEP
@given(draw.pools(), draw.layouts)
def test_pool(target, call, layout):
    check_pool(target, call, layout)


def check_pool(target: Target, call: draw.Pool, layout: str) -> None:
    resized = call.features.shape[2:] != call.attention.shape[2:]
    leaves = [x.build(call.dtype, target.device) for x in (call.features, call.attention)]

    def run(features: Tensor, attention: Tensor) -> Tensor:
        return target.call(mk.bilinear_attention_pool, features, attention, **call.options)

    def oracle(features: Tensor, attention: Tensor) -> Tensor:
        return oracles.bilinear_attention_pool(features, attention, **call.options)

    # Sums of steps, and equal products of whatever, are what they are in every arithmetic.
    free = {"steps", "zero"} if call.pool == "avg" else draw.TIED
    exact = not resized and {call.features.fill, call.attention.fill} <= set(free)
    masters = [x.cpu().double() for x in leaves]
    assume(exact or call.pool == "avg" or clear_maxima(*masters))
    assume(exact or not call.signed_sqrt or clear_signs(*masters, pool=call.pool))

    def frozen(features: Tensor, attention: Tensor) -> Tensor:
        options = call.options | {"normalize": False}
        rows = oracles.bilinear_attention_pool(features, attention, **options)
        norm = rows.detach().norm(dim=1, keepdim=True) / abs(call.scale or 1.0)
        return rows / norm.clamp_min(1e-12)

    held = frozen if call.normalize else None
    check(target, run, oracle, leaves, layout, frozen=held, exact=exact)


@SWEEP
@given(draw.pools(draw.TIED, attention=draw.TIED, same=True), draw.layouts)
def test_pool_of_equal_pixels(target, call, layout):
    """Of the pixels that share the maximum the first is meant."""
    check_pool(target, replace(call, pool="max", signed_sqrt=False), layout)


@SWEEP
@given(draw.pools(("nan",)))
def test_pool_carries_nan(target, call):
    """A NaN under any attention is a NaN of its channel; through the norm, of its whole image."""
    features = call.features.build(call.dtype, target.device)
    attention = call.attention.build(call.dtype, target.device)
    found = target.call(mk.bilinear_attention_pool, features, attention, **call.options)
    wanted = features.isnan().any(3).any(2)[:, None].expand(-1, attention.shape[1], -1)
    if call.normalize:
        wanted = wanted.any(2, keepdim=True).expand_as(wanted)
    assert torch.equal(found.isnan(), wanted.flatten(1))


def clear_maxima(features: Tensor, attention: Tensor) -> bool:
    """Whether one pixel of each product is the largest by more than rounding, or several are 0."""
    wide = oracles.resize(attention, features.shape[2:], "bilinear", align_corners=True)
    products = (wide[:, :, None] * features[:, None]).flatten(3)
    if products.shape[3] == 1:
        return True
    largest, next_one = products.topk(2).values.unbind(3)
    clear = largest - next_one > 1e-6 * largest.abs()
    return bool((clear | ((largest == 0) & (next_one == 0))).all())


def clear_signs(features: Tensor, attention: Tensor, pool: str) -> bool:
    """Whether no pooled entry is nearly 0, where its root jumps from -sqrt(eps) to sqrt(eps)."""
    plain = {"pool": pool, "signed_sqrt": False, "normalize": False}
    pooled = oracles.bilinear_attention_pool(features, attention, **plain).abs()
    terms = oracles.bilinear_attention_pool(features.abs(), attention.abs(), **plain)
    return bool(((pooled > 1e-5 * terms) | (terms == 0)).all())


# ---------------------------------------------------------------- drawing maps


@SWEEP
@given(draw.samples(), draw.shuffles)
def test_sample(target, call, shuffle):
    arguments = call.arguments(target.device)
    found = target.call(mk.sample_attention, **arguments)
    lowest, highest = allowed_indices(**call.arguments())
    assert ((lowest <= found.cpu().numpy()) & (found.cpu().numpy() <= highest)).all(), found
    order = shuffled(shuffle, len(found))
    arguments = {k: v[order] if isinstance(v, Tensor) else v for k, v in arguments.items()}
    assert torch.equal(target.call(mk.sample_attention, **arguments), found[order])


def allowed_indices(attention: Tensor, uniforms: Tensor, eps: float) -> tuple[np.ndarray, ...]:
    """Least and largest index of every draw; they differ within double rounding of a boundary."""
    with np.errstate(invalid="ignore"):
        sums = attention.double().numpy().sum(axis=(2, 3))
        roots = np.sqrt(np.where(sums > 0, sums, 0.0) + eps)
        cumulative = np.cumsum(roots, axis=1)
        shares = (cumulative / cumulative[:, -1:])[:, None, :]
    u = uniforms.double().numpy()[:, :, None]
    last = attention.shape[1] - 1
    return tuple(np.minimum((shares <= u + d).sum(2), last) for d in (-1e-12, 1e-12))


# ---------------------------------------------------------------- guided views


def sides_of(call: draw.Views, view: int) -> list[oracles.Sides]:
    guide = call.guide()
    nearest = guide["index"][:, view].clamp(0, call.attention.shape[1] - 1)
    return [
        oracles.threshold_sides(maps[m], theta, call.size, call.align_corners)
        for maps, m, theta in zip(guide["attention"], nearest, guide["theta"][:, view], strict=True)
    ]


def checked_boxes(target: Target, call: draw.Views, view: int = 0) -> list[oracles.Box]:
    """The target's boxes, each of which the contract allows."""
    arguments = call.single(target.device, view) | {"padding": call.padding}
    found = target.call(mk.attention_boxes, size=call.size, **arguments)
    assert found.dtype == torch.int32
    boxes = [oracles.Box(*row) for row in found.tolist()]
    for box, sides in zip(boxes, sides_of(call, view), strict=True):
        assert oracles.box_is_allowed(box, sides, call.padding), (
            f"{box}, oracle {oracles.box_of(sides.passes, call.padding)}, "
            f"{int(sides.undecided.sum())} pixels undecided"
        )
    return boxes


def checked_masks(target: Target, call: draw.Views, view: int = 0) -> Tensor:
    """The target's [U < t] as (B, 1, H, W) float64, each of which the contract allows."""
    ones = torch.ones(call.images.shape[0], 1, *call.size, device=target.device)
    found = target.call(mk.attention_drop, ones, **call.single(target.device, view)).cpu()
    assert ((found == 0) | (found == 1)).all()
    for mask, sides in zip(found[:, 0].bool().numpy(), sides_of(call, view), strict=True):
        assert (mask | ~sides.below).all(), "a pixel below the threshold is dropped"
        assert (~mask | sides.below | sides.undecided).all(), "a pixel at the threshold is kept"
    return found.double()


@SWEEP
@given(draw.views(), draw.shuffles)
def test_boxes(target, call, shuffle):
    boxes = checked_boxes(target, call)
    order = shuffled(shuffle, len(boxes))
    arguments = call.single(target.device)
    arguments = {k: v[order] if isinstance(v, Tensor) else v for k, v in arguments.items()}
    found = target.call(mk.attention_boxes, size=call.size, padding=call.padding, **arguments)
    assert found.tolist() == [list(boxes[i]) for i in order]


VIEWS = ("crop", "mixup", "patch", "dim", "drop")


def view_functions(target: Target, call: draw.Views, view: str) -> tuple[Run, Run]:
    """The operation and its oracle, given the boxes or the mask that the target itself finds."""
    guide = call.single(target.device)
    function = getattr(mk, f"attention_{view}")
    if view in ("dim", "drop"):
        masks = checked_masks(target, call)
        options = {"floor": call.floor} if view == "dim" else {}
        factor = masks + options.get("floor", 0.0)
        return lambda x: target.call(function, x, **guide, **options), lambda x: x * factor
    boxes = checked_boxes(target, call)
    options: dict[str, Any] = {"padding": call.padding}
    if view == "patch":
        offsets = call.guide()["offsets"]
        options["offsets"] = offsets.to(target.device)
        return (
            lambda x: target.call(function, x, **guide, **options),
            lambda x: oracles.paste_boxes(x, boxes, offsets),
        )
    weight = 1.0 if view == "crop" else call.weight
    if view == "mixup":
        options["weight"] = weight
    return (
        lambda x: target.call(function, x, **guide, **options),
        lambda x: blend(x, boxes, weight, call.align_corners),
    )


def blend(images: Tensor, boxes: list[oracles.Box], weight: float, align_corners: bool) -> Tensor:
    crops = oracles.crops_to_images(images, boxes, align_corners)
    return (1.0 - weight) * images + weight * crops


@pytest.mark.parametrize("view", VIEWS)
@SWEEP
@given(call=draw.views(), layout=draw.layouts)
def test_view(target, view, call, layout):
    run, oracle = view_functions(target, call, view)
    images = call.images.build(call.dtype, target.device)
    check(target, run, oracle, [images], layout)


@pytest.mark.parametrize("view", ["patch", "dim", "drop"])
@SWEEP
@given(call=draw.views(images=tuple(draw.NOT_FINITE)), layout=draw.layouts)
def test_view_of_images_that_are_not_finite(target, view, call, layout):
    """What copies or scales pixels one by one keeps NaN and infinities where they are."""
    run, oracle = view_functions(target, call, view)
    check(target, run, oracle, [call.images.build(call.dtype, target.device)], layout, exact=True)


@SWEEP
@given(draw.views())
def test_drop_twice_is_drop_once(target, call):
    images, guide = call.images.build(call.dtype, target.device), call.single(target.device)
    once = target.call(mk.attention_drop, images, **guide)
    assert identical(target.call(mk.attention_drop, once, **guide), once)


@SWEEP
@given(draw.views(attention=("zero", "nan")), st.sampled_from(["patch", "crop"]))
def test_a_box_of_the_whole_image_changes_nothing(target, call, view):
    guide = call.single(target.device) | {"padding": 1.0}
    whole = [[0, 0, *call.size]] * len(call.theta)
    assume(target.call(mk.attention_boxes, size=call.size, **guide).tolist() == whole)
    if view == "patch":
        guide["offsets"] = call.guide(target.device)["offsets"]
    images = call.images.build(call.dtype, target.device)
    found = target.call(getattr(mk, f"attention_{view}"), images, **guide)
    if view == "patch":
        assert identical(found, images)
    else:
        assert_agrees(found, images.double())


@SWEEP
@given(draw.views(), draw.layouts, draw.shuffles, st.floats(-3, 3))
def test_views(target, call, layout, shuffle, factor):
    """All three at once against the oracle; linear in the images; images do not see each other."""
    options = {name: getattr(call, name) for name in ("padding", "weight", "floor")}
    options["align_corners"] = call.align_corners
    guide = call.guide(target.device)
    mixed, patched = (checked_boxes(target, call, view) for view in (0, 2))
    factors = checked_masks(target, call, view=1) + call.floor
    offsets = call.guide()["offsets"]

    def run(images: Tensor) -> Tensor:
        return target.call(mk.attention_views, images, **guide, **options)

    def oracle(images: Tensor) -> Tensor:
        pasted = oracles.paste_boxes(images, patched, offsets)
        mixture = blend(images, mixed, call.weight, call.align_corners)
        return torch.stack([mixture, images * factors, pasted])

    images = call.images.build(call.dtype, target.device)
    found = check(target, run, oracle, [images], layout)[0]

    order = shuffled(shuffle, len(images))
    guides = {name: value[order] for name, value in guide.items()}
    again = target.call(mk.attention_views, images[order], **guides, **options)
    assert identical(again, found[:, order])

    x, y = images.double(), random(*images.shape, seed=5).to(target.device)
    torch.testing.assert_close(run(factor * x + y), factor * run(x) + run(y), rtol=0, atol=1e-12)


# ---------------------------------------------------------------- the loss


@SWEEP
@given(draw.losses())
def test_loss(target, call):
    arguments = call.fixed(target.device)
    oracle_arguments = call.fixed()
    if oracle_arguments["class_weights"] is not None:
        oracle_arguments["class_weights"] = oracle_arguments["class_weights"].double()
    leaves = [x.build(call.dtype, target.device) for x in (call.logits, call.views)]
    logits, views = (x.cpu().double() for x in leaves)
    assume(bool(((logits.softmax(1).amax(1) - call.confidence).abs() > 1e-6).all()))
    assume(distance_has_a_gradient(logits, views, oracle_arguments))

    def run(logits: Tensor, views: Tensor) -> Tensor:
        stacked = list(views) if call.as_list else views
        found = target.call(mk.soft_distance_loss, logits, stacked, **arguments)
        return torch.stack(found)

    def oracle(logits: Tensor, views: Tensor) -> Tensor:
        return torch.stack(oracles.soft_distance_loss(logits, views, **oracle_arguments))

    dtype = torch.float64 if call.dtype == torch.float64 else torch.float32
    check(target, run, oracle, leaves, dtype=dtype)


def distance_has_a_gradient(logits: Tensor, views: Tensor, arguments: dict[str, Any]) -> bool:
    """Whether the softmax leaves of it more than rounding; of one class it leaves exactly 0."""
    views = views.clone().requires_grad_()
    distance = oracles.soft_distance_loss(logits, views, **arguments)[2]
    (gradient,) = torch.autograd.grad(distance, views)
    largest = views.detach().softmax(2).max() / logits.numel()
    return logits.shape[1] == 1 or bool(gradient.abs().max() >= largest / 16)


@SWEEP
@given(draw.losses(("nan", "signed")))
def test_loss_carries_nan(target, call):
    """A NaN of the logits is one of the cross entropy, a NaN of a view one of the distance."""
    logits, views = (x.build(call.dtype, target.device) for x in (call.logits, call.views))
    arguments = call.fixed(target.device) | {"class_weights": None}
    found = target.call(mk.soft_distance_loss, logits, views, **arguments)
    assert bool(found.cross_entropy.isnan()) == bool(logits.isnan().any())
    assert bool(found.distance.isnan()) == bool(views.isnan().any())
    assert bool(found.loss.isnan()) == bool(logits.isnan().any() or views.isnan().any())
