"""Contenders in a process of their own, which leaves the C library's malloc as it is.

Our trainer keeps the memory that tensors free (`torch_settings.kept_memory`), a setting of the
whole process. The released code does not: next to our steps it would gain from what is ours.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import torch

from benchmarks.harness.timing import Call

_DONE = "done"


class Elsewhere:
    """A process that makes contenders and runs their steps, one at a time.

    It is asked through a pipe and ends with this object, which holds the other end.
    """

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, torch.get_num_threads()), daemon=True
        )
        self._process.start()
        theirs.close()

    def ask(self, *request: Any) -> Any:
        """The answer to a request; an exception there is raised here."""
        self._pipe.send(request)
        try:
            answer = self._pipe.recv()
        except EOFError:
            self._process.join()
            code = self._process.exitcode
            raise RuntimeError(f"the other process ended with exit code {code}") from None
        if isinstance(answer, Exception):
            raise answer
        return answer


class Remote:
    """A contender that `build` makes in another process.

    read_off: called there once, with the contender; `facts` is what it returns.
    """

    def __init__(
        self,
        process: Elsewhere,
        build: Callable[[], Any],
        read_off: Callable[[Any], Any],
        batches: int,
    ) -> None:
        self._process = process
        self._batches = batches
        self._number, self.facts = process.ask(build, read_off)

    def calls(self) -> list[Call]:
        """What is timed, one call per batch."""
        return [partial(self._process.ask, self._number, batch) for batch in range(self._batches)]


def _serve(pipe: Connection, threads: int) -> None:
    """Answer requests until the other end is closed."""
    torch.set_num_threads(threads)
    contenders: list[Any] = []
    while True:
        try:
            request = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(_answer(contenders, request))
        except Exception as error:
            pipe.send(error)


def _answer(contenders: list[Any], request: Sequence[Any]) -> Any:
    first, second = request
    if not callable(first):
        contenders[first].calls()[second]()
        return _DONE
    contenders.append(first())
    return len(contenders) - 1, second(contenders[-1])
