"""What is made at a run's end: evaluation of the best weights, plots, overlays, a closing table."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console

from magsd.console import say
from magsd.data import ImageCache, Loader, Record
from magsd.data.record import SIDES, Side
from magsd.data.run_data import plain_loader, shard_loader
from magsd.data.shards import open_shards
from magsd.evaluation import (
    EvaluationReport,
    evaluate,
    plot_confusion,
    plot_curves,
    write_overlays,
)
from magsd.evaluation.ensemble import TTA
from magsd.evaluation.plots import write_classes, write_confusion
from magsd.outputs import disk_errors, write_atomically
from magsd.reporting.operating import fit_operating_points, write_operating_points
from magsd.reporting.predictions import write_predictions
from magsd.reporting.rules import Rule
from magsd.training.closing import SELECTED, closing_table, operating_table
from magsd.training.run import LoadedRun, TrainedRun, load_run
from magsd.training.run_predictions import joined, predictions_table, records_of

#: What `draw_confusion` writes.
PLOTS = (
    *("confusion.png", "confusion.csv", "confusion_refined.png", "confusion_refined.csv"),
    "per_class.csv",
)


def evaluate_run(
    run: LoadedRun, cache: ImageCache, indices: list[int], *, tta: TTA = None
) -> EvaluationReport:
    """Metrics of a run's model over some images of a cache."""
    return _evaluate(run, plain_loader(run.config, cache, indices, run.classes), cache, tta)


def evaluate_shards(run: LoadedRun, spec: str, *, tta: TTA = None) -> EvaluationReport:
    """Metrics of a run's model over all images of the shards that `spec` names."""
    index = open_shards(spec, classes=run.classes)
    return _evaluate(run, shard_loader(run.config, index), None, tta)


def _evaluate(
    run: LoadedRun, loader: Loader, cache: ImageCache | None, tta: TTA = None
) -> EvaluationReport:
    return evaluate(run.model, loader, cache, classes=run.classes, runtime=run.runtime, tta=tta)


def shard_records(run: LoadedRun, spec: str, report: EvaluationReport) -> list[Record]:
    """Records of the images of a report by `evaluate_shards`."""
    index = open_shards(spec, classes=run.classes)
    return records_of(report, shard_loader(run.config, index), None)


def finish_run(trained: TrainedRun, console: Console) -> EvaluationReport:
    """Measure the best weights on validation and test images, write the results, print tables.

    Returns the report of the test side, or of the validation side where there is no other.
    """
    folder, data = trained.folder, trained.data
    with disk_errors(folder.root, "the checkpoints are kept; free some space and --resume"):
        run = load_run(folder.root)
        side = data.reported
        reports: dict[Side, EvaluationReport] = {}
        tables = []
        for each in SIDES[SIDES.index("validation") : SIDES.index(side) + 1]:
            loader, cache = data.side_loader(run.config, each)
            reports[each] = _evaluate(run, loader, cache)
            records = records_of(reports[each], loader, cache)
            tables.append(predictions_table(reports[each], records, each, name=folder.root.name))
        report, table = reports[side], joined(tables)
        rule = Rule.parse(run.config.train.operating_point)
        points = fit_operating_points(table.side("validation"), rule)
        text = report_json(report, side, reports["validation"])
        write_predictions(folder.predictions, table)
        write_operating_points(folder.operating, points)
        # The last: where it lies, the others are whole.
        write_atomically(folder.evaluation, lambda file: file.write(text.encode()))
        draw_confusion(report, folder.plots)
        plot_curves(folder.plots / "curves.png", folder.metrics)
        sheet = None
        if run.config.train.overlays:
            sheet = draw_overlays(run, *data.overlay_images(run.config, side), folder.overlays)
    say(console, f"{report.raw.images} images; {SELECTED[side]}", first=f"{side} side:")
    console.print(report)
    console.print(operating_table(points, table))
    console.print(closing_table(reports, run.config, trained, sheet))
    return report


def report_json(
    report: EvaluationReport, side: str, validation: EvaluationReport | None = None
) -> str:
    """A report as JSON text: which images it is of, and what is known of the validation images.

    side: as in a table of predictions. validation: of the same run, which is left out where it is
    the report itself.
    """
    values = {"side": side, **report.to_dict()}
    if validation is not None and validation is not report:
        values["validation"] = validation.to_dict()
    return json.dumps(values, indent=2, allow_nan=False) + "\n"


def draw_confusion(report: EvaluationReport, folder: Path) -> None:
    """Confusion matrices of the raw and, where there are any, of the refined logits.

    Also as CSV, with one of the numbers of every class.
    """
    kinds = {"raw": report.raw} | ({"refined": report.refined} if report.refined else {})
    for kind, metrics in kinds.items():
        name = "confusion" if kind == "raw" else "confusion_refined"
        title = "raw logits" if kind == "raw" else "raw + refined logits"
        plot_confusion(folder / f"{name}.png", metrics.confusion, report.classes, title=title)
        write_confusion(folder / f"{name}.csv", metrics.confusion, report.classes)
    write_classes(folder / "per_class.csv", kinds)


def draw_overlays(run: LoadedRun, cache: ImageCache, indices: list[int], folder: Path) -> Path:
    """Heat maps over up to `train.overlays` of the images; returns the contact sheet's path."""
    return write_overlays(
        run.model,
        cache,
        indices,
        folder,
        classes=run.classes,
        limit=run.config.train.overlays,
        runtime=run.runtime,
    )
