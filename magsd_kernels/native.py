"""Loads the compiled libraries: not built | nothing here to run on (why) | loaded.

The schemas `magsd_cpu::<name>` and `magsd_cuda::<name>` are those of `magsd::<name>` less the
backend (see registry.py); a library that is loaded registers their kernels.

With MAGSD_EMULATE_CUDA=1 the "cuda" library is the one whose kernels were compiled for the host
(csrc/simt): it takes CPU tensors and serves tests on machines without a GPU.
"""

from __future__ import annotations

import ctypes
import json
from pathlib import Path
from typing import Any

import torch

from magsd_kernels import environment

CAPABILITIES = ("baseline", "avx2", "avx512")

_FOLDER = Path(__file__).parent / "lib"
_states: dict[str, str | None] = {}


class _Operators:
    """The operators of one library, each looked up once."""

    def __init__(self, backend: str) -> None:
        self._namespace = getattr(torch.ops, f"magsd_{backend}")

    def __getattr__(self, name: str) -> Any:
        overload = getattr(self._namespace, name).default
        setattr(self, name, overload)
        return overload


_operators = {backend: _Operators(backend) for backend in ("cpu", "cuda")}


def emulates_cuda() -> bool:
    """Whether the "cuda" backend is its emulation on the CPU."""
    return environment.on(environment.EMULATE_CUDA)


def library(backend: str) -> Path:
    """Where the compiled library of a backend ("cpu" or "cuda") lies, built or not."""
    return _FOLDER / f"libmagsd_{_built_as(backend)}.so"


def _built_as(backend: str) -> str:
    return "cuda_emulated" if backend == "cuda" and emulates_cuda() else backend


def why_not(backend: str) -> str | None:
    """Load the library on the first question; None when it is loaded, else the reason."""
    if backend not in _states:
        _states[backend] = _load(backend)
    return _states[backend]


def operations(backend: str) -> Any:
    """The loaded library's operators."""
    why = why_not(backend)
    if why is not None:
        raise RuntimeError(f"the {backend} library is not loaded: {why}")
    return _operators[backend]


def build(backend: str) -> dict[str, str]:
    """What the build wrote down: compiler, torch, flags, or under "not built" the reason."""
    path = _FOLDER / "build.json"
    reports: dict[str, dict[str, str]] = json.loads(path.read_text()) if path.is_file() else {}
    return reports.get(_built_as(backend), {})


def instruction_set() -> str:
    """Which compilation of the CPU kernels runs: one of CAPABILITIES."""
    operations("cpu")
    function = ctypes.CDLL(str(library("cpu"))).magsd_cpu_instruction_set
    function.restype = ctypes.c_char_p
    name: bytes = function()
    return name.decode()


def _load(backend: str) -> str | None:
    path = library(backend)
    if not path.is_file():
        reason = build(backend).get("not built", "this installation holds no compiled library")
        return f"not built: {reason}"
    wanted = environment.value(environment.CPU_CAPABILITY)
    if backend == "cpu" and wanted and wanted not in CAPABILITIES:
        names = ", ".join(CAPABILITIES)
        return f"{environment.CPU_CAPABILITY} must be one of {names}; got {wanted!r}"
    if backend == "cuda" and not emulates_cuda():
        why = _no_device(build(backend))
        if why is not None:
            return why
    try:
        torch.ops.load_library(path)
    except OSError as error:
        built = build(backend).get("torch", "an unknown torch")
        return f"built for something else than torch {torch.__version__} (for {built}): {error}"
    return None


def _no_device(built: dict[str, str]) -> str | None:
    """Reason why no CUDA library, or not the one that was built so, can run on this machine."""
    cuda, have = built.get("cuda"), torch.version.cuda
    if have is None:
        return f"built for CUDA {cuda}, but torch {torch.__version__} is not a CUDA build"
    if cuda is not None and cuda.partition(".")[0] != have.partition(".")[0]:
        return f"built for CUDA {cuda}, but torch {torch.__version__} is built for CUDA {have}"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    try:
        reasons = [_unserved(built, i) for i in range(torch.cuda.device_count())]
    except RuntimeError as error:  # in a process forked after CUDA was initialized
        return f"torch cannot use CUDA: {error}"
    return reasons[0] if reasons and all(reasons) else None


def unserved(index: int) -> str | None:
    """Reason why the CUDA library that is loaded does not run on one of the GPUs, or None."""
    return _unserved(build("cuda"), index)


def _unserved(built: dict[str, str], index: int) -> str | None:
    architectures = built.get("architectures", "")
    device = torch.cuda.get_device_capability(index)
    if not architectures or any(_serves(a, device) for a in architectures.split(", ")):
        return None
    has = f"{device[0]}.{device[1]}"
    remedy = f"; reinstall with TORCH_CUDA_ARCH_LIST={has}" if device >= (8, 0) else ""
    return f"built for compute capability {architectures}, but cuda:{index} has {has}{remedy}"


def _serves(architecture: str, capability: tuple[int, int]) -> bool:
    """Whether code for an architecture, written as in TORCH_CUDA_ARCH_LIST, runs on a device."""
    number = architecture.removesuffix("+PTX")
    major, minor = map(int, number.rstrip("af").split("."))
    if number.endswith("a"):
        return capability == (major, minor)
    if architecture.endswith("+PTX") and not number.endswith("f"):
        return capability >= (major, minor)
    return capability[0] == major and capability[1] >= minor
