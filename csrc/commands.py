"""Running compilers: their output as it comes, their failures, what a machine lacks."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from setuptools.errors import CompileError


class NotBuilt(Exception):
    """Why this machine cannot build a library."""


def jobs() -> int:
    """How many compilers run at once."""
    return int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)


def words_of(variable: str) -> list[str]:
    """The words of an environment variable, as a shell would split them."""
    return shlex.split(os.environ.get(variable, ""))


def failure(
    command: tuple[str, ...], flags: Iterable[str], code: str, suffix: str = ".cpp"
) -> str | None:
    """None if the code compiles, else the compiler's message."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe" + suffix)
        source.write_text(code)
        result = subprocess.run(
            [*command, *flags, "-c", str(source), "-o", str(source.with_suffix(".o"))],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    return None if result.returncode == 0 else result.stdout + result.stderr


def gist(message: str) -> str:
    """The line of a compiler's message that names the error."""
    lines = message.strip().splitlines() or ["it gave no message"]
    return next((line for line in lines if re.search("error|fatal", line)), lines[0]).strip()


def output(command: list[str]) -> str:
    """What a command prints."""
    return subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    ).stdout


def run(command: list[str], log_of: Path | None = None) -> None:
    """Run a command and print what it prints, line by line, so that its progress can be seen.

    log_of: print nothing and keep the output beside this file.

    Raises:
        CompileError: the command failed; the message holds its output.
    """
    lines = []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if log_of is None:
                sys.stdout.write(line)
                sys.stdout.flush()
    if log_of is not None:
        Path(f"{log_of}.log").write_text("".join(lines))
    if process.returncode != 0:
        raise CompileError(f"{shlex.join(command)}\n{''.join(lines)}")
