"""The command `magsd report`."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from magsd.cli.common import make_console
from magsd.console import say

if TYPE_CHECKING:
    from rich.table import Table

    from magsd.reporting.page.contents import Contents
    from magsd.reporting.page.inputs import Input


class _Cluster(str, Enum):
    patient = "patient"
    image = "image"


class _Aggregate(str, Enum):
    mean = "mean"
    max = "max"


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN|FILE...",
            help="A run's folder, the folder of a cross-validation, or any predictions.csv "
            "(docs/reporting.md). Others are compared with the first.",
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where page and tables go.")],
    rule: Annotated[
        str | None,
        typer.Option(
            metavar="RULE",
            help="Thresholds, fitted on validation rows: youden, sensitivity=0.95, "
            "specificity=0.9, cost=5:1 or argmax; default that of the run, else youden.",
        ),
    ] = None,
    resamples: Annotated[int, typer.Option(min=100, metavar="N", help="Of the bootstrap.")] = 2000,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Of the bootstrap.")] = 0,
    by: Annotated[_Cluster, typer.Option(help="What is resampled.")] = _Cluster.patient,
    aggregate: Annotated[
        _Aggregate, typer.Option(help="A patient's probability, of those of the images.")
    ] = _Aggregate.mean,
    aggregate_by: Annotated[
        str,
        typer.Option(metavar="COLUMN", help="Whose images are aggregated: patient, or a column."),
    ] = "patient",
    subgroup: Annotated[
        list[str] | None,
        typer.Option(
            metavar="COLUMN[=EDGE,EDGE]",
            help="Measure by this column, numbers between edges; may be repeated; default the "
            "first six further columns of two to ten values.",
        ),
    ] = None,
    audit: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Of `magsd audit`; default audit.json in the first RUN."),
    ] = None,
    name: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Of a model, once for each, in their order."),
    ] = None,
    images: Annotated[
        int, typer.Option(min=0, metavar="N", help="Wrong and right images that are shown.")
    ] = 6,
) -> None:
    """A page with tables, intervals and curves from predictions, and its numbers as CSV and JSON.

    Test rows are reported, or external ones; without any the validation rows, which the page says.
    """
    from magsd.reporting.bootstrap import Resampling
    from magsd.reporting.page.audit import read_audit
    from magsd.reporting.page.contents import Options, build
    from magsd.reporting.page.files import check_out, write_files
    from magsd.reporting.page.inputs import find_inputs
    from magsd.reporting.page.pictures import draw_pictures
    from magsd.reporting.page.render import card, page
    from magsd.reporting.rules import Rule

    options = Options(
        None if rule is None else Rule.parse(rule),
        Resampling(resamples, seed, cluster=by.value),
        aggregate.value,
        aggregate_by,
        None if subgroup is None else tuple(subgroup),
    )
    check_out(out)
    inputs = find_inputs(runs, name or ())
    file = audit or _audit_of(inputs)
    found = None if file is None else read_audit(file)
    console = make_console()
    with console.status("reading predictions") as status:
        contents = build(
            inputs,
            options,
            audit=found,
            progress=lambda model: status.update(f"resampling: {model}"),
        )
        status.update("drawing")
        pictures = draw_pictures(contents.models, images)
        write_files(out, contents, page(contents, pictures), card(contents))
    console.print(_closing_table(contents))
    say(console, f"report: {out / 'report.html'}")


def _audit_of(inputs: list[Input]) -> Path | None:
    """The audit that lies in the first run's folder, if one does."""
    run = inputs[0].run
    return run / "audit.json" if run is not None and (run / "audit.json").is_file() else None


def _closing_table(contents: Contents) -> Table:
    """The main measures with their intervals, a row a model."""
    from rich.table import Table
    from rich.text import Text

    from magsd.reporting.measures import OVERALL
    from magsd.reporting.page.words import images, method, number, span

    measures = ("accuracy", "balanced_accuracy", "auroc")
    title = f"{contents.models[0].main.images:,} {images(contents)}"
    table = Table(title=f"{title}. {method(contents)}", title_justify="left", title_style="bold")
    table.add_column("model", overflow="fold")
    for measure in measures:
        table.add_column(OVERALL[measure], justify="right")
    for model in contents.models:
        cells: list[Any] = [Text(model.name)]
        for measure in measures:
            interval = model.main.overall[measure]
            limits = f" ({span(interval)})" if span(interval) else ""
            cells.append(number(interval.value) + limits)
        table.add_row(*cells)
    return table
