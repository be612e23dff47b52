"""The command `magsd localize`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from magsd.cli.common import ClassesOption, DataOption, make_console, select_images
from magsd.console import say


def localize(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where scores, boxes and PNGs go.")],
    data: DataOption = None,
    classes: ClassesOption = None,
    threshold: Annotated[
        float,
        typer.Option(min=0.0, max=1.0, help="Boxes hold pixels from this share of the maximum on."),
    ] = 0.5,
    tolerance: Annotated[
        float,
        typer.Option(
            min=0.0,
            help="How far from a mask the maximum may lie in the pointing game, in pixels of the "
            "network's input; often 15.",
        ),
    ] = 0.0,
    overlays: Annotated[
        int, typer.Option(min=0, metavar="N", help="Number of overlays, the classes in turn.")
    ] = 16,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="E.g. train.device=cpu.")
    ] = None,
) -> None:
    """Boxes around what a run's model looks at, and how well they meet the masks."""
    from magsd.data import open_source
    from magsd.data.run_data import plain_loader
    from magsd.data.run_sides import meant_images
    from magsd.evaluation.examples import draw_boxes
    from magsd.evaluation.localization import localization_report, localize, write_boxes
    from magsd.evaluation.tables import map_scores_table
    from magsd.outputs import check_folder, disk_errors, has_json
    from magsd.training.run import load_run

    check_folder(
        out,
        "--out",
        writes=("localization.json", "boxes.csv", "overlays"),
        is_own=lambda folder: has_json(folder / "localization.json", "threshold", "per_class"),
    )
    console = make_console()
    loaded = load_run(run, overrides=tuple(overrides or ()))
    cache, indices, _ = select_images(console, loaded, data, classes)
    settings = {"threshold": threshold, "tolerance": tolerance}
    found = localize(
        loaded.model,
        plain_loader(loaded.config, cache, indices, loaded.classes),
        cache,
        runtime=loaded.runtime,
        **settings,
    )
    report = localization_report(
        found, cache.records, loaded.classes, image_size=cache.image_size, **settings
    )
    spec, _ = meant_images(loaded.config, loaded.folder.split, data)
    source = open_source(spec, skip_bad=True)
    with disk_errors(out, "free some space and run the command again"):
        out.mkdir(parents=True, exist_ok=True)
        report.to_json(out / "localization.json")
        write_boxes(
            out / "boxes.csv",
            found,
            cache,
            loaded.classes,
            size_of=lambda record: source.read_image(record).shape[:2],
        )
        if overlays:
            draw_boxes(out / "overlays", found, cache, loaded.classes, overlays)
    if report.overall.means is None:
        console.print("no mask to compare the maps with: boxes alone were written")
    else:
        console.print(map_scores_table(report))
    say(console, f"boxes, scores and overlays: {out}")
