"""`python -m benchmarks.report FILE...`: saved JSON to report.md and charts beside it."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.reporting.charts import draw
from benchmarks.reporting.results import AHEAD, Results
from benchmarks.reporting.tables import render

STRICT = f"fail where a rival takes less than {AHEAD:g}x our time (lower quartile of the ratio)"


def write(paths: Sequence[Path], folder: Path) -> Path:
    """Report on runs of one machine; returns the path of report.md in the folder."""
    results = Results(paths)
    folder.mkdir(parents=True, exist_ok=True)
    charts = draw(results, folder)
    report = folder / "report.md"
    report.write_text(render(results, charts))
    return report


def judge(paths: Sequence[Path]) -> int:
    """Print the rows where ours is not ahead of every rival; 1 where there are any, else 0."""
    found = Results(paths).shortfalls()
    for line in found:
        sys.stdout.write(f"short of {AHEAD:g}x: {line}\n")
    return int(bool(found))


def in_order(folder: Path) -> list[Path]:
    """The JSON in a folder, as it was measured."""
    times = {path: json.loads(path.read_text())["datetime"] for path in folder.glob("*.json")}
    return sorted(times, key=times.__getitem__)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; the exit status is 1 where --strict finds a row that falls short."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument(
        "files", nargs="+", type=Path, metavar="FILE", help="JSON, or a folder with some"
    )
    parser.add_argument("--out", type=Path, help="folder; default: that of the first file")
    parser.add_argument("--strict", action="store_true", help=STRICT)
    options = parser.parse_args(arguments)
    files = [
        file for path in options.files for file in (in_order(path) if path.is_dir() else [path])
    ]
    if not files:
        parser.error("no JSON is there")
    report = write(files, options.out or files[0].parent)
    sys.stdout.write(f"{report}\n")
    return judge(files) if options.strict else 0


if __name__ == "__main__":
    sys.exit(main())
