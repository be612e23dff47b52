"""`python -m magsd_kernels.info`: versions, devices, backends and how the libraries were built."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import sys

import torch

from magsd_kernels import __version__, environment, native
from magsd_kernels.backends import OPERATIONS, asked_for, backends, preference, select, why_not


def report() -> dict[str, dict[str, str]]:
    """Sections of the report, each a dict from name to value."""
    return {
        "versions": _versions(),
        "devices": _devices(),
        "backends": backends(),
        **{f"build of {name}": _build(name) for name in ("cpu", "cuda")},
        "environment": {
            name: environment.value(name) or "not set" for name in environment.VARIABLES
        },
    }


def in_use(device: torch.device | str, dtype: torch.dtype = torch.float32) -> str:
    """One line: what runs each operation on tensors of a device where a call names no backend.

    Where "auto" passes over a backend that it would rather take, the reason follows. Raises as the
    operations do: `ValueError` for an unknown name, `BackendUnavailable`.
    """
    device = torch.device(device)
    rows: dict[tuple[str, str], list[str]] = {}
    sample = torch.empty(0, dtype=dtype, device=device)
    for operation in OPERATIONS:
        chosen = select(operation, None, sample)
        tried = preference(device.type) if asked_for() == "auto" else ()
        better = tried[: tried.index(chosen)] if chosen in tried else tried
        reasons = [
            f"{name}: {why_not(name, operation, device.type, dtype, device.index)}"
            for name in better
        ]
        rows.setdefault((chosen, "; ".join(reasons)), []).append(operation)
    parts = [
        f"{_KINDS[chosen]()} for {', '.join(operations) if len(rows) > 1 else 'all operations'}"
        + (f" ({reasons})" if reasons else "")
        for (chosen, reasons), operations in rows.items()
    ]
    return f"{'; '.join(parts)}, on {_device_name(sample.device)}"


_KINDS = {
    "reference": lambda: "reference (PyTorch)",
    "cpu": lambda: f"cpu (C++, {native.instruction_set()})",
    "cuda": lambda: "cuda (CUDA C++)",
    "triton": lambda: "triton (Triton)",
}


def _device_name(device: torch.device) -> str:
    if device.type != "cuda":
        return str(device)
    return f"{device} ({torch.cuda.get_device_name(device)})"


def _versions() -> dict[str, str]:
    return {
        "magsd_kernels": __version__,
        "python": f"{platform.python_version()} ({platform.system()} {platform.machine()})",
        "torch": torch.__version__,
        "cuda of torch": str(torch.version.cuda or "none"),
        "triton": _version_of("triton"),
    }


def _version_of(package: str) -> str:
    if importlib.util.find_spec(package) is None:
        return "not installed"
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # a build under another distribution's name
        return "version unknown"


def _devices() -> dict[str, str]:
    devices = {
        "cpu": f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    }
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        devices[f"cuda:{i}"] = (
            f"{properties.name}, compute capability {properties.major}.{properties.minor}, "
            f"{properties.total_memory / 2**30:.0f} GiB"
        )
    return devices


def _build(backend: str) -> dict[str, str]:
    path = native.library(backend)
    if not path.is_file():
        return {"library": str(native.why_not(backend))}
    entries = {"library": f"{path.name}, {path.stat().st_size / 2**20:.1f} MiB"}
    if backend == "cpu" and native.why_not(backend) is None:
        entries["runs"] = native.instruction_set()
    return entries | native.build(backend)


def main() -> None:
    """Print the report."""
    sections = report()
    width = max(len(name) for entries in sections.values() for name in entries)
    for section, entries in sections.items():
        sys.stdout.write(f"{section}\n")
        for name, value in entries.items():
            sys.stdout.write(f"  {name:<{width}} {value}\n")


if __name__ == "__main__":
    main()
