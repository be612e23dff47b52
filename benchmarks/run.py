"""`python -m benchmarks.run`: all benchmarks, their JSON, the report and the charts, in one go."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from benchmarks import report
from benchmarks.harness.device import Device
from benchmarks.harness.machine import folder

_HERE = Path(__file__).parent


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; the exit status is pytest's."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run",
        description=f"{__doc__} Further options go to pytest: see `pytest benchmarks --help`.",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU if there is one")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="JSON; default: results/<machine>/results.json"
    )
    options, others = parser.parse_known_args(arguments)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    out = options.out or _HERE / "results" / folder(Device(device)) / "results.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.unlink(missing_ok=True)
    status = pytest.main(
        [
            str(_HERE),
            f"--device={device}",
            f"--benchmark-json={out}",
            "--benchmark-quiet",
            "--no-header",
            "-q",
            *others,
        ]
    )
    if out.is_file():
        compact(out)
        sys.stdout.write(f"{report.write([out], out.parent)}\n")
    return int(status)


def compact(path: Path) -> None:
    """One line per entry, so that a saved run is small and its differences can be read."""
    saved = json.loads(path.read_text())
    entries = ",\n".join(json.dumps(entry) for entry in saved.pop("benchmarks"))
    head = json.dumps(saved, indent=1).removesuffix("\n}")
    path.write_text(f'{head},\n "benchmarks": [\n{entries}\n]}}\n')


if __name__ == "__main__":
    sys.exit(main())
