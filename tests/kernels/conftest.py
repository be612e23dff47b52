"""Where the operations can run here: one `target` per backend and device."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from .interpreter import speed_up
from .support import INTERPRETED, Target, available_targets

if INTERPRETED:
    speed_up()


@pytest.fixture(scope="session", params=available_targets(), ids=str)
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
