"""Runs programs in forks of a process that has imported what training needs.

Imports take seconds, longer than most of what the tests run. Every line of standard input is a
request in JSON (see `Request`); every line of standard output is the exit status of one, the
negative number of the signal that ended it.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from typing import TypedDict

import torch.distributed.run  # noqa: F401

import magsd.cli
import magsd.evaluation.evaluate
import magsd.training.run  # noqa: F401


class Request(TypedDict):
    """What to run, as Python takes it: `-m MODULE`, `-c CODE` or a script, and its arguments."""

    arguments: list[str]
    environment: dict[str, str]
    folder: str  # to run in
    stdout: str  # files
    stderr: str


def fork_for_each_request() -> Request | None:
    """The request, in the process that runs it; None at the end of the input."""
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            return json.loads(line)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
    return None


def run(request: Request) -> None:
    """Run the program as this one."""
    streams = [(os.devnull, os.O_RDONLY)]
    streams += [(request[name], os.O_WRONLY | os.O_CREAT) for name in ("stdout", "stderr")]
    for number, (path, flags) in enumerate(streams):
        os.dup2(os.open(path, flags), number)
    os.chdir(request["folder"])
    os.environ.update(request["environment"])
    option, *rest = request["arguments"]
    if option == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif option == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(rest[0], {"__name__": "__main__"})
    else:
        sys.argv = [option, *rest]
        runpy.run_path(option, run_name="__main__")


if (request := fork_for_each_request()) is not None:
    run(request)
