"""Runs a list of commands within a deadline, and goes on after a kill with those not done.

The archive is the only truth. A run begins with what it holds, in a new folder, and after every
piece, and whatever a running piece has finished in the meantime, it is replaced as a whole. So a
kill at any time costs the running pieces and leaves nothing half-written that could be believed.
Nothing here imports torch, which would take seconds of the deadline.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

#: Exit status of a command that made progress, cannot go on, and wants to be started again.
AGAIN = 75
PASSED, FAILED, OVERRAN, CUT = "passed", "failed", "overran", "cut"
EMPTY = "nothing collected"  # the backend is not there; neither passed nor final
_BEGUN = ".begun"
_POLL_SECONDS = 0.05
_PACK_SECONDS = 2.0  # at least so long between two archives with what running pieces finished
_NOTHING_COLLECTED = 5  # pytest's exit status
#: Runs a command that dies when its parent does: what is left of a killed run must not disturb the
#: next one's timing. A program of its own, since Python between fork and exec can wait forever
#: where threads run. 1 is PR_SET_PDEATHSIG.
_TIED = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if os.getppid() != int(sys.argv[1]):
        sys.exit(1)
os.execvp(sys.argv[2], sys.argv[2:])
"""


@dataclass(frozen=True)
class Piece:
    """A command whose outcome is kept as one.

    Attributes:
        stage, name: where its log and its outcome lie in the archive.
        command: its arguments, the program first.
        limit: seconds after which it is killed for good.
        environment: added to that of this process.
        absent: why it cannot run here; empty if it can.
        repeated: in every run, such as a check of the machine or a report.
        kept: files that are copied into the archive when it ends, with their names there.
    """

    stage: str
    name: str
    command: tuple[str, ...]
    limit: float = float("inf")
    environment: Mapping[str, str] = field(default_factory=dict)
    absent: str = ""
    repeated: bool = False
    kept: Mapping[Path, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.stage}/{self.name}"


class Archive:
    """A zip file, and a folder with its contents that is packed into it again and again."""

    def __init__(self, path: Path, folder: Path, earlier: Path | None = None) -> None:
        self.path = path
        self.folder = folder
        self._packed: dict[Path, int] | None = None
        path.parent.mkdir(parents=True, exist_ok=True)
        source = path if path.is_file() else earlier
        if source is not None and source.is_file():
            shutil.unpack_archive(source, folder, "zip")

    def place(self, piece: Piece, suffix: str) -> Path:
        """A piece's log or outcome."""
        path = self.folder / f"{piece}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def outcome(self, piece: Piece) -> dict[str, Any] | None:
        """What is known of a piece."""
        path = self.place(piece, ".json")
        found: dict[str, Any] | None = json.loads(path.read_text()) if path.is_file() else None
        return found

    def done(self, piece: Piece, again: bool = False) -> bool:
        """Whether a piece need not be run; again: unless it passed."""
        outcome = self.outcome(piece)
        final = (PASSED,) if again else (PASSED, FAILED, OVERRAN)
        return not piece.repeated and outcome is not None and outcome["ended"] in final

    def pack(self) -> None:
        """Replace the archive where a file has changed; logs that grow do not count by themselves.

        What is named *.begun is being written; under other names lie whole files.
        """
        paths = [path for path in sorted(self.folder.rglob("*")) if path.suffix != _BEGUN]
        files = {path: path.stat().st_mtime_ns for path in paths if path.is_file()}
        changes = {path: when for path, when in files.items() if path.suffix != ".log"}
        if changes == self._packed:
            return
        begun = self.path.with_name(f"{self.path.name}{_BEGUN}")
        with zipfile.ZipFile(begun, "w", zipfile.ZIP_DEFLATED) as packed:
            for path in files:
                packed.write(path, path.relative_to(self.folder))
        begun.replace(self.path)
        self._packed = changes


@contextlib.contextmanager
def unpacked(path: Path, earlier: Path | None = None) -> Iterator[Archive]:
    """The archive at a path, or the contents of an earlier one, in a folder that is new."""
    with tempfile.TemporaryDirectory(prefix="magsd-evidence-", ignore_cleanup_errors=True) as new:
        yield Archive(path, Path(new), earlier)


class _Running:
    """A piece in a process group of its own."""

    def __init__(self, piece: Piece, archive: Archive, folder: Path | None) -> None:
        self.piece = piece
        self._archive = archive
        self._start = time.monotonic()
        with archive.place(piece, ".log").open("wb") as log:
            log.write(f"$ {shlex.join(piece.command)}\n".encode())
            log.flush()
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _TIED, str(os.getpid()), *piece.command],
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **piece.environment},
                start_new_session=True,
            )

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start

    def ended(self, deadline: float) -> str | None:
        """How it ended, or must end since its time or all time is over. None: it runs."""
        status = self._process.poll()
        if status == AGAIN:
            return CUT
        if status == _NOTHING_COLLECTED and "pytest" in self.piece.command:
            return EMPTY
        if status is not None:
            return PASSED if status == 0 else FAILED
        if self.seconds > self.piece.limit:
            return OVERRAN
        return CUT if time.monotonic() > deadline else None

    def close(self, ended: str, facts: Mapping[str, Any]) -> None:
        """Kill it and all that it started in its group, put down how it ended, keep its files."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for source, name in self.piece.kept.items():
            if source.is_file():
                target = self._archive.folder / name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(source, target)
        outcome = {
            "stage": self.piece.stage,
            "name": self.piece.name,
            "command": shlex.join(self.piece.command),
            "ended": ended,
            "status": self._process.returncode,
            "seconds": round(self.seconds, 1),
            **facts,
        }
        told = self._archive.place(self.piece, ".json")
        told.write_text(json.dumps(outcome, indent=1) + "\n")


def run(
    pieces: Sequence[Piece],
    archive: Archive,
    *,
    deadline: float,
    jobs: int = 1,
    facts: Mapping[str, Any] | None = None,
    folder: Path | None = None,
    again: bool = False,
) -> bool:
    """Run what is not done; False where something was cut short or not begun.

    Args:
        pieces: in order.
        archive: of what is done; it is packed at the end, too.
        deadline: of time.monotonic(), after which nothing runs.
        jobs: how many run at once.
        facts: that stand in every outcome, such as the commit.
        folder: where the commands run; None: here.
        again: run also what failed or took too long.
    """
    waiting = [piece for piece in pieces if not piece.absent and not archive.done(piece, again)]
    running: list[_Running] = []
    packed = time.monotonic()
    complete = True
    try:
        while running or (waiting and time.monotonic() < deadline):
            while waiting and len(running) < jobs and time.monotonic() < deadline:
                running.append(_Running(waiting.pop(0), archive, folder))
            for one in list(running):
                ended = one.ended(deadline)
                if ended is None:
                    continue
                running.remove(one)
                one.close(ended, facts or {})
                if ended == CUT and time.monotonic() < deadline:
                    waiting.insert(0, one.piece)
                elif ended == CUT:
                    complete = False
                print(f"{one.piece}: {ended}, {one.seconds:.0f} s", flush=True)
                packed = float("-inf")
            if time.monotonic() - packed > _PACK_SECONDS:
                archive.pack()
                packed = time.monotonic()
            time.sleep(_POLL_SECONDS)
    finally:
        for one in running:
            one.close(CUT, facts or {})
        archive.pack()
    return complete and not waiting


def summary(pieces: Sequence[Piece], archive: Archive) -> str:
    """A table of all pieces, in Markdown; those of a stage that nobody began share a line."""
    lines = ["| stage | piece | | s | commit |", "| --- | --- | --- | --- | --- |"]
    idle: dict[tuple[str, str], list[str]] = {}
    for piece in pieces:
        outcome = archive.outcome(piece)
        if outcome is None:
            why = f"absent: {piece.absent}" if piece.absent else "not run"
            idle.setdefault((piece.stage, why), []).append(piece.name)
        else:
            ended, seconds = outcome["ended"], f"{outcome['seconds']:.0f}"
            commit = str(outcome.get("commit") or "")[:12]
            lines.append(f"| {piece.stage} | {piece.name} | {ended} | {seconds} | {commit} |")
    for (stage, why), names in idle.items():
        lines.append(f"| {stage} | {', '.join(names)} | {why} | | |")
    return "\n".join(lines) + "\n"


def process_start() -> float:
    """When this process began, by time.monotonic(): imports take their part of a deadline."""
    if sys.platform != "linux":
        return time.monotonic()
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return time.monotonic() - age
