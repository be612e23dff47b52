"""Paths as people write them, and the files behind them."""

from __future__ import annotations

import os
from pathlib import Path


def expand(name: str | os.PathLike[str]) -> Path:
    """A path whose ~ is the home folder; as it is where no such folder is known, as of ~x.png."""
    try:
        return Path(name).expanduser()
    except RuntimeError:
        return Path(name)


def file_identity(path: Path) -> tuple[int, int] | None:
    """Equal for all names and links of one file or folder; None where it cannot be looked at."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    return (status.st_dev, status.st_ino) if status.st_ino else None
