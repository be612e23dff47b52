"""A valid call of every public function, at any size: what comparisons and tests run.

The values are like those in a network: maps are rectified and have a clear peak, features are
positive, so that no sum cancels. No pixel lies within rounding of its threshold at the sizes and
seeds that `magsd_kernels.compare` takes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import magsd_kernels as mk
from magsd_kernels import guided_views


@dataclass(frozen=True)
class Size:
    """Sizes of a call; every function takes those that it needs.

    Attributes:
        batch, maps, classes, draws: B, M, K of the loss, K of `sample_attention`.
        rows: batch of the loss; None means `batch`.
        image: (H, W) of the images, which have `planes` channels.
        low: (h, w) of the attention.
        features: (H, W) of the features, which have `channels` channels.
        scales, output: (h, w) of the maps of a multiscale attention, and of their sum; None means
            the size of the last.
    """

    batch: int = 2
    maps: int = 3
    classes: int = 4
    draws: int = 3
    rows: int | None = None
    image: tuple[int, int] = (11, 9)
    planes: int = 2
    low: tuple[int, int] = (4, 3)
    features: tuple[int, int] = (6, 7)
    channels: int = 5
    scales: tuple[tuple[int, int], ...] = ((9, 7), (5, 4), (3, 2))
    output: tuple[int, int] | None = (4, 3)


SMALL = Size()
#: Past the blocks by which kernels cut maps and channels, and no multiple of any.
UNEVEN = Size(
    batch=3,
    maps=33,
    classes=5,
    draws=64,
    rows=67,
    image=(45, 38),
    planes=3,
    low=(7, 6),
    features=(9, 8),
    channels=67,
    scales=((14, 13), (7, 6)),
    output=(9, 8),
)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normal numbers, the same for every backend."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def uniform(*shape: int, seed: int = 0, low: float = 0.0, high: float = 1.0) -> Tensor:
    """float32 uniforms in [low, high)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=generator) * (high - low) + low


def attention_maps(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rectified maps, as a network gives them, each with a clear peak."""
    maps = random(*shape, seed=seed).clamp_min(0.0)
    return (maps * maps + 0.01 * random(*shape, seed=seed + 1).abs()).to(dtype)


@dataclass
class Draw:
    """Random tensors, one after the other; on the meta device they have no values."""

    dtype: torch.dtype
    seed: int = 0
    device: str = "cpu"

    def _make(self, function: Callable[..., Tensor], shape: tuple[int, ...], **options: Any) -> Any:
        self.seed += 1
        if self.device == "meta":
            dtype = options.get("dtype", torch.float32)
            return torch.empty(shape, dtype=dtype, device="meta")
        return function(*shape, seed=self.seed, **options).to(self.device)

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """In the dtype of the activations, if no other is named."""
        made: Tensor = self._make(random, shape, dtype=dtype or self.dtype)
        return made

    def attention(self, *shape: int) -> Tensor:
        """See `attention_maps`."""
        made: Tensor = self._make(attention_maps, shape, dtype=self.dtype)
        return made

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """float32 in [low, high)."""
        made: Tensor = self._make(uniform, shape, low=low, high=high)
        return made

    def integers(self, count: int, step: int, below: int) -> Tensor:
        """(count,) int64: multiples of `step`, modulo `below`."""
        return torch.arange(count, device=self.device) * step % below

    def features(self, *shape: int) -> Tensor:
        """Positive numbers."""
        return self.normal(*shape).abs() + 0.1

    def index(self, batch: int, maps: int) -> Tensor:
        """(batch, 3) int64: the maps of three views."""
        return self.integers(3 * batch, 7, maps).view(batch, 3)

    def theta(self, batch: int) -> Tensor:
        """(batch, 3) float32: the thresholds of three views."""
        return self.uniform(batch, 3, low=0.2, high=0.6)


Arguments = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A public function, its keyword arguments, and which of them have gradients.

    Attributes:
        name: of the case.
        function: takes the arguments, the options and `backend`.
        build: makes the tensors and sizes among the arguments.
        differentiable: arguments that get a gradient.
        written: arguments that the call updates in place.
        options: the other arguments.
    """

    name: str
    function: Callable[..., Any]
    build: Callable[[Size, Draw], Arguments]
    differentiable: tuple[str, ...] = ()
    written: tuple[str, ...] = ()
    options: Arguments = field(default_factory=dict)

    def arguments(
        self,
        size: Size = SMALL,
        *,
        batch: int | None = None,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        requires_grad: bool = True,
    ) -> Arguments:
        """Fresh leaves on `device`; those that have gradients ask for them.

        batch: in place of the size's.
        """
        if batch is not None:
            size = replace(size, batch=batch)
        arguments = {**self.build(size, Draw(dtype, seed, device)), **self.options}
        for leaf in self.leaves(arguments) if requires_grad else ():
            leaf.requires_grad_()
        return arguments

    def leaves(self, arguments: Arguments) -> list[Tensor]:
        """The tensors among the arguments that have gradients."""
        return [leaf for name in self.differentiable for leaf in tensors_of(arguments[name])]


def tensors_of(tree: Any) -> list[Tensor]:
    """The tensors in nested lists, tuples and dicts."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _maps(size: Size, draw: Draw) -> list[Tensor]:
    return [2 * draw.normal(size.batch, size.maps, *scale) for scale in size.scales]


def _resample(size: Size, draw: Draw) -> Arguments:
    return {"maps": _maps(size, draw), "size": size.output}


def _multiscale(size: Size, draw: Draw) -> Arguments:
    # What layers have beside bfloat16 activations.
    dtype = torch.float32 if draw.dtype == torch.bfloat16 else draw.dtype

    def parameters() -> list[Tensor]:
        return [draw.normal(size.maps, dtype=dtype) for _ in size.scales]

    return {
        "projections": _maps(size, draw),
        "weights": parameters(),
        "biases": parameters(),
        "running_means": parameters(),
        "running_vars": [x.abs() + 0.5 for x in parameters()],
        "size": size.output,
    }


def _norm(size: Size, draw: Draw) -> Arguments:
    # What layers have beside bfloat16 activations.
    dtype = torch.float32 if draw.dtype == torch.bfloat16 else draw.dtype

    def parameter() -> Tensor:
        return draw.normal(size.channels, dtype=dtype)

    return {
        "x": 2 * draw.normal(size.batch, size.channels, *size.features),
        "weight": parameter(),
        "bias": parameter(),
        "running_mean": parameter(),
        "running_var": parameter().abs() + 0.5,
        "groups": next((n for n in range(2, size.batch + 1) if size.batch % n == 0), 1),
    }


def _norm_residual(size: Size, draw: Draw) -> Arguments:
    arguments = _norm(size, draw)
    return arguments | {"residual": draw.normal(*arguments["x"].shape)}


def _pool(size: Size, draw: Draw) -> Arguments:
    return {
        "features": draw.features(size.batch, size.channels, *size.features),
        "attention": draw.attention(size.batch, size.maps, *size.features),
    }


def _pool_resized(size: Size, draw: Draw) -> Arguments:
    return _pool(size, draw) | {"attention": draw.attention(size.batch, size.maps, *size.low)}


def _sample(size: Size, draw: Draw) -> Arguments:
    return {
        "attention": draw.attention(size.batch, size.maps, *size.low),
        "uniforms": draw.uniform(size.batch, size.draws),
    }


def _views(size: Size, draw: Draw) -> Arguments:
    return {
        "images": draw.normal(size.batch, size.planes, *size.image),
        "attention": draw.attention(size.batch, size.maps, *size.low),
        "theta": draw.theta(size.batch),
        "index": draw.index(size.batch, size.maps),
        "offsets": draw.uniform(size.batch, 2),
    }


def _patch(size: Size, draw: Draw) -> Arguments:
    arguments = _views(size, draw)
    return arguments | {name: arguments[name][:, 1].contiguous() for name in ("theta", "index")}


def _view(size: Size, draw: Draw) -> Arguments:
    arguments = _patch(size, draw)
    del arguments["offsets"]
    return arguments


def _boxes(size: Size, draw: Draw) -> Arguments:
    arguments = _view(size, draw) | {"size": size.image}
    del arguments["images"]
    return arguments


def _sampled(size: Size, draw: Draw) -> Arguments:
    arguments = _views(size, draw) | {"uniforms": draw.uniform(size.batch, 3)}
    del arguments["index"]
    return arguments


def _sampled_pair(size: Size, draw: Draw) -> Arguments:
    arguments = _sampled(size, draw)
    del arguments["offsets"]
    return arguments | {name: arguments[name][:, :2] for name in ("theta", "uniforms")}


def _loss(size: Size, draw: Draw) -> Arguments:
    batch = size.batch if size.rows is None else size.rows
    logits, *views = (draw.normal(batch, size.classes) for _ in range(4))
    return {
        "logits": 2 * logits,
        "view_logits": views,
        "targets": draw.integers(batch, 1, size.classes),
    }


def _weighted_loss(size: Size, draw: Draw) -> Arguments:
    arguments = _loss(size, draw)
    weights = torch.linspace(0.5, 2.0, size.classes, dtype=torch.float32, device=draw.device)
    stacked = torch.stack(arguments["view_logits"])
    return arguments | {"view_logits": stacked, "class_weights": weights.to(draw.dtype)}


@functools.wraps(guided_views.sampled_views)
def sampled_views(*arguments: Any, **options: Any) -> Tensor:
    """The views alone, as `AttentionViews` returns them; it is what calls the function."""
    return guided_views.sampled_views(*arguments, **options)[0]


def _cases() -> tuple[Case, ...]:
    resample, multiscale = mk.resample_attention, mk.multiscale_attention
    pool, loss = mk.bilinear_attention_pool, mk.soft_distance_loss
    norm, normed = mk.batch_norm_act, ("x", "weight", "bias")
    maps, images, both = ("maps",), ("images",), ("features", "attention")
    affine, running = ("projections", "weights", "biases"), ("running_means", "running_vars")
    statistics = ("running_mean", "running_var")
    logits = ("logits", "view_logits")
    return (
        *(
            Case(f"resample_{mode}", resample, _resample, maps, options={"mode": mode})
            for mode in ("area", "bilinear", "nearest")
        ),
        Case(
            "multiscale_train", multiscale, _multiscale, affine, running, options={"training": True}
        ),
        Case("multiscale_eval", multiscale, _multiscale, affine, options={"training": False}),
        Case("pool_avg", pool, _pool_resized, both),
        Case("pool_max", pool, _pool_resized, both, options={"pool": "max"}),
        Case("pool_same_size", pool, _pool, both),
        Case("sample", mk.sample_attention, _sample),
        Case("boxes", mk.attention_boxes, _boxes),
        Case("crop", mk.attention_crop, _view, images),
        Case("mixup", mk.attention_mixup, _view, images),
        Case("patch", mk.attention_patch, _patch, images),
        Case("dim", mk.attention_dim, _view, images),
        Case("drop", mk.attention_drop, _view, images),
        Case("views", mk.attention_views, _views, images),
        Case("sampled_views", sampled_views, _sampled, images),
        Case("sampled_pair", sampled_views, _sampled_pair, images),
        Case("loss", loss, _loss, logits),
        Case("weighted_loss", loss, _weighted_loss, logits),
        Case("norm_train", norm, _norm, normed, statistics, options={"training": True}),
        *(
            Case(
                f"norm_residual_{act}",
                norm,
                _norm_residual,
                (*normed, "residual"),
                statistics,
                options={"training": True, "act": act},
            )
            for act in ("relu", "silu", "none")
        ),
        Case("norm_eval", norm, _norm, normed, options={"training": False, "act": "silu"}),
    )


CASES = _cases()
