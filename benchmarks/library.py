"""`python -m benchmarks.library`: the library that was carried here loads, or is built."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from magsd_kernels import native

_ROOT = Path(__file__).parents[1]


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; 0 where the library loads in the end."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.library", description=__doc__)
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--no-build", action="store_true", help="only look")
    options = parser.parse_args(arguments)
    why = native.why_not(options.device)
    sys.stdout.write(f"{native.library(options.device)}: {why or 'loads'}\n")
    sys.stdout.flush()
    if why is None or options.no_build:
        return int(why is not None)
    limits = {"MAGSD_BUILD_CUDA": "0"}
    if options.device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        limits = {"MAGSD_BUILD_CUDA": "1", "TORCH_CUDA_ARCH_LIST": f"{major}.{minor}"}
    build = [sys.executable, "setup.py", "build_ext", "--inplace"]
    subprocess.run(build, cwd=_ROOT, env={**os.environ, **limits}, check=True)
    again = [sys.executable, "-m", "benchmarks.library", f"--device={options.device}", "--no-build"]
    return subprocess.run(again, cwd=_ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
