"""What can run here, what runs, and why not. Every backend implements every operation."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch

from magsd_kernels import environment, native
from magsd_kernels._blocks import Block, OpenBlocks

OPERATIONS = (
    "multiscale_attention",
    "bilinear_pool",
    "attention_sampling",
    "attention_augment",
    "soft_distance",
    "batch_norm_act",
)
BACKENDS = ("reference", "cpu", "cuda", "triton")
NAMES = (*BACKENDS, "auto")

#: What "auto" tries on an NVIDIA GPU, in order. No measurement has decided it yet.
ON_NVIDIA = ("cuda", "triton")

#: The compute capability that Triton's developers name as the oldest. For an older one it still
#: compiles, but without tensor cores, and what would run on them spills.
OLDEST_OF_TRITON = (8, 0)

#: Triton's kernels run in its interpreter, on the CPU. Triton asks when it is imported.
_INTERPRETED = environment.on(environment.TRITON_INTERPRET)

#: Device types whose tensors a backend takes; the reference takes any.
_DEVICES = {
    "cpu": ("cpu",),
    "cuda": ("cpu",) if native.emulates_cuda() else ("cuda",),
    "triton": ("cpu",) if _INTERPRETED else ("cuda", "xpu"),
}


class BackendUnavailable(RuntimeError):
    """An explicitly named backend cannot run these tensors here; the message says why."""


_named = OpenBlocks()


class use_backend(Block):
    """Context manager: calls inside that do not name a backend run on `name`.

    Holds for the current thread and nests. The backward pass runs on the backend of its forward.
    """

    def __init__(self, name: str) -> None:
        super().__init__(_named, _known(name))


def select(operation: str, backend: str | None, tensor: torch.Tensor) -> str:
    """Name of the backend that will run `operation` on tensors like `tensor`.

    Raises:
        ValueError: the name is unknown.
        BackendUnavailable: a named backend cannot run these tensors.
    """
    name = backend if backend is not None else asked_for()
    if _known(name) == "reference":
        return name
    device = tensor.device
    return _resolve(operation, name, device.type, tensor.dtype, device.index)


def asked_for() -> str:
    """The backend of calls that name none: the innermost `use_backend`'s, or the environment's."""
    if _named.values:
        name: str = _named.values[-1]
        return name
    return environment.value(environment.BACKEND) or "auto"


_resolved: dict[tuple[object, ...], str] = {}


def _resolve(*question: Any) -> str:
    answer = _resolved.get(question)
    if answer is None:
        answer = _resolved[question] = _choose(*question)
    return answer


def _choose(operation: str, name: str, device: str, dtype: torch.dtype, index: int | None) -> str:
    if name != "auto":
        why = why_not(name, operation, device, dtype, index)
        if why is not None:
            raise BackendUnavailable(f"{operation}: backend {name!r} cannot run here: {why}")
        return name
    for candidate in preference(device):
        if why_not(candidate, operation, device, dtype, index) is None:
            return candidate
    return "reference"


# Its arguments decide its answer for the life of the process: torch.compile need not look inside.
# This is what torch.compiler.assume_constant_result does, less its import of the whole compiler.
_resolve._dynamo_marked_constant = True  # type: ignore[attr-defined]


def preference(device: str) -> tuple[str, ...]:
    """What "auto" tries, in order, for tensors on a device type, before the reference."""
    if device == "cuda" and torch.version.hip is None:
        return ON_NVIDIA
    return {"cpu": ("cpu",), "cuda": ("triton",), "xpu": ("triton",)}.get(device, ())


def why_not(
    backend: str, operation: str, device: str, dtype: torch.dtype, index: int | None = None
) -> str | None:
    """Reason why `backend` cannot run `operation` on such tensors, or None if it can.

    index: which of the GPUs, where they may differ.
    """
    if backend == "reference":
        return None
    why = _unavailable(backend)
    if why is None and device not in _DEVICES[backend]:
        why = f"it takes tensors on {' or '.join(_DEVICES[backend])}, these are on {device}"
    if why is None and device == "cuda" and index is not None:
        why = native.unserved(index) if backend == "cuda" else _too_old(index)
    return why


def backends() -> dict[str, str]:
    """Every backend's name, with "available" or the reason why it is not."""
    return {name: _unavailable(name) or "available" for name in BACKENDS}


def implementation(backend: str, operation: str) -> Any:
    """Object whose attributes are the forward and backward functions of `operation`."""
    if backend in ("cpu", "cuda"):
        return native.operations(backend)
    return importlib.import_module(f"magsd_kernels.{backend}.{operation}")


def _known(name: str) -> str:
    if name not in NAMES:
        raise ValueError(f"backend must be one of {', '.join(NAMES)}; got {name!r}")
    return name


def _unavailable(backend: str) -> str | None:
    """Reason why a backend can run nothing here, or None."""
    if backend == "reference":
        return None
    if backend == "triton":
        return _triton()
    return native.why_not(backend)


def _triton() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if _INTERPRETED:
        return None
    if not (torch.cuda.is_available() or torch.xpu.is_available()):
        return "torch sees no GPU"
    try:
        reasons = [_too_old(i) for i in range(torch.cuda.device_count())]
    except RuntimeError as error:  # in a process forked after CUDA was initialized
        return f"torch cannot use CUDA: {error}"
    return reasons[0] if reasons and all(reasons) else None


def _too_old(index: int) -> str | None:
    """Reason why Triton does not serve one of the GPUs, or None."""
    if torch.version.hip is not None:
        return None
    major, minor = torch.cuda.get_device_capability(index)
    if (major, minor) >= OLDEST_OF_TRITON:
        return None
    oldest = ".".join(map(str, OLDEST_OF_TRITON))
    return f"Triton needs compute capability {oldest}, but cuda:{index} has {major}.{minor}"
