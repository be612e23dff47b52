"""What every Triton module needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from magsd_kernels import environment
from magsd_kernels._layout import is_channels_last

_AUTOTUNE = environment.on(environment.TRITON_AUTOTUNE)

_MOST_SIDE = 46340  # the largest number whose square 32 bits hold


def accumulation(dtype: torch.dtype) -> tl.dtype:
    """float64 for float64, float32 for the rest."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def tile(elements: int) -> int:
    """Elements of a tile on a GPU; more in Triton's interpreter, whose costs are by operation."""
    return 4 * elements if triton.knobs.runtime.interpret else elements


def block(size: int, most: int) -> int:
    """The smallest power of two that holds `size`, at most `most`."""
    return min(triton.next_power_of_2(max(size, 1)), most)


def offset_type(*maps: torch.Tensor, first: int = 0) -> tl.dtype:
    """int32 where it holds every offset along the axes from `first` on, else int64.

    It also holds the product of two sides, by which outputs find their inputs.
    """
    for tensor in maps:
        sizes, steps = tensor.shape[first:], tensor.stride()[first:]
        span = sum((size - 1) * step for size, step in zip(sizes, steps, strict=True))
        # A tile may reach past the end by its own size; what lies there is masked, not wrapped.
        if span >= 2**31 - 2**20 or max(tensor.shape[2:]) > _MOST_SIDE:
            return tl.int64
    return tl.int32


def pixel_steps(maps: torch.Tensor) -> tuple[int, int, int]:
    """Steps from image to image, map to map, pixel to pixel (counted row by row)."""
    return (maps.stride(0), maps.stride(1), maps.stride(3 if maps.shape[3] > 1 else 2))


def with_rows(maps: torch.Tensor) -> torch.Tensor:
    """The map itself where its pixels lie evenly, else a dense copy in its memory format."""
    _, _, height, width = maps.shape
    if height == 1 or width == 1 or maps.stride(2) == width * maps.stride(3):
        return maps
    last = is_channels_last(maps)
    return maps.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def with_warps(
    *counts: int, registers: int | None = None, **constants: object
) -> list[triton.Config]:
    """A configuration per number of warps, with the same constants.

    registers: how many a thread may have, where the compiler's own choice on NVIDIA is too few.
    """
    return [  # As many stages as the compiler chooses, 3 on NVIDIA and 2 on AMD.
        triton.Config(constants, num_warps=count, num_stages=None, maxnreg=registers)
        for count in counts
    ]


def _on_amd(config: triton.Config, most: int) -> triton.Config:
    """The configuration for AMD's warps of 64 threads, of which half as many do the work.

    At most `most` warps: a block of more leaves a thread too few registers. What loops over large
    tiles load ahead would wait in registers too: they have one of their STAGES.
    """
    constants = dict(config.kwargs)
    if "STAGES" in constants:
        constants["STAGES"] = 1
    return triton.Config(constants, min(max(config.num_warps // 2, 1), most), config.num_stages)


def _fitting(configs: list[triton.Config]) -> list[triton.Config]:
    """The configurations as the GPUs of this build of torch take them, each once."""
    if torch.version.hip:
        fitted = [_on_amd(config, max(configs[0].num_warps // 2, 4)) for config in configs]
    elif torch.version.xpu:  # A limit of registers is NVIDIA's.
        fitted = [triton.Config(c.kwargs, min(c.num_warps, 32), c.num_stages) for c in configs]
    else:
        return configs
    return list(dict.fromkeys(fitted))


Grid = tuple[int, ...] | Callable[[dict[str, Any]], tuple[int, ...]]


class Tunable:
    """A kernel that runs with the first of its configurations.

    It may be run several times in a row by who times it, so it adds nothing to what it is given.
    """

    def __init__(self, kernel: Any, configs: list[triton.Config], key: list[str]) -> None:
        self.kernel = kernel
        self.configs = configs
        self.key = key

    def __getitem__(self, grid: Grid) -> Callable[..., Any]:
        return self.configured(self.fitting()[0], grid)

    def configured(self, config: triton.Config, grid: Grid) -> Callable[..., Any]:
        """The launch of the grid with this configuration."""
        launch, settings = self.kernel[grid], config.all_kwargs()
        return lambda *arguments, **options: launch(*arguments, **settings, **options)

    def fitting(self) -> list[triton.Config]:
        """The configurations that this build's GPUs take."""
        return _fitting(self.configs)

    def tuned(self, do_bench: Callable[..., list[float]] | None = None) -> Any:
        """The kernel that times its configurations; `do_bench` stands in for a clock."""
        return triton.autotune(self.fitting(), self.key, do_bench=do_bench)(self.kernel)


def tunable(
    configs: list[triton.Config], key: list[str], autotune: bool = _AUTOTUNE
) -> Callable[[Any], Any]:
    """A kernel that runs with the first of a few configurations, or, tuned, with the fastest.

    Tuning is asked for by the environment variable. It times every configuration at the first call
    for each value of the arguments in `key` and their dtypes; that call cannot be captured in a
    CUDA graph. Triton's interpreter has nothing to time.
    """

    def wrap(kernel: Any) -> Any:
        choice = Tunable(kernel, configs, key)
        return choice.tuned() if autotune and not triton.knobs.runtime.interpret else choice

    return wrap
