"""Configurations of the small run, and what its tests compare."""

from __future__ import annotations

import io
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from magsd.config import Config, load_config


@pytest.fixture
def small_config(small_pairs: list[str]) -> Callable[..., Config]:
    """Configuration of the small run with further overrides."""
    return lambda *overrides: load_config(None, overrides, shared=small_pairs)


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=200)


def assert_same_state(first: Any, second: Any, where: str = "") -> None:
    """Every tensor and value equal bit for bit, wall-clock times apart."""
    assert type(first) is type(second), where
    if isinstance(first, torch.Tensor):
        assert first.dtype == second.dtype, where
        assert torch.equal(first, second), where
    elif isinstance(first, dict):
        assert first.keys() == second.keys(), where
        for key in first:
            if not str(key).endswith("_seconds"):
                assert_same_state(first[key], second[key], f"{where}.{key}")
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second), where
        for number, (a, b) in enumerate(zip(first, second, strict=True)):
            assert_same_state(a, b, f"{where}[{number}]")
    else:
        assert first == second, where


@pytest.fixture
def same_state() -> Callable[[Any, Any], None]:
    return assert_same_state


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Mounts file systems of a few MiB; skips where that is not permitted."""
    mounted: list[Path] = []

    def mount(*, megabytes: int) -> Path:
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
        try:
            done = subprocess.run(command, capture_output=True, check=False)
        except FileNotFoundError:
            pytest.skip("no mount command here")
        if done.returncode:
            pytest.skip("mounting a small file system is not permitted here")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)
