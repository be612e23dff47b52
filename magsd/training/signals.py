"""SIGINT and SIGTERM become a request that the training loop reads between steps."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

_CAUGHT = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Context manager; `signum` is the signal that came, or None.

    A second signal meets the handlers that were there before, so the impatient get out at once.
    Outside the main thread Python allows no handlers, and the object just never fires.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in _CAUGHT:
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def ignore_sigterm(self) -> None:
        """Ignore SIGTERM from now on, after the context as well.

        For a process that is about to end: torchrun sends SIGTERM to all processes as soon as one
        has ended, and this one may still have to save the state and to say how to resume.
        """
        self._restore()
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def __bool__(self) -> bool:
        return self.signum is not None

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        self.signum = signum
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
