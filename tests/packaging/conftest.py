"""What a build reads from the environment is set by its test alone."""

from __future__ import annotations

import pytest

VARIABLES = (
    "CXX", "CXXFLAGS", "LDFLAGS", "CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST", "MAX_JOBS",
    "MAGSD_BUILD_CPU", "MAGSD_BUILD_CUDA", "MAGSD_BUILD_EMULATION",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _no_choice_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
