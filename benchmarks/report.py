"""`python -m benchmarks.report FILE...`: saved JSON to report.md and charts beside it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.reporting.charts import draw
from benchmarks.reporting.results import Results
from benchmarks.reporting.tables import render


def write(paths: Sequence[Path], folder: Path) -> Path:
    """Report on runs of one machine; returns the path of report.md in the folder."""
    results = Results(paths)
    folder.mkdir(parents=True, exist_ok=True)
    charts = draw(results, folder)
    report = folder / "report.md"
    report.write_text(render(results, charts.get))
    return report


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--out", type=Path, help="folder; default: that of the first file")
    options = parser.parse_args(arguments)
    report = write(options.files, options.out or options.files[0].parent)
    sys.stdout.write(f"{report}\n")


if __name__ == "__main__":
    main()
