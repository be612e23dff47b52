"""What importing magsd_kernels costs and what it brings in."""

from __future__ import annotations

import pytest

from .support import fresh_python

IMPORT = """
import sys, time
import numpy, torch
before = set(sys.modules)
start = time.process_time()
import magsd_kernels
print(time.process_time() - start)
new = set(sys.modules) - before
print(*sorted({name.partition(".")[0] for name in new if name.split(".")[0] in %r}))
print(*sorted(name for name in new if name.startswith("magsd_kernels.")))
maps = open("/proc/self/maps").read() if sys.platform == "linux" else ""
print(int("magsd" in "".join(line for line in maps.splitlines() if ".so" in line)))
print(len(torch.ops.loaded_libraries))
print(int(torch.cuda.is_initialized()))
"""
FORBIDDEN = (
    "triton",
    "torchvision",
    "timm",
    "scipy",
    "pandas",
    "cv2",
    "sklearn",
    "matplotlib",
    "magsd",
    "setuptools",
)


@pytest.fixture(scope="module")
def imports() -> list[list[str]]:
    """Lines of three fresh imports."""
    runs = [fresh_python(IMPORT % (FORBIDDEN,)) for _ in range(3)]
    assert all(run.returncode == 0 for run in runs), runs[0].stderr
    return [run.stdout.split("\n") for run in runs]


def test_import_costs_at_most_50_ms_over_torch(imports):
    assert min(float(lines[0]) for lines in imports) <= 0.05


def test_import_brings_in_nothing_else(imports):
    assert imports[0][1] == ""
    modules = imports[0][2].split()
    assert not [name for name in modules if ".triton" in name]


def test_import_loads_no_native_library_and_no_device(imports):
    assert imports[0][3:6] == ["0", "0", "0"]
