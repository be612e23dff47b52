"""Context managers that hold a value for the current thread, and nest."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Any


class OpenBlocks(threading.local):
    """The values of this thread's open blocks, the innermost last."""

    def __init__(self) -> None:
        # As an attribute of the class, torch.compile of torch 2.11 would find it for every thread.
        self.values: tuple[Any, ...] = ()


class Block:
    """A context manager that keeps its value in `blocks` while it is open."""

    def __init__(self, blocks: OpenBlocks, value: Any) -> None:
        self._blocks = blocks
        self._value = value

    def __enter__(self) -> None:
        self._blocks.values = (*self._blocks.values, self._value)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._blocks.values = self._blocks.values[:-1]
