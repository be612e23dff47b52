"""`python -m benchmarks.rows --into FOLDER`: row by row, each in a file of its own when it is done.

For machines that may stop at any time: what has a file is not measured again, and
`python -m benchmarks.report FOLDER/*.json` makes a report of whatever there is.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from cpuinfo import get_cpu_info
from pytest_benchmark.utils import get_commit_info

from benchmarks import (
    attention_augment,
    attention_sampling,
    bilinear_pool,
    call_overhead,
    growth,
    multiscale_attention,
    soft_distance,
)
from benchmarks.harness.comparison import Comparison
from benchmarks.harness.device import Device
from benchmarks.harness.machine import describe
from benchmarks.harness.pieces import AGAIN
from benchmarks.harness.recording import rounded, write
from benchmarks.harness.session import Group, Outcome, Session
from benchmarks.harness.sizes import MAGSD
from benchmarks.harness.timing import quartiles

_OPERATIONS = (
    attention_augment,
    bilinear_pool,
    multiscale_attention,
    soft_distance,
    attention_sampling,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; 1 where a competitor failed, 75 where the device did and the rest can go on."""
    options = _options(arguments)
    device = Device(options.device)
    session = Session(
        device,
        seconds=options.seconds,
        batches=tuple(options.batches) if options.batches else None,
        precisions=None,
        quick=options.quick,
        autotuned=options.max_autotune,
    )
    commit = get_commit_info()
    told = {
        "machine_info": describe(device, get_cpu_info().get("brand_raw", "unknown")),
        "commit_info": {name: commit.get(name) for name in ("id", "dirty")},
    }
    status = 0
    for group in groups(session, options.central):
        path = options.into / f"{group}.json"
        if not _measured(path, options.again):
            outcomes = session.outcomes(group, group.members())
            write(path, json.dumps(told | _saved(outcomes), indent=1) + "\n")
            sys.stdout.write(f"{group}\n")
            sys.stdout.flush()
            if any(_broke_the_device(outcome.error) for outcome in outcomes.values()):
                return AGAIN
        status = status or int(bool(json.loads(path.read_text())["failed"]))
    return status


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rows", description=__doc__)
    parser.add_argument("--into", type=Path, required=True, metavar="FOLDER")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--batches", type=int, nargs="+", metavar="B", help="default: all")
    parser.add_argument("--central", action="store_true", help="MAG-SD's central operations alone")
    parser.add_argument("--seconds", type=float, default=2.0, help="of timing per row")
    parser.add_argument("--again", action="store_true", help="measure rows that failed once more")
    parser.add_argument("--max-autotune", action="store_true", help="let it compete: takes minutes")
    parser.add_argument("--quick", action="store_true", help="small sizes: does it work?")
    return parser.parse_args(arguments)


def groups(session: Session, central: bool) -> Iterator[Group]:
    """Everything that is measured, in order of worth."""
    compared = [group for module in _OPERATIONS for group in module.groups(session)]
    compared.sort(key=lambda group: not _is_central(group))
    if central:
        yield from filter(_is_central, compared)
        return
    yield from compared
    yield from call_overhead.groups(session)
    yield from growth.groups(session)


def _is_central(group: Comparison) -> bool:
    return group.row.subject.central and group.row.network.name == MAGSD.name


def _measured(path: Path, again: bool) -> bool:
    """Whether a row has its file; again: one without failures."""
    return path.is_file() and not (again and json.loads(path.read_text())["failed"])


def _saved(outcomes: dict[str, Outcome]) -> dict[str, Any]:
    """As `pytest benchmarks` saves it, and what has no figures, with the reason."""
    entries = []
    for member, outcome in outcomes.items():
        if outcome.samples is None or outcome.error is not None:
            continue
        seconds = outcome.samples.seconds
        q1, median, q3 = quartiles(seconds)
        stats = {"min": min(seconds), "q1": q1, "median": median, "q3": q3, "rounds": len(seconds)}
        facts = outcome.facts | {"iterations": outcome.samples.iterations}
        entries.append({"name": member, "stats": rounded(stats), "extra_info": rounded(facts)})
    return {
        "datetime": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
        "absent": {name: o.absent for name, o in outcomes.items() if o.absent is not None},
        "failed": {name: _told(o.error) for name, o in outcomes.items() if o.error is not None},
        "benchmarks": entries,
    }


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _broke_the_device(error: Exception | None) -> bool:
    """After an error of a kernel nothing runs on the device in the same process."""
    text = str(error)
    broken = "CUDA error" in text or "Triton Error [CUDA]" in text
    return broken and "out of memory" not in text


if __name__ == "__main__":
    sys.exit(main())
