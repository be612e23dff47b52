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
from benchmarks.harness.machine import RESTRICTIONS, RESULTS, folder, restricted


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; the exit status is pytest's, or 1 where --strict finds a row behind a rival."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = command_line(
        "run", f"{__doc__} Further options go to pytest: see `pytest benchmarks --help`."
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="JSON; default: results/<machine>/results.json, and with -k none",
    )
    parser.add_argument("-k", metavar="EXPRESSION", help="a part of the benchmarks, as in pytest")
    parser.add_argument(
        "--capability",
        choices=RESTRICTIONS,
        help="hold torch, its libraries and our kernels back to this instruction set",
    )
    parser.add_argument("--strict", action="store_true", help=report.STRICT)
    options, others = parser.parse_known_args(arguments)
    environment = restricted(options.capability) if options.capability else None
    if environment is not None:  # the libraries read it when they are loaded
        again = [sys.executable, "-m", "benchmarks.run", *arguments]
        return subprocess.run(again, env=environment, check=False).returncode
    command = [f"--device={options.device}", *([f"-k={options.k}"] if options.k else []), *others]
    if options.out is None and options.k:  # a part must not replace the whole
        with tempfile.TemporaryDirectory() as scratch:
            out = Path(scratch) / "results.json"
            return _measure(out, command, options.strict, kept=False)
    out = options.out or RESULTS / folder(Device(options.device)) / "results.json"
    return _measure(out, command, options.strict)


def _measure(out: Path, options: Sequence[str], strict: bool, kept: bool = True) -> int:
    out.parent.mkdir(parents=True, exist_ok=True)
    out.unlink(missing_ok=True)
    here = str(Path(__file__).parent)
    command = [here, f"--benchmark-json={out}", "--benchmark-quiet", "--no-header", "-q"]
    status = int(pytest.main([*command, *options]))
    if not out.is_file():
        return status or int(strict)
    compact(out)
    written = report.write([out], out.parent)
    sys.stdout.write(f"{written}\n" if kept else written.read_text())
    behind = report.judge([out]) if strict else 0
    return status or behind


def compact(path: Path) -> None:
    """One line per entry, so that a saved run is small and its differences can be read."""
    saved = json.loads(path.read_text())
    entries = ",\n".join(json.dumps(entry) for entry in saved.pop("benchmarks"))
    head = json.dumps(saved, indent=1).removesuffix("\n}")
    path.write_text(f'{head},\n "benchmarks": [\n{entries}\n]}}\n')


if __name__ == "__main__":
    sys.exit(main())
