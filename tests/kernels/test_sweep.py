"""Every public operation over drawn shapes, values, dtypes, strides and options.

Results and gradients are compared with the float64 oracle by the contract's bounds. An example
whose oracle itself moves by a good part of a bound when its inputs move by a few roundings says
nothing about a kernel (sums that cancel, a maximum that two pixels share) and is passed over.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

import magsd_kernels as mk
from magsd_kernels.cases import Arguments, sampled_views

from . import oracles
from . import strategies as draw
from .cases import BY_NAME, CASES
from .strategies import SWEEP
from .support import Target, assert_agrees, error_bound, identical, make_strided, random

Run = Callable[..., Tensor]


def test_no_public_function_is_left_out() -> None:
    names = {*re.findall(r"draw\.calls\(\s*\"(\w+)", Path(__file__).read_text()), *VIEWS, "loss"}
    called = {BY_NAME[name].function for name in names}
    assert {case.function for case in CASES} - {sampled_views} <= called


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


def both(target: Target, call: draw.Call) -> tuple[Run, Run]:
    """The function, and its oracle, of the arguments that have gradients."""
    function = call.case.function
    return (
        lambda *leaves: target.call(function, **call.taking(leaves, target.device)),
        lambda *leaves: getattr(oracles, function.__name__)(**call.taking(leaves, wide=True)),
    )


def shuffled(shuffle: Random, count: int) -> list[int]:
    order = list(range(count))
    shuffle.shuffle(order)
    return order


def reordered(arguments: Arguments, order: list[int]) -> Arguments:
    return {k: v[order] if isinstance(v, Tensor) else v for k, v in arguments.items()}


# ---------------------------------------------------------------- attention


@SWEEP
@given(draw.calls("resample_area"), draw.layouts, draw.shuffles)
def test_resample(target, call, layout, shuffle):
    run, oracle = both(target, call)
    maps = call.leaves(target.device)
    found = check(target, run, oracle, maps, layout)[0]
    order = shuffled(shuffle, len(found))
    assert identical(run(*(x[order] for x in maps)), found[order])


@SWEEP
@given(draw.calls("resample_area", (*draw.SIGNED, *draw.NOT_FINITE)))
def test_resample_to_the_same_size_is_the_identity(target, call):
    x = call.leaves(target.device)[0]
    # Whether a weight of 0 carries a NaN is not said; the other modes have none.
    modes = draw.MODES if x.isfinite().all() else ["area", "nearest"]
    for mode in modes:
        options = {"mode": mode, "align_corners": call.arguments["align_corners"]}
        assert identical(target.call(mk.resample_attention, [x], **options), x)


def has_statistics(call: draw.Call) -> bool:
    """Whether there is a variance to each map."""
    arguments = call.arguments
    return (
        all(x.numel() > x.shape[1] for x in arguments["projections"]) or not arguments["training"]
    )


@SWEEP
@given(draw.calls("multiscale_train"), draw.layouts)
def test_multiscale(target, call, layout):
    assume(has_statistics(call))
    arguments = call.arguments
    after = running_statistics(arguments)

    def run(*leaves: Tensor) -> Tensor:
        given = call.taking(leaves, target.device)
        out = target.call(mk.multiscale_attention, **given)
        statistics = [*given["running_means"], *given["running_vars"]]
        for found, wanted in zip(statistics, after, strict=True):
            assert_agrees(found, wanted, "running statistics")
        return out

    def oracle(*leaves: Tensor) -> Tensor:
        given = call.taking(leaves, wide=True)
        del given["momentum"]
        return oracles.multiscale_attention(**given)

    def frozen(*leaves: Tensor) -> Tensor:
        given = call.taking(leaves, wide=True)
        del given["momentum"]
        flat = [x.detach().transpose(0, 1).flatten(1) for x in given["projections"]]
        statistics = {
            "running_means": [x.mean(1) for x in flat],
            "running_vars": [x.var(1, correction=0) for x in flat],
        }
        return oracles.multiscale_attention(**given | statistics | {"training": False})

    leaves = call.leaves(target.device)
    check(target, run, oracle, leaves, layout, frozen=frozen if arguments["training"] else None)


@SWEEP
@given(draw.calls("multiscale_train", ("nan",)))
def test_multiscale_carries_nan(target, call):
    """To wherever a pixel that is NaN has a weight: a rectifier must not swallow it."""
    assume(has_statistics(call))
    # Whether a weight of 0 carries a NaN is not said; these modes have none.
    mode, maps = call.arguments["mode"], call.arguments["projections"]
    assume(mode != "bilinear")
    found = target.call(mk.multiscale_attention, **call.on(target.device)).cpu()
    nans = [x.isnan() for x in maps]
    if call.arguments["training"]:
        nans = [x.any(3).any(2).any(0)[None, :, None, None].expand_as(x) for x in nans]
    size = call.size.output or maps[-1].shape[2:]
    reached = [oracles.resize(x.double(), size, mode) > 0 for x in nans]
    assert torch.equal(found.isnan(), torch.stack(reached).any(0))


def running_statistics(arguments: Arguments) -> list[Tensor]:
    """What a call leaves behind: the means, then the unbiased variances."""
    before = [x.double() for x in (*arguments["running_means"], *arguments["running_vars"])]
    if not arguments["training"]:
        return before
    wide = [x.double().transpose(0, 1).flatten(1) for x in arguments["projections"]]
    batch = [*(x.mean(1) for x in wide), *(x.var(1) for x in wide)]
    momentum = arguments["momentum"]
    return [(1 - momentum) * a + momentum * b for a, b in zip(before, batch, strict=True)]


# ---------------------------------------------------------------- batch norm


@SWEEP
@given(draw.calls("norm_train") | draw.calls("norm_residual_relu"), draw.layouts)
def test_norm(target, call, layout):
    arguments = call.arguments
    assume(has_variances(arguments))
    training = arguments["training"] and call.size.batch > 0
    after = norm_statistics(arguments)

    def run(*leaves: Tensor) -> Tensor:
        given = call.taking(leaves, target.device)
        out = target.call(mk.batch_norm_act, **given)
        for name, wanted in after.items():
            assert_agrees(given[name], wanted, name)
        return out

    def oracle(*leaves: Tensor) -> Tensor:
        given = call.taking(leaves, wide=True)
        del given["momentum"]
        return oracles.batch_norm_act(**given)

    def frozen(x: Tensor, *leaves: Tensor) -> Tensor:
        given = call.taking([x, *leaves], wide=True)
        del given["momentum"]
        parts = {"x": x, "residual": given["residual"]}
        split = {k: [None] * given["groups"] if v is None else v.chunk(given["groups"])
                 for k, v in parts.items()}  # fmt: skip
        own = given | {"training": False, "groups": 1}
        views = []
        for part, residual in zip(split["x"], split["residual"], strict=True):
            var, mean = torch.var_mean(part.detach(), (0, 2, 3), correction=0)
            held = {"x": part, "residual": residual, "running_mean": mean, "running_var": var}
            views.append(oracles.batch_norm_act(**own | held))
        return torch.cat(views)

    leaves = call.leaves(target.device)
    check(target, run, oracle, leaves, layout, frozen=frozen if training else None)


@SWEEP
@given(draw.calls("norm_train", ("nan",)))
def test_norm_carries_nan(target, call):
    """In training to its channel of its group, in evaluation no further."""
    arguments = call.arguments
    assume(has_variances(arguments))
    found = target.call(mk.batch_norm_act, **call.on(target.device)).cpu()
    wanted = arguments["x"].isnan()
    if arguments["training"] and call.size.batch:
        groups = wanted.unflatten(0, (arguments["groups"], -1))
        wanted = groups.any(4, True).any(3, True).any(1, True).expand_as(groups).flatten(0, 1)
    assert torch.equal(found.isnan(), wanted)


def has_variances(arguments: Arguments) -> bool:
    """Whether a group has a variance, or needs none."""
    x = arguments["x"]
    return not arguments["training"] or x[:, 0].numel() != arguments["groups"]


def norm_statistics(arguments: Arguments) -> dict[str, Tensor]:
    """What a call leaves behind, rounded after every group."""
    after = {name: arguments[name] for name in ("running_mean", "running_var")}
    if arguments["training"] and len(arguments["x"]):
        for part in arguments["x"].double().chunk(arguments["groups"]):
            values = part.transpose(0, 1).flatten(1)
            for name, now in zip(after, (values.mean(1), values.var(1)), strict=True):
                moved = (1 - arguments["momentum"]) * after[name].double()
                moved += arguments["momentum"] * now
                after[name] = moved.to(after[name].dtype)
    return {name: value.double() for name, value in after.items()}


# ---------------------------------------------------------------- pooling


@SWEEP
@given(draw.calls("pool_avg", attention=draw.RECTIFIED), draw.layouts)
def test_pool(target, call, layout):
    check_pool(target, call, layout)


def check_pool(target: Target, call: draw.Call, layout: str) -> None:
    options = call.arguments
    leaves = call.leaves(target.device)
    run, oracle = both(target, call)
    # Sums of steps, and equal products of whatever, are what they are in every arithmetic.
    free = {"steps", "zero"} if options["pool"] == "avg" else {*draw.TIED}
    exact = call.size.low == call.size.features and {*call.fills} <= free
    masters = [x.cpu().double() for x in leaves]
    assume(exact or options["pool"] == "avg" or clear_maxima(*masters))
    assume(exact or not options["signed_sqrt"] or clear_signs(*masters, pool=options["pool"]))

    def frozen(*leaves: Tensor) -> Tensor:
        given = call.taking(leaves, wide=True) | {"normalize": False}
        rows = oracles.bilinear_attention_pool(**given)
        norm = rows.detach().norm(dim=1, keepdim=True) / abs(options["scale"] or 1.0)
        return rows / norm.clamp_min(1e-12)

    held = frozen if options["normalize"] else None
    check(target, run, oracle, leaves, layout, frozen=held, exact=exact)


@SWEEP
@given(
    draw.calls("pool_max", draw.TIED, draw.TIED, same=True, pool="max", signed_sqrt=False),
    draw.layouts,
)
def test_pool_of_equal_pixels(target, call, layout):
    """Of the pixels that share the maximum the first is meant."""
    check_pool(target, call, layout)


@SWEEP
@given(draw.calls("pool_avg", ("nan",), draw.RECTIFIED))
def test_pool_carries_nan(target, call):
    """A NaN under any attention is a NaN of its channel; through the norm, of its whole image."""
    found = target.call(mk.bilinear_attention_pool, **call.on(target.device)).cpu()
    nans = call.arguments["features"].isnan().any(3).any(2)
    wanted = nans[:, None].expand(-1, call.size.maps, -1)
    if call.arguments["normalize"]:
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
@given(draw.calls("sample"), draw.shuffles)
def test_sample(target, call, shuffle):
    arguments = call.on(target.device)
    found = target.call(mk.sample_attention, **arguments)
    lowest, highest = allowed_indices(**call.arguments)
    assert ((lowest <= found.cpu().numpy()) & (found.cpu().numpy() <= highest)).all(), found
    order = shuffled(shuffle, len(found))
    assert torch.equal(
        target.call(mk.sample_attention, **reordered(arguments, order)), found[order]
    )


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


def guide_of(call: draw.Call, view: int, device: str = "cpu") -> Arguments:
    """What guides one view, the only one of most functions."""
    arguments = call.on(device)
    names = ("attention", "index", "theta", "align_corners")
    guide = {name: arguments[name] for name in names if name in arguments}
    for name in ("index", "theta"):
        if guide[name] is not None and guide[name].dim() == 2:
            guide[name] = guide[name][:, view]
    return guide


def sides_of(call: draw.Call, view: int) -> list[oracles.Sides]:
    guide = guide_of(call, view)
    index = torch.zeros(call.size.batch).long() if guide["index"] is None else guide["index"]
    return [
        oracles.threshold_sides(maps[m], theta, call.size.image, guide["align_corners"])
        for maps, m, theta in zip(
            guide["attention"], index.clamp(0, call.size.maps - 1), guide["theta"], strict=True
        )
    ]


def checked_boxes(target: Target, call: draw.Call, view: int = 0) -> list[oracles.Box]:
    """The target's boxes, each of which the contract allows."""
    guide, padding = guide_of(call, view, target.device), call.arguments["padding"]
    found = target.call(mk.attention_boxes, size=call.size.image, padding=padding, **guide)
    assert found.dtype == torch.int32
    boxes = [oracles.Box(*row) for row in found.tolist()]
    for box, sides in zip(boxes, sides_of(call, view), strict=True):
        assert oracles.box_is_allowed(box, sides, padding), (
            f"{box}, oracle {oracles.box_of(sides.passes, padding)}, "
            f"{int(sides.undecided.sum())} pixels undecided"
        )
    return boxes


def checked_masks(target: Target, call: draw.Call, view: int = 0) -> Tensor:
    """The target's [U < t] as (B, 1, H, W) float64, each of which the contract allows."""
    ones = torch.ones(call.size.batch, 1, *call.size.image, device=target.device)
    guide = guide_of(call, view, target.device)
    found = target.call(mk.attention_drop, ones, **guide).cpu()
    assert ((found == 0) | (found == 1)).all()
    for mask, sides in zip(found[:, 0].bool().numpy(), sides_of(call, view), strict=True):
        assert (mask | ~sides.below).all(), "a pixel below the threshold is dropped"
        assert (~mask | sides.below | sides.undecided).all(), "a pixel at the threshold is kept"
    return found.double()


@SWEEP
@given(draw.calls("boxes"), draw.shuffles)
def test_boxes(target, call, shuffle):
    boxes = checked_boxes(target, call)
    order = shuffled(shuffle, len(boxes))
    found = target.call(mk.attention_boxes, **reordered(call.on(target.device), order))
    assert found.tolist() == [list(boxes[i]) for i in order]


VIEWS = ("crop", "mixup", "patch", "dim", "drop")


def view_oracle(target: Target, call: draw.Call) -> Run:
    """Given the boxes or the mask that the target itself finds."""
    view, arguments = call.case.name, call.arguments
    if view in ("dim", "drop"):
        factor = checked_masks(target, call) + arguments.get("floor", 0.0)
        return lambda x: x * factor
    boxes = checked_boxes(target, call)
    if view == "patch":
        return lambda x: oracles.paste_boxes(x, boxes, arguments["offsets"])
    weight = 1.0 if view == "crop" else arguments["weight"]
    return lambda x: blend(x, boxes, weight, arguments["align_corners"])


def blend(images: Tensor, boxes: list[oracles.Box], weight: float, align_corners: bool) -> Tensor:
    crops = oracles.crops_to_images(images, boxes, align_corners)
    return (1.0 - weight) * images + weight * crops


@pytest.mark.parametrize("view", VIEWS)
@SWEEP
@given(st.data(), draw.layouts)
def test_view(target, view, data, layout):
    call = data.draw(draw.calls(view))
    images = call.leaves(target.device)
    check(target, both(target, call)[0], view_oracle(target, call), images, layout)


@pytest.mark.parametrize("view", ["patch", "dim", "drop"])
@SWEEP
@given(st.data(), draw.layouts)
def test_view_of_images_that_are_not_finite(target, view, data, layout):
    """What copies or scales pixels one by one keeps NaN and infinities where they are."""
    call = data.draw(draw.calls(view, tuple(draw.NOT_FINITE)))
    images = call.leaves(target.device)
    check(target, both(target, call)[0], view_oracle(target, call), images, layout, exact=True)


@SWEEP
@given(draw.calls("drop"))
def test_drop_twice_is_drop_once(target, call):
    run = both(target, call)[0]
    once = run(*call.leaves(target.device))
    assert identical(run(once), once)


WHOLE = ("zero", "nan")


@SWEEP
@given(
    draw.calls("patch", attention=WHOLE, padding=1.0)
    | draw.calls("crop", attention=WHOLE, padding=1.0)
)
def test_a_box_of_the_whole_image_changes_nothing(target, call):
    height, width = call.size.image
    assume(set(checked_boxes(target, call)) <= {(0, 0, height, width)})
    (images,) = call.leaves(target.device)
    found = both(target, call)[0](images)
    if call.case.name == "patch":
        assert identical(found, images)
    else:
        assert_agrees(found, images.double())


@SWEEP
@given(draw.calls("views"), draw.layouts, draw.shuffles, st.floats(-3, 3))
def test_views(target, call, layout, shuffle, factor):
    """All three at once against the oracle; linear in the images; images do not see each other."""
    arguments = call.arguments
    mixed, patched = (checked_boxes(target, call, view) for view in (0, 2))
    factors = checked_masks(target, call, view=1) + arguments["floor"]

    def oracle(images: Tensor) -> Tensor:
        pasted = oracles.paste_boxes(images, patched, arguments["offsets"])
        mixture = blend(images, mixed, arguments["weight"], arguments["align_corners"])
        return torch.stack([mixture, images * factors, pasted])

    run = both(target, call)[0]
    (images,) = call.leaves(target.device)
    found = check(target, run, oracle, [images], layout)[0]

    order = shuffled(shuffle, len(images))
    again = target.call(mk.attention_views, **reordered(call.on(target.device), order))
    assert identical(again, found[:, order])

    x, y = images.double(), random(*images.shape, seed=5).to(target.device)
    torch.testing.assert_close(run(factor * x + y), factor * run(x) + run(y), rtol=0, atol=1e-12)


# ---------------------------------------------------------------- the loss


@SWEEP
@given(draw.losses())
def test_loss(target, call):
    run, oracle = both(target, call)
    leaves = call.leaves(target.device)
    masters = [x.cpu().double() for x in leaves]
    confidence = call.arguments["confidence"]
    assume(bool(((masters[0].softmax(1).amax(1) - confidence).abs() > 1e-6).all()))
    assume(distance_has_a_gradient(oracle, masters))
    dtype = torch.float64 if leaves[0].dtype == torch.float64 else torch.float32
    check(
        target,
        lambda *leaves: torch.stack(run(*leaves)),
        lambda *leaves: torch.stack(oracle(*leaves)),
        leaves,
        dtype=dtype,
    )


def distance_has_a_gradient(oracle: Run, masters: Sequence[Tensor]) -> bool:
    """Whether the softmax leaves of it more than rounding; of one class it leaves exactly 0."""
    logits, *views = (x.clone().requires_grad_() for x in masters)
    gradients = torch.autograd.grad(oracle(logits, *views)[2], views)
    gradient = max(float(x.abs().max()) for x in gradients)
    largest = max(float(x.detach().softmax(-1).max()) for x in views) / logits.numel()
    return logits.shape[1] == 1 or gradient >= largest / 16


@SWEEP
@given(draw.losses(("nan", "signed")))
def test_loss_carries_nan(target, call):
    """A NaN of the logits is one of the cross entropy, a NaN of a view one of the distance."""
    given = call.on(target.device) | {"class_weights": None}
    found = target.call(mk.soft_distance_loss, **given)
    logits, *views = (bool(x.isnan().any()) for x in call.case.leaves(call.arguments))
    assert bool(found.cross_entropy.isnan()) == logits
    assert bool(found.distance.isnan()) == any(views)
    assert bool(found.loss.isnan()) == (logits or any(views))
