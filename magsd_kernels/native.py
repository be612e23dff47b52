"""Loads the compiled libraries: not built | built for something else (why) | loaded.

The schemas `magsd_cpu::<name>` and `magsd_cuda::<name>` are those of `magsd::<name>` less the
backend (see registry.py); a library that is loaded registers their kernels.

With MAGSD_EMULATE_CUDA=1 the "cuda" library is the one whose kernels were compiled for the host
(csrc/simt): it takes CPU tensors and serves tests on machines without a GPU.
"""

from __future__ import annotations

import ctypes
import json
import os
from pathlib import Path
from typing import Any

import torch

CAPABILITY_VARIABLE = "MAGSD_CPU_CAPABILITY"
CAPABILITIES = ("baseline", "avx2", "avx512")
EMULATION_VARIABLE = "MAGSD_EMULATE_CUDA"

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
    return os.environ.get(EMULATION_VARIABLE) == "1"


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
    wanted = os.environ.get(CAPABILITY_VARIABLE)
    if wanted and wanted not in CAPABILITIES:
        return f"{CAPABILITY_VARIABLE} must be one of {', '.join(CAPABILITIES)}; got {wanted!r}"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        built = build(backend).get("torch", "an unknown torch")
        return f"built for something else than torch {torch.__version__} (for {built}): {error}"
    return None
