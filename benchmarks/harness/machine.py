"""What stands beside every figure (machine, versions, threads, commit), and how it is written."""

from __future__ import annotations

import functools
import getpass
import os
import platform
import tempfile
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from cpuinfo import get_cpu_info
from pytest_benchmark.utils import get_commit_info
from torch.utils import _pytree as pytree

import magsd_kernels
from benchmarks.harness.device import Device
from magsd_kernels import environment, native

RESULTS = Path(__file__).parents[1] / "results"
#: What holds torch's own kernels and compiled code, ours, oneDNN and MKL back to AVX2.
RESTRICTIONS: Mapping[str, Mapping[str, str]] = {
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        environment.CPU_CAPABILITY: "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    }
}
_COMPILED = "TORCHINDUCTOR_CACHE_DIR"
_WRITTEN = {"avx2": "AVX2", "avx512": "AVX-512"}


def restricted(capability: str) -> dict[str, str] | None:
    """The environment of a process that is held back so; None: this one is."""
    limits = RESTRICTIONS[capability]
    if limits.items() <= os.environ.items():
        return None
    # The key of torch.compile's cache says nothing of instruction sets.
    usual = Path(tempfile.gettempdir(), f"torchinductor_{getpass.getuser()}")
    compiled = f"{os.environ.get(_COMPILED, usual)}-{capability}"
    return {**os.environ, **limits, _COMPILED: compiled}


def folder(device: Device) -> str:
    """Name of the machine's folder under results: cpu-avx2, or the GPU's model, such as h200."""
    if device.type == "cpu":
        return f"cpu-{instruction_set()}"
    model = torch.cuda.get_device_name().removeprefix("NVIDIA").split()
    return model[0].lower() if model else "gpu"


def instruction_set() -> str:
    """What torch and our kernels both run, such as avx2; different ones are no comparison."""
    theirs = torch.backends.cpu.get_cpu_capability().lower()
    if theirs in ("default", "no avx"):
        theirs = "baseline"
    ours = native.instruction_set() if native.why_not("cpu") is None else theirs
    if ours != theirs and (ours in _WRITTEN or theirs in _WRITTEN):
        raise ValueError(
            f"torch runs {theirs} and our kernels run {ours}: restrict both or none "
            f"(ATEN_CPU_CAPABILITY, {environment.CPU_CAPABILITY})"
        )
    return theirs


def _restriction() -> dict[str, str]:
    """That the processor can do more than what runs, and what was set to hold it back."""
    runs = instruction_set()
    able = "avx2" if torch.cpu._is_avx2_supported() else runs
    able = "avx512" if torch.cpu._is_avx512_supported() else able
    if runs == able:
        return {}
    switches = [f"{name}={os.environ[name]}" for name in RESTRICTIONS["avx2"] if name in os.environ]
    less = f"{_WRITTEN[able]} processor restricted to {_WRITTEN.get(runs, runs)}"
    return {"instruction set": f"{less} ({', '.join(switches)})"}


def describe(device: Device, processor: str | None = None) -> dict[str, str]:
    """Name and value of everything that a figure depends on."""
    processor = processor or get_cpu_info().get("brand_raw", "unknown")
    facts = {
        "machine": folder(device),
        "processor": f"{processor}, {os.cpu_count()} logical cores",
        "threads": str(torch.get_num_threads()),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "magsd_kernels": magsd_kernels.__version__,
    }
    if native.why_not("cpu") is None:
        facts["C++ kernels run"] = native.instruction_set()
    facts |= _restriction()
    if facts["machine"] == "cpu-avx512" and torch.cpu._is_avx512_bf16_supported():
        facts["bfloat16"] = "the processor has its instructions"
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(0)
        facts["gpu"] = (
            f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, "
            f"{properties.L2_cache_size >> 20} MiB L2"
        )
        facts["cuda"] = str(torch.version.cuda)
        facts["tf32"] = f"matmul precision {torch.get_float32_matmul_precision()}"
    return facts


def provenance(device: Device) -> dict[str, Any]:
    """What was run, where and when."""
    now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
    return {"machine_info": _described(device), "commit_info": commit(), "datetime": now}


_described = functools.cache(describe)


@functools.cache
def commit() -> dict[str, Any]:
    """Its id, and whether there are uncommitted changes; of what runs, whatever comes meanwhile."""
    found = get_commit_info()
    return {name: found.get(name) for name in ("id", "dirty")}


def rounded(facts: dict[str, Any]) -> dict[str, Any]:
    """Five digits are more than any figure here is good for."""
    found: dict[str, Any] = pytree.tree_map_only(float, lambda x: float(f"{x:.5g}"), facts)
    return found


def write(path: Path, text: str) -> None:
    """All of it or nothing: a reader never finds half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    begun = path.with_name(f"{path.name}.begun")
    begun.write_text(text)
    begun.replace(path)
