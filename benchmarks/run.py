"""`python -m benchmarks.run`: all benchmarks, their JSON, the report and the charts, in one go."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks import report
from benchmarks.harness.device import Device, command_line
from benchmarks.harness.machine import RESTRICTIONS, RESULTS, folder, restricted, write

_OUT = "JSON; default: results/<machine>/results.json, and with -k none"
_ROWS = "a file for each row once it is measured, and no more; rows with one are left out"
_CAPABILITY = "hold torch, its libraries and our kernels back to this instruction set"


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; the exit status is pytest's, or 1 where --strict finds a row behind a rival."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    help_ = f"{__doc__} Further options go to pytest: see `pytest benchmarks --help`."
    parser = command_line("run", help_)
    add = parser.add_argument
    add("--out", type=Path, metavar="FILE", help=_OUT)
    add("--rows", type=Path, metavar="FOLDER", help=_ROWS)
    add("-k", metavar="EXPRESSION", help="a part of the benchmarks, as in pytest")
    add("--capability", choices=RESTRICTIONS, help=_CAPABILITY)
    add("--strict", action="store_true", help=report.STRICT)
    options, others = parser.parse_known_args(arguments)
    environment = restricted(options.capability) if options.capability else None
    if environment is not None:  # the libraries read it when they are loaded
        again = [sys.executable, "-m", "benchmarks.run", *arguments]
        return subprocess.run(again, env=environment, check=False).returncode
    selected = [f"-k={options.k}"] if options.k else []
    command = [str(Path(__file__).parent), f"--device={options.device}", *selected, *others]
    if options.rows:
        status = _measure(options.rows, command)
        failed = (json.loads(path.read_text())["failed"] for path in options.rows.glob("*.json"))
        return status or int(any(failed))
    with tempfile.TemporaryDirectory() as scratch:
        rows = Path(scratch)
        status = _measure(rows, command)
        files = report.in_order(rows)
        if not files:
            return status or int(options.strict)
        part = options.k and not options.out  # which must not replace the whole
        results = rows if part else RESULTS / folder(Device(options.device))
        out = options.out or results / "results.json"
        join(files, out)
        written = report.write([out], out.parent)
        print(written.read_text() if part else written)
        return status or (report.judge([out]) if options.strict else 0)


def _measure(rows: Path, command: Sequence[str]) -> int:
    options = [f"--rows={rows}", "--benchmark-quiet", "--no-header", "-q"]
    return int(pytest.main([*command, *options]))


def join(files: Sequence[Path], out: Path) -> None:
    """One line per entry, so that a saved run is small and its differences can be read."""
    rows = [json.loads(path.read_text()) for path in files]
    entries = ",\n".join(json.dumps(entry) for row in rows for entry in row["benchmarks"])
    shared = {name: rows[0][name] for name in ("machine_info", "commit_info", "datetime")}
    head = json.dumps(shared, indent=1).removesuffix("\n}")
    write(out, f'{head},\n "benchmarks": [\n{entries}\n]}}\n')


if __name__ == "__main__":
    sys.exit(main())
