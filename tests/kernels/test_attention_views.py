"""attention_views and its module."""

from __future__ import annotations

from typing import Any

import pytest
import torch
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
    gradcheck,
    make_strided,
    on,
    poisoned_memory,
    random,
    uniform,
)


def views_guide(batch: int = 4, low: tuple[int, int] = (5, 4)) -> dict[str, Any]:
    return {
        "attention": attention_maps(batch, 5, *low, seed=31),
        "index": torch.arange(3 * batch).view(batch, 3) * 2 % 5,
        "theta": uniform(batch, 3, seed=32, low=0.2, high=0.6),
        "offsets": uniform(batch, 2, seed=33),
    }


def check_views(
    target: Target,
    dtype: torch.dtype,
    size: tuple[int, int] = (25, 23),
    low: tuple[int, int] = (5, 4),
    layout: str = "contiguous",
    **options: Any,
) -> Tensor:
    g = views_guide(low=low)
    g["attention"] = g["attention"].to(dtype)
    moved = {k: make_strided(v.to(target.device), layout) for k, v in g.items()}
    return assert_matches_oracle(
        lambda images: target.call(mk.attention_views, images, **moved, **options),
        lambda images: oracles.attention_views(images, **g, **options),
        [random(4, 3, *size, seed=34)],
        target,
        dtype,
        layout,
    )


@all_dtypes
@both_corners
def test_views_forward_and_gradient(target, dtype, align_corners):
    assert check_views(target, dtype, align_corners=align_corners).shape == (3, 4, 3, 25, 23)


@all_sizes
def test_views_sizes(target, size, low):
    check_views(target, torch.float32, size, low)


@all_layouts
def test_views_strides_and_memory_format(target, layout):
    out = check_views(target, torch.float32, layout=layout)
    if layout == "contiguous":
        assert all(view.is_contiguous() for view in out)
    if layout == "channels_last":
        assert all(view.is_contiguous(memory_format=torch.channels_last) for view in out)


def test_views_options(target):
    check_views(target, torch.float32, padding=0.3, weight=0.7, floor=0.25)


@all_dtypes
@both_corners
def test_views_equal_the_single_operations(target, dtype, align_corners):
    images = random(4, 3, 25, 23, dtype=dtype).to(target.device)
    g = on(target.device, views_guide())
    g["attention"] = g["attention"].to(dtype)
    found = target.call(mk.attention_views, images, **g, align_corners=align_corners)
    a, index, theta = g["attention"], g["index"], g["theta"]
    common = {"align_corners": align_corners}
    singles = [
        target.call(mk.attention_mixup, images, a, theta[:, 0], index=index[:, 0], **common),
        target.call(mk.attention_dim, images, a, theta[:, 1], index=index[:, 1], **common),
        target.call(
            mk.attention_patch, images, a, theta[:, 2], g["offsets"], index=index[:, 2], **common
        ),
    ]
    for view, single in zip(found, singles, strict=True):
        assert torch.equal(view, single)


def test_views_gradcheck(target):
    g = on(target.device, views_guide(batch=2, low=(3, 3)))
    images = random(2, 2, 6, 5).to(target.device).requires_grad_()
    assert gradcheck(target, lambda x: target.call(mk.attention_views, x, **g), images)


def test_views_no_gradient_for_attention_and_theta(target):
    g = on(target.device, views_guide())
    g["attention"].requires_grad_()
    g["theta"].requires_grad_()
    images = random(4, 3, 25, 23, dtype=torch.float32).to(target.device).requires_grad_()
    out = target.call(mk.attention_views, images, **g)
    gradients = torch.autograd.grad(
        out.sum(), [images, g["attention"], g["theta"]], allow_unused=True
    )
    assert gradients[0] is not None
    assert gradients[1:] == (None, None)


def test_views_empty_batch(target):
    g = on(target.device, views_guide(batch=0))
    images = torch.zeros(0, 3, 25, 23, device=target.device, requires_grad=True)
    out = target.call(mk.attention_views, images, **g)
    assert out.shape == (3, 0, 3, 25, 23)
    assert torch.autograd.grad(out.sum(), images)[0].shape == images.shape


def test_views_do_not_read_uninitialized_memory(target):
    g = on(target.device, views_guide())

    def run() -> tuple[Tensor, Tensor]:
        images = random(4, 3, 25, 23, dtype=torch.float32).to(target.device).requires_grad_()
        out = target.call(mk.attention_views, images, **g)
        return out.detach(), torch.autograd.grad(out.square().sum(), images)[0]

    clean = run()
    with poisoned_memory():
        poisoned = run()
    for a, b in zip(clean, poisoned, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


# ---------------------------------------------------------------- AttentionViews


def module_inputs(batch: int = 6, maps: int = 5) -> tuple[Tensor, Tensor]:
    return random(batch, 2, 17, 15, dtype=torch.float32), attention_maps(batch, maps, 4, 4)


def generator_of(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_module_has_no_state():
    module = mk.AttentionViews()
    assert isinstance(module, torch.nn.Module)
    assert not list(module.parameters())
    assert not module.state_dict()


def test_module_draws_are_those_of_the_function():
    images, attention = module_inputs()
    options = {"padding": 0.2, "weight": 0.3, "floor": 0.01}
    views, draws = mk.AttentionViews(**options)(
        images, attention, generator=generator_of(1), return_draws=True
    )
    assert torch.equal(
        views,
        mk.attention_views(images, attention, draws.index, draws.theta, draws.offsets, **options),
    )
    assert (draws.index.shape, draws.index.dtype) == ((6, 3), torch.int64)
    assert (draws.theta.shape, draws.theta.dtype) == ((6, 3), torch.float32)
    assert (draws.offsets.shape, draws.offsets.dtype) == ((6, 2), torch.float32)


def test_module_is_a_function_of_its_generator():
    """Same seed, same views; the global generator is left alone."""
    images, attention = module_inputs()
    module = mk.AttentionViews()
    state = torch.get_rng_state()
    first = module(images, attention, generator=generator_of(1))
    assert isinstance(first, Tensor)
    assert first.shape == (3, *images.shape)
    assert torch.equal(first, module(images, attention, generator=generator_of(1)))
    assert not torch.equal(first, module(images, attention, generator=generator_of(2)))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    by_default = module(images, attention)
    torch.manual_seed(5)
    assert torch.equal(by_default, module(images, attention))
    assert not torch.equal(by_default, module(images, attention))


def test_module_replays_a_step():
    images, attention = module_inputs()
    module = mk.AttentionViews()
    generator = generator_of(1)
    views, draws = module(images, attention, generator=generator, return_draws=True)
    state = generator.get_state()
    again = module(images, attention, generator=generator, draws=draws)
    assert torch.equal(views, again)
    assert torch.equal(generator.get_state(), state)
    again, same = module(images, attention, draws=draws, return_draws=True)
    assert torch.equal(views, again)
    assert all(torch.equal(a, b) for a, b in zip(draws, same, strict=True))


def test_module_draws_the_published_ranges():
    """Theta uniform in 0.4..0.6, 0.2..0.5, 0.4..0.6; offsets uniform in 0..1."""
    _, attention = module_inputs(batch=3000, maps=2)
    draws = mk.AttentionViews().draw(attention, generator_of(3))
    columns = [*draws.theta.T, *draws.offsets.T]
    ranges = [(0.4, 0.6), (0.2, 0.5), (0.4, 0.6), (0.0, 1.0), (0.0, 1.0)]
    for column, (low, high) in zip(columns, ranges, strict=True):
        assert low <= float(column.min()) < low + 0.01 * (high - low)
        assert high >= float(column.max()) > high - 0.01 * (high - low)
        counts = torch.histc((column - low) / (high - low), 10, 0, 1)
        # Six standard deviations of a binomial with n = 3000, p = 0.1.
        assert (counts - 300).abs().max() < 100
    correlation = torch.corrcoef(torch.stack([*columns, *draws.index.T.float()]))
    assert (correlation - torch.eye(8)).abs().max() < 6 / 3000**0.5


def test_module_draws_maps_by_the_roots_of_their_sums():
    weights = torch.tensor([1.0, 4.0, 0.0, 16.0])
    attention = weights.view(1, 4, 1, 1).expand(3000, 4, 2, 2)
    draws = mk.AttentionViews().draw(attention, generator_of(4))
    for column in draws.index.T:
        shares = torch.bincount(column, minlength=4) / 3000
        assert (shares - torch.tensor([1, 2, 0, 4]) / 7).abs().max() < 6 * (0.25 / 3000) ** 0.5


def test_module_ranges_can_be_set():
    _, attention = module_inputs(batch=500)
    ranges = {"mixup_theta": (0.1, 0.2), "dim_theta": (0.7, 0.7), "patch_theta": (0.8, 0.9)}
    theta = mk.AttentionViews(**ranges).draw(attention, generator_of(3)).theta
    for column, (low, high) in zip(theta.T, ranges.values(), strict=True):
        assert low - 1e-6 <= float(column.min()) <= float(column.max()) <= high + 1e-6
    assert float(theta[:, 0].max() - theta[:, 0].min()) > 0.09


@pytest.mark.parametrize("name", ["mixup_theta", "dim_theta", "patch_theta"])
def test_module_refuses_a_range_upside_down(name):
    with pytest.raises(ValueError, match=name):
        mk.AttentionViews(**{name: (0.6, 0.4)})


def test_module_takes_a_backend(target):
    images, attention = (x.to(target.device) for x in module_inputs())
    module = mk.AttentionViews(backend=target.backend)
    try:
        views, draws = module(images, attention, return_draws=True)
    except mk.BackendUnavailable as reason:
        pytest.skip(str(reason))
    assert torch.equal(views, target.call(mk.attention_views, images, attention, *draws))
    unknown = mk.AttentionViews(backend="fastest")
    with pytest.raises(ValueError, match="fastest"):
        unknown(images, attention)


def test_module_gives_gradients_to_images_only():
    images, attention = module_inputs()
    images.requires_grad_()
    attention.requires_grad_()
    out = mk.AttentionViews()(images, attention)
    found = torch.autograd.grad(out.sum(), [images, attention], allow_unused=True)
    assert found[0] is not None
    assert found[1] is None


def test_module_empty_batch():
    images, attention = module_inputs(batch=0)
    assert mk.AttentionViews()(images, attention).shape == (3, 0, 2, 17, 15)
