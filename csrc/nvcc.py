"""NVIDIA's compiler: where it is, and for which GPUs it compiles."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from commands import NotBuilt, output
from setuptools.errors import PlatformError

#: Where neither TORCH_CUDA_ARCH_LIST nor a visible GPU says what to compile for. GPUs of 8.6 to 8.9
#: run the code of 8.0; most of a build's time goes by architectures.
ARCHITECTURES = ("8.0", "9.0", "10.0", "12.0+PTX")
OLDEST_ARCHITECTURE = 80  # the first with TF32 products
_OLDEST = f"the CUDA kernels need at least {OLDEST_ARCHITECTURE / 10}"


def find_nvcc() -> str:
    """Path of nvcc: CUDA_HOME, CUDA_PATH, PATH, then the usual folder."""
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")):
        if home and (path := shutil.which("nvcc", path=str(Path(home, "bin")))):
            return path
    found = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if found is None:
        raise NotBuilt(
            "nvcc was not found when it was installed (looked in CUDA_HOME, PATH and "
            "/usr/local/cuda)"
        )
    return found


def architectures(nvcc: str, gpus: Iterable[str]) -> tuple[list[str], str | None]:
    """What to compile for, written as in TORCH_CUDA_ARCH_LIST, and what is left out and why.

    TORCH_CUDA_ARCH_LIST decides; without it the GPUs that are visible (`gpus`, as "9.0"), so that
    nobody waits for code that nothing here runs; without any, what nvcc knows of ARCHITECTURES.
    """
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    for architecture in wanted:
        if re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", architecture) is None:
            raise PlatformError(
                f"TORCH_CUDA_ARCH_LIST: {architecture!r} is not like '9.0' or '9.0+PTX'"
            )
    asked = f"TORCH_CUDA_ARCH_LIST holds {', '.join(wanted)}"
    chosen, old = _apart(wanted)
    if not wanted:
        known = {int(n) for n in re.findall(r"compute_(\d+)", output([nvcc, "--list-gpu-arch"]))}
        gpus, old = _apart(sorted(gpus, key=_number))
        asked = f"the visible GPUs have {', '.join(old)}"
        listed = [*_for_gpus(gpus, known)] if gpus or old else [*ARCHITECTURES]
        chosen = [a for a in listed if _number(a) in known]
        if not chosen and not old:
            raise NotBuilt(f"{nvcc} knows none of {', '.join(gpus or ARCHITECTURES)}")
        if chosen and not chosen[-1].endswith("+PTX"):
            chosen[-1] += "+PTX"  # GPUs of later generations compile it when they load it
    if not chosen:
        raise NotBuilt(f"{asked}; {_OLDEST}")
    return chosen, f"{', '.join(old)}: {_OLDEST}" if old else None


def flags(chosen: Iterable[str]) -> list[str]:
    """The flags of nvcc for these architectures."""
    words = []
    for architecture in chosen:
        number = architecture.removesuffix("+PTX").replace(".", "")
        code = f"sm_{number}"
        if architecture.endswith("+PTX"):
            code = f"[{code},compute_{number}]"
        words += ["-gencode", f"arch=compute_{number},code={code}"]
    return words


def _apart(wanted: Iterable[str]) -> tuple[list[str], list[str]]:
    """Those that the kernels can serve, and those that are too old."""
    served: tuple[list[str], list[str]] = ([], [])
    for architecture in wanted:
        served[_number(architecture) < OLDEST_ARCHITECTURE].append(architecture)
    return served


def _for_gpus(gpus: Iterable[str], known: set[int]) -> list[str]:
    """The GPUs' own architectures; for one newer than this nvcc, the newest that it knows."""
    fitting = {max((n for n in known if n <= _number(gpu)), default=0) for gpu in gpus}
    return [f"{n // 10}.{n % 10}" for n in sorted(fitting) if n >= OLDEST_ARCHITECTURE]


def _number(architecture: str) -> int:
    return int(architecture.removesuffix("+PTX").rstrip("af").replace(".", ""))
