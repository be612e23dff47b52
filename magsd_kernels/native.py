"""Loads the compiled libraries: not built | built for something else (why) | loaded.

Each library registers its operators when it is loaded: `magsd_cpu::<name>` and
`magsd_cuda::<name>`, with the argument lists of `magsd::<name>` less the backend.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

_FOLDER = Path(__file__).parent / "lib"
_states: dict[str, str | None] = {}


def library(backend: str) -> Path:
    """Where the compiled library of a backend ("cpu" or "cuda") lies, built or not."""
    return _FOLDER / f"libmagsd_{backend}.so"


def why_not(backend: str) -> str | None:
    """Load the library on the first question; None when it is loaded, else the reason."""
    if backend not in _states:
        _states[backend] = _load(library(backend))
    return _states[backend]


def operations(backend: str) -> Any:
    """Namespace of the loaded library's operators."""
    why = why_not(backend)
    if why is not None:
        raise RuntimeError(f"the {backend} library is not loaded: {why}")
    return getattr(torch.ops, f"magsd_{backend}")


def _load(path: Path) -> str | None:
    if not path.is_file():
        return "not built: this installation holds no compiled library"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"built for something else than torch {torch.__version__}: {error}"
    return None
