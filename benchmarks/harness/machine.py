"""What stands beside every figure: machine, versions, threads."""

from __future__ import annotations

import os
import platform

import torch

import magsd_kernels
from benchmarks.harness.device import Device
from magsd_kernels import native


def folder(device: Device) -> str:
    """Name of the machine's folder under results: cpu, or the GPU's model, such as h200."""
    if device.type == "cpu":
        return "cpu"
    model = torch.cuda.get_device_name().removeprefix("NVIDIA").split()
    return model[0].lower() if model else "gpu"


def describe(device: Device, processor: str) -> dict[str, str]:
    """Name and value of everything that a figure depends on."""
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
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(0)
        facts["gpu"] = (
            f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, "
            f"{properties.L2_cache_size >> 20} MiB L2"
        )
        facts["cuda"] = str(torch.version.cuda)
        facts["tf32"] = f"matmul precision {torch.get_float32_matmul_precision()}"
    return facts
