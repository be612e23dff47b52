"""Strategies for the sweeps: calls described by a few numbers and words.

A test that fails prints the description it drew, so that it holds no tensors: `Floats` names a
shape, a fill, a seed and strides, short lists stand as they are. All shrink to the smallest shape,
the first fill, seed 0 and contiguous memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

from .support import LAYOUTS, examples, make_strided, random

#: The same examples in every run, few enough for every push.
SWEEP = settings(
    examples(25),
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)

FILLS: dict[str, Callable[[Tensor], Tensor]] = {
    "zero": torch.zeros_like,
    "constant": lambda x: torch.full_like(x, 0.3),
    "steps": lambda x: (2 * x).round() / 2,
    "signed": lambda x: x,
    "negative": lambda x: -x.abs() - 0.1,
    "positive": lambda x: x.abs() + 0.1,
    "rectified": lambda x: x.clamp_min(0).square(),
    "small": lambda x: 1e-3 * x,
}
MODES = ("area", "bilinear", "nearest")
NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


@dataclass(frozen=True)
class Floats:
    """A floating tensor, to be built in any dtype; a fill of NOT_FINITE has one such entry."""

    shape: tuple[int, ...]
    fill: str = "signed"
    seed: int = 0
    layout: str = "contiguous"

    def build(self, dtype: torch.dtype, device: str = "cpu") -> Tensor:
        values = random(*self.shape, seed=self.seed)
        if self.fill in FILLS:
            values = FILLS[self.fill](values)
        elif values.numel():
            values.view(-1)[self.seed * 7 % values.numel()] = NOT_FINITE[self.fill]
        return make_strided(values.to(device, dtype), self.layout)


dtypes = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])
seeds = st.integers(0, 99)
layouts = st.sampled_from(LAYOUTS)
batches = st.integers(1, 5)
sides = st.integers(1, 9) | st.integers(10, 37)
low_sides = st.integers(1, 7) | st.integers(8, 15)
#: Attention maps and channels: few, or past the blocks of 16, 32 and 64 by which kernels cut them.
maps = st.integers(1, 5) | st.sampled_from([31, 33, 40])
channels = st.integers(1, 5) | st.sampled_from([17, 65, 70])
SIGNED = ("signed", "steps", "zero", "constant", "negative", "positive", "small")
RECTIFIED = ("rectified", "steps", "zero", "constant", "positive", "small")
#: Many products of these are equal, in every arithmetic.
TIED = ("steps", "zero", "constant")
fractions = st.floats(0, 1, width=32)
uniforms = st.floats(0, 1, width=32, exclude_max=True)
corners = st.booleans()
shuffles = st.randoms(use_true_random=False)


def floats(shape: Sequence[int], fills: Sequence[str] = SIGNED) -> st.SearchStrategy[Floats]:
    return st.builds(Floats, st.just(tuple(shape)), st.sampled_from(fills), seeds, layouts)


def rows(batch: int, *entries: st.SearchStrategy[Any]) -> st.SearchStrategy[list[Any]]:
    """One tuple of `entries`, or the one entry alone, per image."""
    row = entries[0] if len(entries) == 1 else st.tuples(*entries)
    return st.lists(row, min_size=batch, max_size=batch)


def as_tensor(values: Sequence[Any], *trailing: int, dtype: torch.dtype) -> Tensor:
    """Rows as a tensor; `trailing` are the sizes behind the batch, which no rows would hide."""
    return torch.tensor(values, dtype=dtype).reshape(len(values), *trailing)


@dataclass(frozen=True)
class Resample:
    """A call of resample_attention."""

    maps: tuple[Floats, ...]
    dtype: torch.dtype
    size: tuple[int, int] | None
    mode: str
    align_corners: bool

    @property
    def options(self) -> dict[str, Any]:
        return {"size": self.size, "mode": self.mode, "align_corners": self.align_corners}


@dataclass(frozen=True)
class Multiscale(Resample):
    """A call of multiscale_attention; `seed` gives weights, biases and running statistics."""

    seed: int
    training: bool
    eps: float
    momentum: float
    wide_parameters: bool

    @property
    def parameter_dtype(self) -> torch.dtype:
        """float32 beside bfloat16 where the contract allows it."""
        wide = self.wide_parameters and self.dtype == torch.bfloat16
        return torch.float32 if wide else self.dtype

    def parameters(self, device: str = "cpu") -> list[list[Tensor]]:
        """Weights, biases, running means and variances, one of each a scale."""
        count, scales = self.maps[0].shape[1], range(len(self.maps))
        groups = [
            [random(count, seed=self.seed + 10 * group + i) for i in scales] for group in range(4)
        ]
        groups[3] = [x.abs() + 0.5 for x in groups[3]]
        return [[x.to(device, self.parameter_dtype) for x in group] for group in groups]

    @property
    def options(self) -> dict[str, Any]:
        return {**super().options, "training": self.training, "eps": self.eps}


@st.composite
def resamples(draw: st.DrawFn, fills: Sequence[str] = SIGNED) -> Resample:
    return Resample(**_resampling(draw, fills))


@st.composite
def multiscales(draw: st.DrawFn, fills: Sequence[str] = SIGNED) -> Multiscale:
    return Multiscale(
        **_resampling(draw, fills),
        seed=draw(seeds),
        training=draw(st.booleans()),
        eps=draw(st.sampled_from([1e-3, 1e-5, 0.5])),
        momentum=draw(st.sampled_from([0.1, 0.0, 0.75])),
        wide_parameters=draw(st.booleans()),
    )


def _resampling(draw: st.DrawFn, fills: Sequence[str]) -> dict[str, Any]:
    batch, count = draw(st.integers(0, 5)), draw(maps)
    sizes = draw(st.lists(st.tuples(low_sides, low_sides), min_size=1, max_size=3))
    return {
        "maps": tuple(draw(floats((batch, count, *size), fills)) for size in sizes),
        "dtype": draw(dtypes),
        "size": draw(st.none() | st.tuples(sides, sides)),
        "mode": draw(st.sampled_from(MODES)),
        "align_corners": draw(corners),
    }


@dataclass(frozen=True)
class Pool:
    """A call of bilinear_attention_pool."""

    features: Floats
    attention: Floats
    dtype: torch.dtype
    pool: str
    signed_sqrt: bool
    normalize: bool
    scale: float
    eps: float

    @property
    def options(self) -> dict[str, Any]:
        names = ("pool", "signed_sqrt", "normalize", "scale", "eps")
        return {name: getattr(self, name) for name in names}


@st.composite
def pools(
    draw: st.DrawFn,
    fills: Sequence[str] = SIGNED,
    attention: Sequence[str] = RECTIFIED,
    same: bool = False,
) -> Pool:
    """`same`: maps and features of one size, as every second time anyhow."""
    batch, size = draw(batches), draw(st.tuples(low_sides, low_sides))
    low = size if same or draw(st.booleans()) else draw(st.tuples(low_sides, low_sides))
    return Pool(
        features=draw(floats((batch, draw(channels), *size), fills)),
        attention=draw(floats((batch, draw(maps), *low), attention)),
        dtype=draw(dtypes),
        pool=draw(st.sampled_from(["avg", "max"])),
        signed_sqrt=draw(st.booleans()),
        normalize=draw(st.booleans()),
        scale=draw(st.sampled_from([1.0, 100.0, -0.5, 0.0])),
        eps=draw(st.sampled_from([1e-12, 0.0, 0.01])),
    )


@dataclass(frozen=True)
class Sample:
    """A call of sample_attention."""

    attention: Floats
    dtype: torch.dtype
    uniforms: list[list[float]]
    draws: int
    eps: float

    def arguments(self, device: str = "cpu") -> dict[str, Any]:
        uniforms = as_tensor(self.uniforms, self.draws, dtype=torch.float32)
        attention = self.attention.build(self.dtype, device)
        return {"attention": attention, "uniforms": uniforms.to(device), "eps": self.eps}


@st.composite
def samples(draw: st.DrawFn) -> Sample:
    batch, draws = draw(st.integers(0, 5)), draw(st.integers(0, 4))
    shape = (batch, draw(maps), draw(low_sides), draw(low_sides))
    row = st.lists(uniforms | st.sampled_from([0.25, 0.5]), min_size=draws, max_size=draws)
    return Sample(
        attention=draw(floats(shape, (*RECTIFIED, "signed", "negative", *NOT_FINITE))),
        dtype=draw(dtypes),
        uniforms=draw(rows(batch, row)),
        draws=draws,
        eps=draw(st.sampled_from([1e-12, 0.0, 1.0])),
    )


@dataclass(frozen=True)
class Views:
    """Images and the guides of three views, the first of which serves the single operations."""

    images: Floats
    attention: Floats
    dtype: torch.dtype
    attention_dtype: torch.dtype
    index: list[tuple[int, int, int]]
    theta: list[tuple[float, float, float]]
    offsets: list[tuple[float, float]]
    padding: float
    weight: float
    floor: float
    align_corners: bool

    @property
    def size(self) -> tuple[int, int]:
        return self.images.shape[-2:]

    def guide(self, device: str = "cpu") -> dict[str, Tensor]:
        """Attention, index (B, 3), theta (B, 3) and offsets (B, 2)."""
        return {
            "attention": self.attention.build(self.attention_dtype, device),
            "index": as_tensor(self.index, 3, dtype=torch.int64).to(device),
            "theta": as_tensor(self.theta, 3, dtype=torch.float32).to(device),
            "offsets": as_tensor(self.offsets, 2, dtype=torch.float32).to(device),
        }

    def single(self, device: str = "cpu", view: int = 0) -> dict[str, Any]:
        """Attention, index and theta (B,) of one view, and align_corners."""
        guide = self.guide(device)
        one_map = self.attention.shape[1] == 1
        return {
            "attention": guide["attention"],
            "index": None if one_map else guide["index"][:, view],
            "theta": guide["theta"][:, view],
            "align_corners": self.align_corners,
        }


ATTENTION = (*RECTIFIED, "signed", "negative", *NOT_FINITE)


@st.composite
def views(
    draw: st.DrawFn, images: Sequence[str] = SIGNED, attention: Sequence[str] = ATTENTION
) -> Views:
    batch, count = draw(st.integers(0, 5)), draw(maps)
    size = draw(st.tuples(sides, sides))
    low = draw(st.tuples(low_sides, low_sides) | st.just(size))
    # An index outside the maps counts as the nearest one inside.
    index = st.integers(0, count - 1) | st.sampled_from([-(2**40), -1, count, 2**40])
    # A threshold of 0 leaves no margin to rounding, which decides where U crosses it among values
    # of both signs: it is for maps without.
    dtype, fill = draw(dtypes), draw(st.sampled_from(attention))
    special = [0.5, 1.0, 1.5, math.nan]
    if fill not in ("steps", "signed", "small", *NOT_FINITE):
        special.append(0.0)
    theta = st.floats(0.125, 1, width=32) | st.sampled_from(special)
    return Views(
        images=draw(floats((batch, draw(channels), *size), images)),
        attention=draw(floats((batch, count, *low), (fill,))),
        dtype=dtype,
        attention_dtype=draw(st.just(dtype) | dtypes),
        index=draw(rows(batch, index, index, index)),
        theta=draw(rows(batch, theta, theta, theta)),
        offsets=draw(rows(batch, uniforms, uniforms)),
        padding=draw(st.sampled_from([0.1, 0.0, 0.37, 3.0, 1e300]) | st.floats(0, 1)),
        weight=draw(st.sampled_from([0.4, 0.0, 1.0]) | fractions),
        floor=draw(st.sampled_from([0.001, 0.0, 1.0])),
        align_corners=draw(corners),
    )


@dataclass(frozen=True)
class Loss:
    """A call of soft_distance_loss; `targets` repeat over the batch."""

    logits: Floats
    views: Floats
    dtype: torch.dtype
    targets: list[int]
    class_weights: list[float] | None
    wide_weights: bool
    confidence: float
    smoothing: float
    as_list: bool

    def fixed(self, device: str = "cpu") -> dict[str, Any]:
        """Every argument but the logits."""
        batch = self.logits.shape[0]
        weights = None
        if self.class_weights is not None:
            dtype = torch.float32 if self.wide_weights else self.dtype
            weights = torch.tensor(self.class_weights, dtype=dtype, device=device)
        return {
            "targets": torch.tensor(self.targets, device=device).repeat(batch)[:batch],
            "class_weights": weights,
            "confidence": self.confidence,
            "smoothing": self.smoothing,
        }


@st.composite
def losses(draw: st.DrawFn, fills: Sequence[str] = SIGNED) -> Loss:
    batch, classes = draw(batches | st.just(67)), draw(st.integers(1, 6) | st.just(101))
    weight = st.sampled_from([1.0, 0.5, 2.0, 0.0])
    return Loss(
        logits=draw(floats((batch, classes), fills)),
        views=draw(floats((draw(st.integers(1, 4)), batch, classes), fills)),
        dtype=draw(dtypes),
        targets=draw(st.lists(st.integers(0, classes - 1), min_size=1, max_size=5)),
        class_weights=draw(st.none() | st.lists(weight, min_size=classes, max_size=classes)),
        wide_weights=draw(st.booleans()),
        confidence=draw(st.sampled_from([0.7, 0.0, 0.3, 1.0])),
        smoothing=draw(st.sampled_from([0.01, 0.0, 0.2])),
        as_list=draw(st.booleans()),
    )
