"""The command `magsd audit`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from magsd.cli.common import SOURCES, check_json_file, make_console, report_bad, training_config
from magsd.console import say

_SHEET = "pairs.png"


def audit(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help=f"Images: {SOURCES}.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="How images are divided, e.g. fold=2."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help=f"Draw the pairs that look the same: {_SHEET}."),
    ] = None,
    split: Annotated[
        Path | None,
        typer.Option(
            metavar="CSV",
            help="Sides of the images: a run's split.csv, or columns key and split. Default: the "
            "published split, else as magsd train divides them.",
        ),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the report as JSON.")
    ] = None,
) -> None:
    """Can a set be trusted? Copies, patients on two sides, and what gives the class away."""
    import json

    from magsd.audit import audit_source
    from magsd.audit.sheet import draw_pairs
    from magsd.audit.sides import read_sides
    from magsd.data import open_source
    from magsd.outputs import check_folder, disk_errors, has_mark, write_text

    check_json_file(json_file, "source", "pairs", "shortcuts")
    if out is not None:
        check_folder(
            out, "--out", writes=(_SHEET,), is_own=lambda folder: has_mark(folder / _SHEET)
        )
    sides = read_sides(split) if split is not None else None
    config = training_config(list(overrides or ()), None, source, None)
    opened = open_source(source, skip_bad=True)
    console = make_console()
    with console.status("reading images") as status:
        report = audit_source(
            opened,
            sides,
            config=config,
            progress=lambda what, done, total: status.update(f"{what}: {done}/{total}"),
        )
    report_bad(console, report.bad)
    console.print(report)
    if json_file is not None:
        text = json.dumps(report.to_dict(), indent=2, ensure_ascii=False, allow_nan=False)
        write_text(json_file, text + "\n")
    if out is None:
        return
    sheet = out / _SHEET
    with disk_errors(out, "free some space and run the command again"):
        if report.pairs:
            draw_pairs(sheet, opened, report.pairs)
            say(console, f"pairs: {sheet}")
        else:
            sheet.unlink(missing_ok=True)  # of another audit
