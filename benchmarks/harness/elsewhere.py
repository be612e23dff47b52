"""A contender in a process of its own, which leaves the C library's malloc as it is.

Our trainer keeps the memory that tensors free (`torch_settings.kept_memory`), a setting of the
whole process. The released code does not: next to our steps it would gain from what is ours.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import torch

from benchmarks.harness.timing import Call

#: Makes the contender in the process; what it is called with must be known by its name there.
Build = Callable[[], Any]
_READY = "ready"


class Elsewhere:
    """A contender that `build` makes in another process, whose steps are asked for one by one.

    `read_off` is called there once, with the contender, and its result kept in `facts`. The process
    ends with this object, whose pipe it reads.
    """

    def __init__(self, build: Build, read_off: Callable[[Any], Any], batches: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._batches = batches
        self._process = context.Process(
            target=_serve,
            args=(theirs, build, read_off, torch.get_num_threads()),
            daemon=True,
        )
        self._process.start()
        theirs.close()
        self.facts: Any = self._answer()

    def calls(self) -> list[Call]:
        """What is timed, one call per batch."""
        return [partial(self._call, number) for number in range(self._batches)]

    def _call(self, number: int) -> None:
        self._pipe.send(number)
        answer = self._answer()
        assert answer == _READY, answer

    def _answer(self) -> Any:
        try:
            answer = self._pipe.recv()
        except EOFError:
            self._process.join()
            code = self._process.exitcode
            raise RuntimeError(f"the other process ended with exit code {code}") from None
        if isinstance(answer, Exception):
            raise answer
        return answer


def _serve(pipe: Connection, build: Build, read_off: Callable[[Any], Any], threads: int) -> None:
    """Do what the parent asks for, until it closes the pipe."""
    torch.set_num_threads(threads)
    try:
        contender = build()
        calls = contender.calls()
        pipe.send(read_off(contender))
        while True:
            calls[pipe.recv()]()
            pipe.send(_READY)
    except EOFError:
        return
    except Exception as error:
        pipe.send(error)
