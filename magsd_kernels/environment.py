"""The environment variables that the kernels obey. They are read here and nowhere else.

A variable is read when it is asked for, so that a program may set it before it needs it.
"""

from __future__ import annotations

import os

BACKEND = "MAGSD_BACKEND"
CPU_CAPABILITY = "MAGSD_CPU_CAPABILITY"
EMULATE_CUDA = "MAGSD_EMULATE_CUDA"
TRITON_AUTOTUNE = "MAGSD_TRITON_AUTOTUNE"
TRITON_INTERPRET = "TRITON_INTERPRET"  # Triton's own

VARIABLES = (BACKEND, CPU_CAPABILITY, EMULATE_CUDA, TRITON_AUTOTUNE, TRITON_INTERPRET)


def value(name: str) -> str | None:
    """What a variable is set to; None also where it is empty."""
    return os.environ.get(name) or None


def on(name: str) -> bool:
    """Whether a switch is 1."""
    return value(name) == "1"
