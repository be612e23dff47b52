"""Targets, inputs and comparisons that every test of an operation uses."""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from torch import Tensor

import magsd_kernels
from magsd_kernels import environment, native
from magsd_kernels.cases import attention_maps, random, tensors_of, uniform  # noqa: F401
from magsd_kernels.compare import difference, error_bound, runnable  # noqa: F401

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LAYOUTS = ("contiguous", "channels_last", "sliced", "permuted")

#: Triton's interpreter takes tens of microseconds for every operation of every program, a thousand
#: times what the other targets take: under it, what repeats a test with other numbers repeats less.
INTERPRETED = environment.on(environment.TRITON_INTERPRET)


def dtype_id(value: object) -> str | None:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


all_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
all_layouts = pytest.mark.parametrize("layout", LAYOUTS)
both_corners = pytest.mark.parametrize("align_corners", [False, True], ids=["half", "corners"])
all_sizes = pytest.mark.parametrize(
    ("size", "low"),
    [((25, 23), (5, 4)), ((12, 9), (12, 9)), ((7, 31), (5, 5)), ((16, 16), (1, 1))],
    ids=str,
)


@dataclass(frozen=True)
class Target:
    """A backend by name, and the device its tensors live on."""

    backend: str
    device: str

    def __str__(self) -> str:
        return f"{self.backend}-{self.device}"

    @property
    def interpreted(self) -> bool:
        return self.backend == "triton" and INTERPRETED

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a public function on this backend; skip where a backend has no such cell."""
        try:
            return function(*args, backend=self.backend, **kwargs)
        except magsd_kernels.BackendUnavailable as reason:
            if self.backend == "reference":
                raise
            pytest.skip(str(reason))


def available_targets() -> list[Target]:
    """Every backend that is available, on every device here whose tensors it takes."""
    return [Target(*place) for place in runnable()]


def examples(count: int) -> settings:
    """Settings of a property test: how many examples it tries."""
    return settings(max_examples=min(count, 4) if INTERPRETED else count, deadline=None)


def gradcheck(target: Target, function: Callable[..., Any], inputs: Any) -> bool:
    """Whether gradients are those of finite differences; interpreted, in a random direction."""
    return torch.autograd.gradcheck(function, inputs, fast_mode=target.interpreted)


def guide(batch: int = 4, maps: int = 3, low: tuple[int, int] = (5, 4), seed: int = 0) -> dict:
    """Attention, theta and index of a view, on the CPU."""
    return {
        "attention": attention_maps(batch, maps, *low, seed=seed),
        "theta": uniform(batch, seed=seed + 1, low=0.2, high=0.6),
        "index": torch.arange(batch) % maps if maps > 1 else None,
    }


def on(device: str, arguments: dict[str, Any]) -> dict[str, Any]:
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in arguments.items()}


def boxes(target: Target, attention: Tensor, theta: Tensor | float, size: Any, **options: Any):
    """Rows of `attention_boxes` as lists, and what must hold for any of them."""
    if not isinstance(theta, Tensor):
        theta = torch.full((len(attention),), theta)
    options = on(target.device, options)
    out = target.call(
        magsd_kernels.attention_boxes,
        attention.to(target.device),
        theta.to(target.device),
        size,
        **options,
    )
    assert out.dtype == torch.int32
    assert out.shape == (len(attention), 4)
    assert not out.requires_grad
    rows = out.cpu().tolist()
    for top, left, bottom, right in rows:
        assert 0 <= top < bottom <= size[0]
        assert 0 <= left < right <= size[1]
    return rows


def make_strided(tensor: Tensor, layout: str) -> Tensor:
    """The same values in other strides; 4-D layouts fall back to contiguous elsewhere."""
    tensor = tensor.detach().contiguous()
    if layout == "contiguous" or tensor.dim() < 2:
        return tensor
    if layout == "channels_last":
        if tensor.dim() != 4:
            return tensor
        return tensor.contiguous(memory_format=torch.channels_last)
    if layout == "sliced":
        shape = [n + 2 for n in tensor.shape[:-1]] + [2 * tensor.shape[-1] + 3]
        parent = tensor.new_full(shape, -17.0) if tensor.is_floating_point() else None
        if parent is None:
            parent = tensor.new_full(shape, 0)
        window = tuple(slice(1, n + 1) for n in tensor.shape[:-1])
        view = parent[(*window, slice(2, 2 + 2 * tensor.shape[-1], 2))]
        view.copy_(tensor)
        return view
    if layout == "permuted":
        order = list(range(tensor.dim()))[::-1]
        return tensor.permute(order).contiguous().permute(order)
    raise ValueError(layout)


def assert_agrees(actual: Tensor, expected: Tensor, what: str = "result") -> None:
    """Compare with a float64 oracle by the rules of the contract."""
    assert isinstance(actual, Tensor), f"{what} is {type(actual).__name__}"
    found = difference(actual, expected, f"{what} ({actual.dtype})")
    assert found is None, str(found)


def assert_matches_oracle(
    function: Callable[..., Tensor],
    oracle: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    target: Target,
    dtype: torch.dtype | Sequence[torch.dtype],
    layout: str = "contiguous",
) -> Tensor:
    """Compare `function(*inputs)` and the gradient of each input with the float64 oracle."""
    dtypes = [dtype] * len(inputs) if isinstance(dtype, torch.dtype) else dtype
    leaves = [
        make_strided(x.to(target.device, d), layout).requires_grad_()
        for x, d in zip(inputs, dtypes, strict=True)
    ]
    masters = [leaf.detach().cpu().double().contiguous().requires_grad_() for leaf in leaves]
    actual, expected = function(*leaves), oracle(*masters)
    assert actual.dtype == dtypes[0]
    assert actual.device.type == target.device
    assert_agrees(actual, expected)
    direction = random(*expected.shape, seed=99, dtype=actual.dtype)
    gradients = torch.autograd.grad(actual, leaves, direction.to(target.device))
    wanted = torch.autograd.grad(expected, masters, direction.double())
    for i, (leaf, found, want) in enumerate(zip(leaves, gradients, wanted, strict=True)):
        assert found.dtype == leaf.dtype
        assert_agrees(found, want, f"gradient {i}")
    return actual


#: glibc's mallopt(M_PERTURB, byte): memory that is handed out holds the byte's complement.
_PERTURB = -6


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Uninitialized memory holds no sensible numbers inside, whoever hands it out.

    From torch.empty it holds NaN (floats) or the largest integer. The C++ kernels ask torch's
    allocator past that: with glibc every byte that it gives is 0x7f, in float32 3e38.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda option, value: None)
    algorithms = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    mallopt(_PERTURB, 0x80)
    try:
        yield
    finally:
        mallopt(_PERTURB, 0)
        torch.use_deterministic_algorithms(algorithms, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill


def fresh_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter that imports the same magsd_kernels as this one.

    It runs beside the package: an interpreter with -c looks in its working directory first, and
    the checkout's package, unlike an installed one, may hold no compiled library.
    """
    root = str(Path(magsd_kernels.__file__).parents[1])
    clean = {k: v for k, v in os.environ.items() if not k.startswith("MAGSD_")}
    clean["PYTHONPATH"] = os.pathsep.join([root, clean.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=clean | environment,
        timeout=300,
        check=False,
        cwd=root,
    )


def with_tests(code: str) -> str:
    """Code that may import from `tests.kernels`, with magsd_kernels imported before."""
    checkout = str(Path(__file__).parents[2])
    return f"import sys, magsd_kernels\nsys.path.insert(0, {checkout!r})\n{code}"


def launches(target: Target, call: Callable[[], Any]) -> int:
    """Kernels, copies and fills that `call` puts on a GPU; kernels alone where it is emulated."""
    if target.backend != "cuda":
        pytest.skip("only the CUDA column promises a number of launches")
    if target.device == "cuda":
        call()  # What is loaded or allocated once is no part of it.
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            call()
            torch.cuda.synchronize()
        return sum(e.device_type == torch.autograd.DeviceType.CUDA for e in profiler.events())
    return _counted("magsd_emulated_launches", call)


def blocks(target: Target, call: Callable[[], Any]) -> int:
    """Blocks of the kernels that `call` launches on an emulated GPU."""
    if target.backend != "cuda" or target.device == "cuda":
        pytest.skip("only the emulation counts blocks")
    return _counted("magsd_emulated_blocks", call)


def _counted(counter: str, call: Callable[[], Any]) -> int:
    """By how much `call` raises a counter of the emulation."""
    count = getattr(ctypes.CDLL(str(native.library("cuda"))), counter)
    count.restype = ctypes.c_uint64
    before: int = count()
    call()
    return count() - before


@contextlib.contextmanager
def multiprocessors(target: Target, count: int) -> Iterator[None]:
    """An emulated GPU of so many multiprocessors, by which kernels size their grids."""
    if target.backend != "cuda" or target.device == "cuda":
        yield
        return
    change = ctypes.CDLL(str(native.library("cuda"))).magsd_emulate_multiprocessors
    before: int = change(count)
    try:
        yield
    finally:
        change(before)


@dataclass(frozen=True)
class Library:
    """A compiled library by the name of its file, and the device its operators take tensors of."""

    name: str
    backend: str
    device: str

    def why_not(self) -> str | None:
        """Reason why a fresh process cannot run its operators here."""
        file = native.library("cpu").with_name(f"libmagsd_{self.name}.so")
        if not file.is_file():
            return f"{file.name} is not built"
        if self.device == "cuda" and not torch.cuda.is_available():
            return "torch sees no CUDA device"
        return None

    def run(self, code: str, **variables: str) -> str:
        """What code, in which `library` is this one, prints in a fresh interpreter."""
        if reason := self.why_not():
            pytest.skip(reason)
        if self.name == "cuda_emulated":
            variables[environment.EMULATE_CUDA] = "1"
        code = f"from tests.kernels.support import Library\nlibrary = {self!r}\n{code}"
        result = fresh_python(with_tests(code), **variables)
        assert result.returncode == 0, result.stdout[-1000:] + result.stderr[-4000:]
        return result.stdout


every_library = pytest.mark.parametrize(
    "library",
    [
        Library("cpu", "cpu", "cpu"),
        Library("cuda", "cuda", "cuda"),
        Library("cuda_emulated", "cuda", "cpu"),
    ],
    ids=lambda library: library.name,
)


def identical(a: Tensor, b: Tensor) -> bool:
    """Bit-equal, NaN included."""
    return (
        a.dtype == b.dtype
        and torch.equal(a.isnan(), b.isnan())
        and torch.equal(a.nan_to_num(), b.nan_to_num())
    )
