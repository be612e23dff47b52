"""`python -m magsd_kernels.info`: versions, devices, backends and how the libraries were built."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import sys

import torch

from magsd_kernels import __version__, environment, native
from magsd_kernels.backends import backends


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
