"""Settings of a whole process, of torch and of memory: changed within a context, then put back."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def tf32_products(enabled: bool) -> Iterator[None]:
    """Within the context float32 products and convolutions may run in TF32 on a GPU.

    Torch keeps these settings under older and newer names, and raises where an older one is read
    that disagrees with the newer. The older are set here, which sets both, so that other code may
    read either.
    """
    if not enabled:
        yield
        return
    matmul: Any = torch.backends.cuda.matmul
    # Torch puts objects with more attributes in these places.
    cudnn: Any = torch.backends.cudnn
    mkldnn: Any = torch.backends.mkldnn
    newer = (matmul, cudnn.conv, cudnn.rnn, mkldnn.matmul)
    before = [setting.fp32_precision for setting in newer]
    # What the older ones hold can be read once the newer ones cannot disagree.
    for setting in newer:
        setting.fp32_precision = "ieee"
    level = torch.get_float32_matmul_precision()
    convolutions = _allowed_in_convolutions()
    for setting, value in zip(newer, before, strict=True):
        setting.fp32_precision = value
    if level == "highest":
        matmul.allow_tf32 = True
    else:  # "medium" speaks of the CPU's products as well
        matmul.fp32_precision = "tf32"
    cudnn.allow_tf32 = True
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(level)
        cudnn.allow_tf32 = convolutions
        for setting, value in zip(newer, before, strict=True):
            setting.fp32_precision = value


def _allowed_in_convolutions() -> bool:
    """What `cudnn.allow_tf32` holds while the newer settings say no: a yes is refused then."""
    try:
        return bool(torch.backends.cudnn.allow_tf32)
    except RuntimeError:
        return True


@contextlib.contextmanager
def deterministic_algorithms(enabled: bool) -> Iterator[None]:
    """Within the context torch refuses operations whose result may vary; restored afterwards."""
    if not enabled:
        yield
        return
    # cuBLAS reads this when its first handle is made.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@contextlib.contextmanager
def cudnn_benchmark() -> Iterator[None]:
    """Within the context cuDNN times its algorithms once for each shape and keeps the fastest.

    Which one wins may change from run to run, and with it the rounding: not where determinism is
    asked for.
    """
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark
    cudnn.benchmark = not (torch.are_deterministic_algorithms_enabled() or cudnn.deterministic)
    try:
        yield
    finally:
        cudnn.benchmark = before


# glibc's malloc.h: options, what they are within `kept_memory`, and glibc's own values.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
_KEEPING = {_MMAP_MAX: 0, _TOP_PAD: 1 << 26, _TRIM_THRESHOLD: -1}
_GLIBC = {_MMAP_MAX: 65536, _TOP_PAD: 1 << 17, _TRIM_THRESHOLD: 1 << 17}


@contextlib.contextmanager
def kept_memory(device: torch.device) -> Iterator[None]:
    """Within the context memory that a CPU tensor frees stays with the process, for the next one.

    By default glibc gives tensors of 32 MiB and more back to the system, which hands their pages
    out anew, zeroed and one by one: of a step of ResNet-50 in float32 that was a quarter. In turn
    the process holds more memory at its peak. Another C library is left as it is.
    """
    library = ctypes.CDLL(None) if os.name == "posix" else None
    if device.type != "cpu" or not hasattr(library, "mallopt"):
        yield
        return
    assert library is not None
    for option, value in _KEEPING.items():
        library.mallopt(option, value)
    try:
        yield
    finally:
        for option, value in _GLIBC.items():
            library.mallopt(option, value)
        library.malloc_trim(0)
