"""What `torchrun` tells a process by environment variables; nothing here needs torch."""

from __future__ import annotations

import os
import socket


def launched() -> bool:
    """True for a process that `torchrun` started."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def process_rank() -> int:
    """Place of this process among all, from 0."""
    return int(os.environ["RANK"]) if launched() else 0


def process_count() -> int:
    """Processes on all machines together."""
    return int(os.environ["WORLD_SIZE"]) if launched() else 1


def local_rank() -> int:
    """Place of this process among those of its machine."""
    return int(os.environ["LOCAL_RANK"]) if launched() else 0


def restarts() -> int:
    """How often this machine's processes were started again after one had failed."""
    return int(os.environ["TORCHELASTIC_RESTART_COUNT"]) if launched() else 0


def launch_name() -> str:
    """The same in every try of one start, seen from the leader's machine."""
    name = os.environ["TORCHELASTIC_RUN_ID"]
    # Without a name that the user or --standalone gave: the launcher's own process.
    return f"{socket.gethostname()} {os.getppid()}" if name == "none" else name
