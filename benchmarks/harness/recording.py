"""Where results lie, and how they are written."""

from __future__ import annotations

from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from pytest_benchmark.utils import get_commit_info
from torch.utils import _pytree as pytree

from benchmarks.harness.device import Device
from benchmarks.harness.machine import describe

RESULTS = Path(__file__).parents[1] / "results"


def provenance(device: Device) -> dict[str, Any]:
    """What was run, where and when; commit_info is of what runs, whatever is committed later."""
    return {
        "machine_info": describe(device),
        "commit_info": commit(),
        "datetime": now(),
    }


def now() -> str:
    """The time of a run; of another row another one."""
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")


def commit() -> dict[str, Any]:
    """Its id, and whether there are uncommitted changes."""
    found = get_commit_info()
    return {name: found.get(name) for name in ("id", "dirty")}


def rounded(facts: dict[str, Any]) -> dict[str, Any]:
    """Five digits are more than any figure here is good for."""
    found: dict[str, Any] = pytree.tree_map_only(float, lambda x: float(f"{x:.5g}"), facts)
    return found


def write(path: Path, text: str) -> None:
    """All of it or nothing: a reader never finds half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    begun = path.with_name(f"{path.name}.begun")
    begun.write_text(text)
    begun.replace(path)
