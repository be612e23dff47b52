"""Strategies for the sweeps: the package's cases at drawn sizes, with drawn values and options.

A test that fails prints what it drew. All shrinks to the smallest sizes, the first fill, seed 0 and
contiguous memory.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils import _pytree as pytree

from magsd_kernels.cases import Arguments, Case, Draw, Size, tensors_of

from .cases import BY_NAME
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
SIGNED = ("signed", "steps", "zero", "constant", "negative", "positive", "small")
RECTIFIED = ("rectified", "steps", "zero", "constant", "positive", "small")
ATTENTION = (*RECTIFIED, "signed", "negative", *NOT_FINITE)
#: Many products of these are equal, in every arithmetic.
TIED = ("steps", "zero", "constant")

dtypes = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])
layouts = st.sampled_from(LAYOUTS)
shuffles = st.randoms(use_true_random=False)
fractions = st.floats(0, 1, width=32)
uniforms = st.floats(0, 1, width=32, exclude_max=True) | st.sampled_from([0.25, 0.5])
_sides = st.integers(1, 9) | st.integers(10, 37)
_low_sides = st.integers(1, 7) | st.integers(8, 15)
_low_sizes = st.tuples(_low_sides, _low_sides)
#: Attention maps and channels: few, or past the blocks of 16, 32 and 64 by which kernels cut them.
_channels = st.integers(1, 5) | st.sampled_from([17, 65, 70])
sizes = st.builds(
    Size,
    batch=st.integers(0, 5),
    maps=st.integers(1, 5) | st.sampled_from([31, 33, 40]),
    classes=st.integers(1, 6) | st.just(101),
    draws=st.integers(0, 4),
    rows=st.integers(1, 5) | st.just(67),
    image=st.tuples(_sides, _sides),
    planes=_channels,
    low=_low_sizes,
    features=_low_sizes,
    channels=_channels,
    scales=st.lists(_low_sizes, min_size=1, max_size=3).map(tuple),
    output=st.none() | st.tuples(_sides, _sides),
)

#: Of every optional argument that is no tensor or size.
OPTIONS: dict[str, st.SearchStrategy[Any]] = {
    "act": st.sampled_from(["relu", "silu", "none"]),
    "align_corners": st.booleans(),
    "class_weights": st.none(),
    "confidence": st.sampled_from([0.7, 0.0, 0.3, 1.0]),
    "floor": st.sampled_from([0.001, 0.0, 1.0]),
    "mode": st.sampled_from(MODES),
    "momentum": st.sampled_from([0.1, 0.0, 0.75]),
    "normalize": st.booleans(),
    "padding": st.sampled_from([0.1, 0.0, 0.37, 3.0, 1e300]) | st.floats(0, 1),
    "pool": st.sampled_from(["avg", "max"]),
    "residual": st.none(),
    "scale": st.sampled_from([1.0, 100.0, -0.5, 0.0]),
    "signed_sqrt": st.booleans(),
    "smoothing": st.sampled_from([0.01, 0.0, 0.2]),
    "training": st.booleans(),
    "weight": st.sampled_from([0.4, 0.0, 1.0]) | fractions,
}
EPS = {
    "batch_norm_act": st.sampled_from([1e-5, 1e-3, 0.5]),
    "multiscale_attention": st.sampled_from([1e-3, 1e-5, 0.5]),
    "bilinear_attention_pool": st.sampled_from([1e-12, 0.0, 0.01]),
    "sample_attention": st.sampled_from([1e-12, 0.0, 1.0]),
}


class Drawn(Draw):
    """What `cases` fills arguments with, of values that hypothesis chooses; `log` tells them."""

    def __init__(self, draw: st.DrawFn, fills: Sequence[str], attention: Sequence[str]) -> None:
        super().__init__(draw(dtypes))
        self.draw = draw
        self.fills, self.attention_fill = fills, draw(st.sampled_from(attention))
        self.attention_dtype = self.dtype
        self.wide_parameters = draw(st.booleans())
        self.filled_with: set[str] = set()
        self.log: list[str] = []

    def filled(self, shape: tuple[int, ...], fill: str, dtype: torch.dtype) -> Tensor:
        """A fill of NOT_FINITE has one such entry."""
        seed = self.draw(st.integers(0, 99))
        self.filled_with.add(fill)
        self.log.append(f"{fill}{shape} of seed {seed}, {dtype}")
        values = random(*shape, seed=seed)
        if fill in FILLS:
            values = FILLS[fill](values)
        elif values.numel():
            values.view(-1)[seed * 7 % values.numel()] = NOT_FINITE[fill]
        return values.to(dtype)

    def chosen(
        self, shape: tuple[int, ...], entries: st.SearchStrategy[Any], dtype: torch.dtype
    ) -> Tensor:
        """Every entry on its own."""
        count = math.prod(shape)
        values = self.draw(st.lists(entries, min_size=count, max_size=count))
        self.log.append(f"{values}")
        return torch.tensor(values, dtype=dtype).reshape(shape)

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        if len(shape) == 1:  # parameters
            wide = dtype if self.wide_parameters else None
            return self.filled(shape, "signed", wide or self.dtype)
        return self.filled(shape, self.draw(st.sampled_from(self.fills)), self.dtype)

    def features(self, *shape: int) -> Tensor:
        return self.normal(*shape)

    def attention(self, *shape: int) -> Tensor:
        return self.filled(shape, self.attention_fill, self.attention_dtype)

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return self.chosen(shape, uniforms, torch.float32) * (high - low) + low

    def theta(self, batch: int) -> Tensor:
        # A threshold of 0 leaves no margin to rounding, which decides where U crosses it among
        # values of both signs: it is for maps without.
        special = [0.5, 1.0, 1.5, math.nan]
        if self.attention_fill not in ("steps", "signed", "small", *NOT_FINITE):
            special.append(0.0)
        thresholds = st.floats(0.125, 1, width=32) | st.sampled_from(special)
        return self.chosen((batch, 3), thresholds, torch.float32)

    def index(self, batch: int, maps: int) -> Tensor:
        # One outside the maps counts as the nearest one inside.
        outside = st.sampled_from([-(2**40), -1, maps, 2**40])
        return self.chosen((batch, 3), st.integers(0, maps - 1) | outside, torch.int64)

    def integers(self, count: int, step: int, below: int) -> Tensor:
        few = self.draw(st.lists(st.integers(0, below - 1), min_size=1, max_size=5))
        self.log.append(f"{few}")
        return torch.tensor(few).repeat(count)[:count]


@dataclass(frozen=True)
class Call:
    """A call of a case's function; the tensors are contiguous and on the CPU."""

    case: Case
    size: Size
    arguments: Arguments
    layouts: list[str]
    fills: set[str]
    log: list[str]

    def __repr__(self) -> str:
        options = {k: v for k, v in self.arguments.items() if not tensors_of(v)}
        return f"{self.case.name}: {'; '.join(self.log)}; {self.layouts}; {options}"

    def on(self, device: str) -> Arguments:
        """Fresh arguments in their strides."""
        layouts = iter(self.layouts)
        return pytree.tree_map_only(
            Tensor,
            lambda x: make_strided(x.to(device, copy=True), next(layouts)),
            self.arguments,
        )

    def leaves(self, device: str) -> list[Tensor]:
        """The arguments that have gradients."""
        return self.case.leaves(self.on(device))

    def taking(
        self, leaves: Iterable[Tensor], device: str = "cpu", wide: bool = False
    ) -> Arguments:
        """Arguments with others in place of those that have gradients; `wide` makes all float64."""
        arguments, others = self.on(device), iter(leaves)
        if wide:
            arguments = pytree.tree_map_only(Tensor, widened, arguments)
        for name in self.case.differentiable:
            arguments[name] = pytree.tree_map_only(Tensor, lambda _: next(others), arguments[name])
        return arguments


def widened(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


@st.composite
def calls(
    draw: st.DrawFn,
    name: str,
    fills: Sequence[str] = SIGNED,
    attention: Sequence[str] = ATTENTION,
    same: bool = False,
    **fixed: Any,
) -> Call:
    """Of a case by name.

    Args:
        fills, attention: of what `cases` draws as normal numbers and features, and as attention.
        same: maps of the size of features or images, as every second time anyhow.
        fixed: arguments that are not drawn.
    """
    case = BY_NAME[name]
    parameters = inspect.signature(case.function).parameters
    guided = "theta" in parameters
    values = Drawn(draw, fills, attention)
    size = draw(sizes)
    if case.function.__name__ == "bilinear_attention_pool":
        size = replace(size, batch=max(size.batch, 1))
    if same or draw(st.booleans()):
        size = replace(size, low=size.image if guided else size.features)
    if guided:
        values.attention_dtype = draw(st.just(values.dtype) | dtypes)
    arguments = case.build(size, values)
    if guided and size.maps == 1 and parameters["index"].default is None:
        arguments["index"] = draw(st.sampled_from([None, arguments["index"]]))
    for option, parameter in parameters.items():
        given = option in arguments or option == "backend"
        if option in case.options or (parameter.default is not parameter.empty and not given):
            strategy = EPS[case.function.__name__] if option == "eps" else OPTIONS[option]
            arguments[option] = draw(strategy)
    if "groups" in arguments:
        batch = size.batch or 4  # Of nothing, any number.
        arguments["groups"] = draw(st.sampled_from([n for n in range(1, 6) if batch % n == 0]))
    arguments |= fixed
    strides = [draw(layouts) for _ in tensors_of(arguments)]
    return Call(case, size, arguments, strides, values.filled_with, values.log)


@st.composite
def losses(draw: st.DrawFn, fills: Sequence[str] = SIGNED) -> Call:
    """Of soft_distance_loss: one to four views, in a list or stacked; class weights or none."""
    call = draw(calls("loss", fills))
    arguments, classes = call.arguments, call.size.classes
    views = (2 * arguments["view_logits"])[: draw(st.integers(1, 4))]
    arguments["view_logits"] = views if draw(st.booleans()) else torch.stack(views)
    weight = st.sampled_from([1.0, 0.5, 2.0, 0.0])
    weights = draw(st.none() | st.lists(weight, min_size=classes, max_size=classes))
    if weights is not None:
        dtype = draw(st.sampled_from([torch.float32, views[0].dtype]))
        arguments["class_weights"] = torch.tensor(weights, dtype=dtype)
    return replace(call, layouts=[draw(layouts) for _ in tensors_of(arguments)])
