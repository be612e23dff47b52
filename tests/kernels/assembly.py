"""Triton kernels compiled for GPUs that are not there, and what their machine code shows.

The package's cases run on meta tensors, which have shapes and strides and no memory, while a
stand-in for Triton's driver names the GPU. What they would launch is compiled with the arguments'
own types, divisibilities and constants, and kept instead of launched.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from magsd_kernels.backends import OPERATIONS, implementation
from magsd_kernels.cases import Size, tensors_of
from magsd_kernels.compare import in_layout
from magsd_kernels.triton._common import Tunable

from .cases import BY_NAME

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

#: Bytes of shared memory that a block can have.
SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}

# What the tools call it: (PTX and cuobjdump, GCN assembly).
_VECTOR = (
    r"(ld|st)\.global[\w.:]*\.v(4\.b32|2\.b64)|cp\.async\.\w+\.shared\.global.*0x10",
    r"(global|buffer)_(load|store)_dwordx4",
)
_HALF_WORD = (
    r"(ld|st)\.global[\w.:]*\.[bu]16 ",
    r"(global|buffer)_(load_[us]short|load_short\w*|store_short\w*) ",
)
_MATRIX = (r"mma\.sync|wgmma\.mma_async|tcgen05\.mma", r"v_mfma")


class _Driver:
    """What Triton asks its driver before it launches."""

    def __init__(self, name: str) -> None:
        self.name = name

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.name]

    def get_current_device(self) -> str:
        return self.name  # Triton keeps compiled kernels by device.

    def get_current_stream(self, device: str) -> int:
        return 0


@contextmanager
def _target(name: str) -> Iterator[None]:
    before = driver._active
    driver.set_active(_Driver(name))
    hip = "any" if TARGETS[name].backend == "hip" else None
    try:
        with mock.patch.object(torch.version, "hip", hip):
            yield
    finally:
        driver._active = before


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel: the module and the name of its function, and what Triton made of it."""

    name: str
    gpu: str
    binary: Any

    @property
    def code(self) -> str:
        """PTX or GCN assembly."""
        return str(self.binary.asm["amdgcn" if self.gpu.startswith("gfx") else "ptx"])

    @property
    def shared(self) -> int:
        """Bytes of shared memory."""
        return int(self.binary.metadata.shared)

    def count(self, nvidia: str, amd: str) -> int:
        """Instructions that match the pattern."""
        return len(re.findall(amd if self.gpu.startswith("gfx") else nvidia, self.code))

    @property
    def vector(self) -> int:
        """Accesses to global memory of 16 bytes."""
        return self.count(*_VECTOR)

    @property
    def half_words(self) -> int:
        """Accesses to global memory of 2 bytes."""
        return self.count(*_HALF_WORD)

    @property
    def matrix(self) -> int:
        """Matrix instructions."""
        return self.count(*_MATRIX)

    def resources(self) -> dict[str, int]:
        """Registers, and what is spilled or kept in a thread's own memory, by the tool's names."""
        if self.gpu.startswith("gfx"):
            names = "vgpr_count|vgpr_spill_count|sgpr_spill_count|private_segment_fixed_size"
            found = re.findall(rf"\.({names}): +(\d+)", self.code)
        else:
            found = re.findall(r"(REG|STACK|LOCAL):(\d+)", _resource_usage(self.binary))
        return {name: int(number) for name, number in found}


def _resource_usage(binary: Any) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        command = [tool, "--dump-resource-usage", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


class _Launches(TorchDispatchMode):
    """Runs the package's operators by their launchers; `settings` replace arguments."""

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__()
        self.settings = settings

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace != "magsd":
            return func(*args, **(kwargs or {}))
        names = [argument.name for argument in func._schema.arguments]
        given = dict(zip(names, args, strict=True))
        del given["backend"]
        given |= {name: value for name, value in self.settings.items() if name in given}
        operator = func.name().removeprefix("magsd::")
        modules = (implementation("triton", operation) for operation in OPERATIONS)
        launcher = next(getattr(m, operator) for m in modules if hasattr(m, operator))
        return launcher(*given.values())


def launch(
    name: str, size: Size, dtype: torch.dtype, layout: str, options: dict[str, Any], **settings: Any
) -> None:
    """Launch the kernels of one of the package's cases, forward and backward, on meta tensors."""
    case = BY_NAME[name]
    given = case.arguments(size, dtype=dtype, device="meta", requires_grad=False) | options
    for parameters in ("weights", "biases", "running_means", "running_vars"):
        if parameters in given:  # as layers have them, whatever the activations are
            given[parameters] = [x.float() for x in given[parameters]]
    given = pytree.tree_map_only(Tensor, lambda x: in_layout(x, layout), given)
    leaves = [leaf.requires_grad_() for leaf in case.leaves(given)]
    with _Launches(settings):
        out = tensors_of(case.function(**given, backend="reference"))
        if leaves:
            torch.autograd.grad(out, leaves, [torch.empty_like(x) for x in out])


def name_of(kernel: Any) -> str:
    """Module and name of a kernel's function."""
    return f"{kernel.module.rpartition('.')[2]}.{kernel.__name__}"


def compiled(gpu: str, launch: Callable[[], Any], every_config: bool = False) -> list[Kernel]:
    """The kernels that `launch` launches, in order, compiled for the GPU.

    `every_config`: in every configuration that tuning may choose, not in the default alone.
    """
    kernels = []
    run = JITFunction.run

    def keep(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        binary = run(self, *args, grid=grid, warmup=True, **kwargs)
        kernels.append(Kernel(name_of(self), gpu, binary))

    def each(self: Tunable, grid: Any) -> Callable[..., None]:
        def call(*args: Any, **kwargs: Any) -> None:
            for config in self.fitting() if every_config else self.fitting()[:1]:
                self.configured(config, grid)(*args, **kwargs)

        return call

    with (
        _target(gpu),
        mock.patch.object(JITFunction, "run", keep),
        mock.patch.object(Tunable, "__getitem__", each),
    ):
        launch()
    assert kernels
    return kernels
