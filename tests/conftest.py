"""Fixtures for every test folder."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Folder with real radiographs and weights; tests that need it skip where it is absent."""
    path = Path(os.environ.get("MAGSD_SHARED", Path(__file__).parents[2] / "shared"))
    if not (path / "data" / "cxr3" / "labels.csv").is_file():
        pytest.skip(f"real radiographs not found under {path} (set MAGSD_SHARED)")
    return path
