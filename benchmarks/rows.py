"""`python -m benchmarks.rows --into FOLDER`: row by row, each in a file of its own when it is done.

For machines that may stop at any time: what has a file is not measured again, and
`python -m benchmarks.report FOLDER/*.json` makes a report of whatever there is.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import call_overhead, growth
from benchmarks.harness.comparison import Comparison
from benchmarks.harness.device import Device, command_line
from benchmarks.harness.machine import now, provenance, rounded, write
from benchmarks.harness.pieces import AGAIN
from benchmarks.harness.session import Group, Outcome, Session
from benchmarks.harness.sizes import MAGSD
from benchmarks.harness.timing import quartiles
from benchmarks.operations import SUBJECTS


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; 1 where a competitor failed, 75 where the device did and the rest can go on."""
    parser = command_line("rows", __doc__)
    parser.add_argument("--into", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--batches", type=int, nargs="+", metavar="B", help="default: all")
    parser.add_argument("--central", action="store_true", help="MAG-SD's central operations alone")
    parser.add_argument("--seconds", type=float, default=2.0, help="of timing per row")
    parser.add_argument("--again", action="store_true", help="measure rows that failed once more")
    parser.add_argument("--max-autotune", action="store_true", help="let it compete: takes minutes")
    parser.add_argument("--quick", action="store_true", help="small sizes: does it work?")
    options = parser.parse_args(arguments)
    session = Session(
        Device(options.device),
        options.seconds,
        tuple(options.batches or ()) or None,
        quick=options.quick,
        autotuned=options.max_autotune,
    )
    told = provenance(session.device)
    status = 0
    for group in groups(session, options.central):
        path = options.into / f"{group}.json"
        failed = _failed(path)
        if failed is None or (failed and options.again):
            outcomes = session.outcomes(group, group.members())
            write(path, json.dumps(told | _saved(outcomes), indent=1) + "\n")
            sys.stdout.write(f"{group}\n")
            sys.stdout.flush()
            if any(_broke_the_device(outcome.error) for outcome in outcomes.values()):
                return AGAIN
        status = status or int(bool(_failed(path)))
    return status


def groups(session: Session, central: bool) -> Iterator[Group]:
    """Everything that is measured, in order of worth."""
    compared = [Comparison(row) for row in session.rows(SUBJECTS)]
    yield from filter(_is_central, compared)
    if not central:
        yield from (group for group in compared if not _is_central(group))
        yield from call_overhead.groups(session)
        yield from growth.groups(session)


def _is_central(group: Comparison) -> bool:
    return group.row.subject.central and group.row.network.name == MAGSD.name


def _failed(path: Path) -> dict[str, str] | None:
    """Members of a saved row that failed; None: it is not there."""
    found: dict[str, str] | None
    found = json.loads(path.read_text())["failed"] if path.is_file() else None
    return found


def _saved(outcomes: dict[str, Outcome]) -> dict[str, Any]:
    """As `pytest benchmarks` saves it, and what has no figures, with the reason."""
    entries = []
    for member, outcome in outcomes.items():
        if outcome.samples is None or outcome.error is not None:
            continue
        times = outcome.samples.seconds
        q1, median, q3 = quartiles(times)
        stats = {"min": min(times), "q1": q1, "median": median, "q3": q3, "rounds": len(times)}
        facts = outcome.facts | {"iterations": outcome.samples.iterations}
        entries.append({"name": member, "stats": rounded(stats), "extra_info": rounded(facts)})
    failed = {name: o.error for name, o in outcomes.items() if o.error is not None}
    return {
        "datetime": now(),
        "absent": {name: o.absent for name, o in outcomes.items() if o.absent is not None},
        "failed": {name: f"{type(error).__name__}: {error}" for name, error in failed.items()},
        "benchmarks": entries,
    }


def _broke_the_device(error: Exception | None) -> bool:
    """After an error of a kernel nothing runs on the device in the same process."""
    text = str(error)
    broken = "CUDA error" in text or "Triton Error [CUDA]" in text
    return broken and "out of memory" not in text


if __name__ == "__main__":
    sys.exit(main())
