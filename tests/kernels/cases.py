"""One valid call of every public function, for tests that hold for all of them alike."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import magsd_kernels as mk
from magsd_kernels import guided_views

from .support import attention_maps, random, tensors_of, uniform


@dataclass(frozen=True)
class Case:
    """A public function, its keyword arguments, and which of them have gradients."""

    name: str
    function: Callable[..., Any]
    build: Callable[[int, torch.dtype], dict[str, Any]]
    differentiable: tuple[str, ...] = ()
    written: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)

    def arguments(
        self,
        batch: int = 2,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        requires_grad: bool = True,
    ) -> dict[str, Any]:
        """Fresh leaves on `device`; floating inputs that have gradients ask for them."""
        arguments = {**self.build(batch, dtype), **self.options}
        arguments = pytree.tree_map_only(Tensor, lambda x: x.clone().to(device), arguments)
        if requires_grad:
            for name in self.differentiable:
                for leaf in tensors_of(arguments[name]):
                    leaf.requires_grad_()
        return arguments

    def leaves(self, arguments: dict[str, Any]) -> list[Tensor]:
        return [leaf for name in self.differentiable for leaf in tensors_of(arguments[name])]


def _resample(batch: int, dtype: torch.dtype) -> dict[str, Any]:
    sizes = ((9, 7), (5, 4), (3, 2))
    maps = [random(batch, 3, *s, seed=i, dtype=dtype) for i, s in enumerate(sizes)]
    return {"maps": maps, "size": (4, 3)}


def _multiscale(batch: int, dtype: torch.dtype) -> dict[str, Any]:
    sizes = ((9, 7), (5, 4))
    return {
        "projections": [random(batch, 3, *s, seed=i, dtype=dtype) for i, s in enumerate(sizes)],
        "weights": [random(3, seed=10 + i, dtype=dtype) for i in range(2)],
        "biases": [random(3, seed=20 + i, dtype=dtype) for i in range(2)],
        "running_means": [0.1 * random(3, seed=30 + i, dtype=dtype) for i in range(2)],
        "running_vars": [random(3, seed=40 + i, dtype=dtype).abs() + 0.5 for i in range(2)],
    }


def _pool(batch: int, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "features": random(batch, 5, 6, 7, seed=1, dtype=dtype),
        "attention": attention_maps(batch, 3, 4, 3, seed=2, dtype=dtype),
    }


def _sampling(batch: int, dtype: torch.dtype) -> dict[str, Any]:
    maps = attention_maps(batch, 5, 4, 3, seed=3, dtype=dtype)
    return {"attention": maps, "uniforms": uniform(batch, 3, seed=4)}


def _guide(batch: int, dtype: torch.dtype) -> dict[str, Any]:
    index = torch.arange(batch) % 3
    return {
        "attention": attention_maps(batch, 3, 4, 3, seed=5, dtype=dtype),
        "theta": uniform(batch, seed=6, low=0.3, high=0.6),
        "index": index,
    }


def _boxes(batch: int, dtype: torch.dtype) -> dict[str, Any]:
    return {**_guide(batch, dtype), "size": (11, 9)}


def _view(batch: int, dtype: torch.dtype) -> dict[str, Any]:
    return {"images": random(batch, 2, 11, 9, seed=7, dtype=dtype), **_guide(batch, dtype)}


def _patch(batch: int, dtype: torch.dtype) -> dict[str, Any]:
    return {**_view(batch, dtype), "offsets": uniform(batch, 2, seed=8)}


def _views(batch: int, dtype: torch.dtype) -> dict[str, Any]:
    return {
        **_patch(batch, dtype),
        "theta": uniform(batch, 3, seed=9, low=0.3, high=0.6),
        "index": torch.arange(3 * batch).reshape(batch, 3) % 3,
    }


@functools.wraps(guided_views.sampled_views)
def sampled_views(*arguments: Any, **options: Any) -> Tensor:
    """The views alone, as `AttentionViews` returns them; it is what calls the function."""
    return guided_views.sampled_views(*arguments, **options)[0]


def _sampled(batch: int, dtype: torch.dtype) -> dict[str, Any]:
    arguments = {**_views(batch, dtype), "uniforms": uniform(batch, 3, seed=10)}
    del arguments["index"]
    return arguments


def _sampled_pair(batch: int, dtype: torch.dtype) -> dict[str, Any]:
    arguments = _sampled(batch, dtype)
    del arguments["offsets"]
    return arguments | {name: arguments[name][:, :2] for name in ("theta", "uniforms")}


def _loss(batch: int, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "logits": 2 * random(batch, 4, seed=11, dtype=dtype),
        "view_logits": random(3, batch, 4, seed=12, dtype=dtype),
        "targets": torch.arange(batch) % 4,
    }


def _weighted_loss(batch: int, dtype: torch.dtype) -> dict[str, Any]:
    return {**_loss(batch, dtype), "class_weights": torch.tensor([0.5, 1.0, 2.0, 1.5], dtype=dtype)}


_AFFINE = ("projections", "weights", "biases")
_RUNNING = ("running_means", "running_vars")
_BOTH = ("features", "attention")
_LOGITS = ("logits", "view_logits")

CASES = (
    Case("resample_area", mk.resample_attention, _resample, ("maps",)),
    Case(
        "resample_bilinear",
        mk.resample_attention,
        _resample,
        ("maps",),
        options={"mode": "bilinear"},
    ),
    Case(
        "resample_nearest", mk.resample_attention, _resample, ("maps",), options={"mode": "nearest"}
    ),
    Case(
        "multiscale_train",
        mk.multiscale_attention,
        _multiscale,
        _AFFINE,
        _RUNNING,
        options={"training": True},
    ),
    Case(
        "multiscale_eval",
        mk.multiscale_attention,
        _multiscale,
        _AFFINE,
        options={"training": False},
    ),
    Case("pool_avg", mk.bilinear_attention_pool, _pool, _BOTH),
    Case("pool_max", mk.bilinear_attention_pool, _pool, _BOTH, options={"pool": "max"}),
    Case("sample", mk.sample_attention, _sampling),
    Case("boxes", mk.attention_boxes, _boxes),
    Case("crop", mk.attention_crop, _view, ("images",)),
    Case("mixup", mk.attention_mixup, _view, ("images",)),
    Case("patch", mk.attention_patch, _patch, ("images",)),
    Case("dim", mk.attention_dim, _view, ("images",)),
    Case("drop", mk.attention_drop, _view, ("images",)),
    Case("views", mk.attention_views, _views, ("images",)),
    Case("sampled_views", sampled_views, _sampled, ("images",)),
    Case("sampled_pair", sampled_views, _sampled_pair, ("images",)),
    Case("loss", mk.soft_distance_loss, _loss, _LOGITS),
    Case("weighted_loss", mk.soft_distance_loss, _weighted_loss, _LOGITS),
)

all_cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
differentiable_cases = pytest.mark.parametrize(
    "case", [case for case in CASES if case.differentiable], ids=lambda case: case.name
)
