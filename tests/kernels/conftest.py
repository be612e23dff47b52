"""Where the operations can run here: one `target` per backend and device."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

import magsd_kernels
from magsd_kernels import native

from .support import Target


def _targets() -> list[Target]:
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    takes = {
        "reference": devices,
        "cpu": ["cpu"],
        "cuda": ["cpu"] if native.emulates_cuda() else ["cuda"],
        "triton": ["cpu"] if interpreted else ["cuda"],
    }
    available = [name for name, state in magsd_kernels.backends().items() if state == "available"]
    return [
        Target(name, device)
        for name in available
        for device in takes.get(name, devices)
        if device in devices
    ]


@pytest.fixture(scope="session", params=_targets(), ids=str)
def target(request: pytest.FixtureRequest) -> Target:
    """A backend and a device that it can run on."""
    return request.param


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """On tensors this small a second thread only costs; test_contract.py runs several itself."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _no_backend_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MAGSD_BACKEND", raising=False)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
