"""The same random inputs through every backend that is available here, compared pair by pair.

Results and gradients lie within the contract's bounds of each other; boxes, indices and the pixels
that a threshold chooses are equal. The sizes are no multiple of a block, and the values those of a
network: nothing cancels, and no pixel lies within rounding of its threshold.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import magsd_kernels as mk

from . import oracles
from .cases import CASES, Case, sampled_views
from .support import (
    Target,
    all_dtypes,
    assert_agrees,
    attention_maps,
    available_targets,
    make_strided,
    random,
    tensors_of,
    uniform,
)

BATCH, MAPS, CHANNELS, CLASSES = 3, 33, 67, 5
LOW, SIZE = (7, 6), (45, 38)


def _maps(seed: int, dtype: torch.dtype) -> list[Tensor]:
    sizes = ((14, 13), LOW)
    return [2 * random(BATCH, MAPS, *s, seed=seed + i, dtype=dtype) for i, s in enumerate(sizes)]


def _resample(seed: int, _: int, dtype: torch.dtype) -> dict[str, Any]:
    return {"maps": _maps(seed, dtype), "size": (9, 8)}


def _multiscale(seed: int, _: int, dtype: torch.dtype) -> dict[str, Any]:
    groups = [[random(MAPS, seed=seed + 10 * g + i).to(dtype) for i in (0, 1)] for g in range(4)]
    groups[3] = [x.abs() + 0.5 for x in groups[3]]
    names = ("weights", "biases", "running_means", "running_vars")
    return {"projections": _maps(seed, dtype), **dict(zip(names, groups, strict=True))}


def _pool(seed: int, _: int, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "features": random(BATCH, CHANNELS, *LOW, seed=seed, dtype=dtype).abs() + 0.1,
        "attention": attention_maps(BATCH, MAPS, 5, 6, seed=seed + 1, dtype=dtype),
    }


def _sampling(seed: int, _: int, dtype: torch.dtype) -> dict[str, Any]:
    maps = attention_maps(BATCH, MAPS, *LOW, seed=seed, dtype=dtype)
    return {"attention": maps, "uniforms": uniform(BATCH, 64, seed=seed + 1)}


def _views(seed: int, _: int, dtype: torch.dtype) -> dict[str, Any]:
    guide = {
        "attention": attention_maps(BATCH, MAPS, *LOW, seed=seed + 1, dtype=dtype),
        "theta": uniform(BATCH, 3, seed=seed + 2, low=0.2, high=0.6),
        "index": torch.arange(3 * BATCH).view(BATCH, 3) * 7 % MAPS,
    }
    assert_clear_of_thresholds(**guide)
    images = random(BATCH, 3, *SIZE, seed=seed, dtype=dtype)
    return {"images": images, **guide, "offsets": uniform(BATCH, 2, seed=seed + 3)}


def assert_clear_of_thresholds(attention: Tensor, theta: Tensor, index: Tensor) -> None:
    for b, view in itertools.product(range(BATCH), range(3)):
        low = attention[b, index[b, view]]
        assert not oracles.threshold_sides(low, theta[b, view], SIZE, False).undecided.any()


def _sampled(seed: int, batch: int, dtype: torch.dtype) -> dict[str, Any]:
    arguments = _views(seed, batch, dtype) | {"uniforms": uniform(BATCH, 3, seed=seed + 4)}
    attention, theta = arguments["attention"], arguments["theta"]
    index = torch.tensor(oracles.sample_attention(attention, arguments["uniforms"]))
    assert_clear_of_thresholds(attention, theta, index)
    del arguments["index"]
    return arguments


def _sampled_pair(seed: int, batch: int, dtype: torch.dtype) -> dict[str, Any]:
    arguments = _sampled(seed, batch, dtype)
    del arguments["offsets"]
    return arguments | {name: arguments[name][:, :2] for name in ("theta", "uniforms")}


def _view(seed: int, batch: int, dtype: torch.dtype) -> dict[str, Any]:
    arguments = _views(seed, batch, dtype)
    first = {name: arguments[name][:, 0] for name in ("theta", "index")}
    return {name: arguments[name] for name in ("images", "attention")} | first


def _patch(seed: int, batch: int, dtype: torch.dtype) -> dict[str, Any]:
    return _view(seed, batch, dtype) | {"offsets": uniform(BATCH, 2, seed=seed + 3)}


def _boxes(seed: int, batch: int, dtype: torch.dtype) -> dict[str, Any]:
    arguments = _view(seed, batch, dtype) | {"size": SIZE}
    del arguments["images"]
    return arguments


def _loss(seed: int, _: int, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "logits": 2 * random(67, CLASSES, seed=seed, dtype=dtype),
        "view_logits": random(3, 67, CLASSES, seed=seed + 1, dtype=dtype),
        "targets": torch.arange(67) % CLASSES,
    }


def _weighted_loss(seed: int, batch: int, dtype: torch.dtype) -> dict[str, Any]:
    weights = torch.linspace(0.5, 2.0, CLASSES).to(dtype)
    return _loss(seed, batch, dtype) | {"class_weights": weights}


BUILDERS = {
    mk.resample_attention: _resample,
    mk.multiscale_attention: _multiscale,
    mk.bilinear_attention_pool: _pool,
    mk.sample_attention: _sampling,
    mk.attention_boxes: _boxes,
    mk.attention_crop: _view,
    mk.attention_mixup: _view,
    mk.attention_patch: _patch,
    mk.attention_dim: _view,
    mk.attention_drop: _view,
    mk.attention_views: _views,
    sampled_views: _sampled,
    mk.soft_distance_loss: _loss,
}
BY_NAME = {"weighted_loss": _weighted_loss, "sampled_pair": _sampled_pair}


def larger(case: Case, seed: int) -> Case:
    """The case's function and options, with inputs of this file."""
    build = BY_NAME.get(case.name) or BUILDERS[case.function]
    return replace(case, build=partial(build, seed))


def outcome(target: Target, case: Case, dtype: torch.dtype, layout: str) -> dict[str, Tensor]:
    """Results, gradients and written arguments of one call, by name, on the CPU."""
    arguments = case.arguments(dtype=dtype, device=target.device, requires_grad=False)
    arguments = pytree.tree_map_only(Tensor, partial(make_strided, layout=layout), arguments)
    leaves = [leaf.requires_grad_() for leaf in case.leaves(arguments)]
    out = tensors_of(case.function(**arguments, backend=target.backend))
    named = {f"result {i}": x for i, x in enumerate(out)}
    if leaves:
        directions = [random(*x.shape, seed=90 + i).to(x) for i, x in enumerate(out)]
        gradients = torch.autograd.grad(out, leaves, directions)
        named |= {f"gradient {i}": x for i, x in enumerate(gradients)}
    for name in case.written:
        named |= {f"{name}[{i}]": x for i, x in enumerate(tensors_of(arguments[name]))}
    return {name: x.detach().cpu() for name, x in named.items()}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@all_dtypes
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_backends_agree(case: Case, dtype: torch.dtype, layout: str) -> None:
    for seed in (0, 100):
        outcomes, reasons = {}, []
        for target in available_targets():
            try:
                outcomes[target] = outcome(target, larger(case, seed), dtype, layout)
            except mk.BackendUnavailable as reason:
                reasons.append(str(reason))
        if len(outcomes) < 2:
            pytest.skip(f"only the reference can run here; {'; '.join(reasons)}")
        for (one, first), (other, second) in itertools.combinations(outcomes.items(), 2):
            assert first.keys() == second.keys()
            for name, x in first.items():
                y, what = second[name], f"{name} of {one} beside {other}"
                assert x.dtype == y.dtype, what
                if x.is_floating_point():
                    assert_agrees(x, y, what)
                else:
                    assert torch.equal(x, y), what
