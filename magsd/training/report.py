"""What is made at a run's end: evaluation of the best weights, plots, overlays, a closing table."""

from __future__ import annotations

import math
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from magsd.config import Config
from magsd.data import ImageCache, Loader
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
from magsd.outputs import disk_errors
from magsd.training.run import LoadedRun, TrainedRun, load_run

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


def finish_run(trained: TrainedRun, console: Console) -> EvaluationReport:
    """Evaluate the best weights on the validation images, write the results, print a table."""
    folder = trained.folder
    with disk_errors(folder.root, "the checkpoints are kept; free some space and --resume"):
        run = load_run(folder.root)
        report = _evaluate(run, *trained.data.validation_loader(run.config))
        report.to_json(folder.evaluation)
        draw_confusion(report, folder.plots)
        plot_curves(folder.plots / "curves.png", folder.metrics)
        sheet = None
        if run.config.train.overlays:
            sheet = draw_overlays(run, *trained.data.overlay_images(run.config), folder.overlays)
    console.print(report)
    console.print(closing_table(report, run.config, trained, sheet))
    return report


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


def closing_table(
    report: EvaluationReport, config: Config, trained: TrainedRun, sheet: Path | None
) -> Table:
    """Accuracy, attention against a uniform map, throughput, and where things lie."""
    table = Table(title="Run", title_justify="left", title_style="bold", show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    table.add_row("validation accuracy", f"{report.raw.accuracy:.4f}")
    if report.refined is not None:
        table.add_row("  raw + refined logits", f"{report.refined.accuracy:.4f}")
    if report.localization is not None:
        score = report.localization.overall
        table.add_row("attention inside masks", _percent(score.inside))
        table.add_row("  uniform map", f"{_percent(score.uniform)} (ratio {score.gain:.2f})")
    table.add_row("best epoch", f"{trained.best_epoch} of {config.train.epochs}")
    if not math.isnan(trained.images_per_second):
        table.add_row("images/s (training)", f"{trained.images_per_second:.1f}")
    table.add_row("images/s (evaluation)", f"{report.images_per_second:.1f}")
    if sheet is not None:
        table.add_row("overlays", Text(str(sheet)))
    table.add_row("plots", Text(str(trained.folder.plots)))
    table.add_row("checkpoint", Text(str(trained.folder.best)))
    return table


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.1%}"
