"""`python -m benchmarks.library`: the library that was carried here loads, or is built."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.harness.device import command_line
from magsd_kernels import native


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; 0 where the library loads in the end."""
    parser = command_line("library", __doc__)
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
    root = Path(__file__).parents[1]
    subprocess.run(build, cwd=root, env={**os.environ, **limits}, check=True)
    again = [sys.executable, "-m", "benchmarks.library", f"--device={options.device}", "--no-build"]
    return subprocess.run(again, cwd=root, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
