"""The command `magsd predict`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from magsd.cli.common import check_json_file, make_console, report_bad
from magsd.cli.ensembles import TtaOption, runs_first, tta_of, warn_of_mirrors
from magsd.console import say
from magsd.errors import ConfigError, DataError, RunError

if TYPE_CHECKING:
    from rich.console import Console

    from magsd.evaluation import Prediction
    from magsd.reporting.operating import OperatingPoint
    from magsd.training.run import LoadedRun


def predict(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN... IMAGE...",
            help="Folders of runs, whose mean is taken; then PNG, JPEG, DICOM ...",
        ),
    ],
    overlay: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write a heat map over each image.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write probabilities as JSON.")
    ] = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave images out that cannot be read.")
    ] = False,
    tta: TtaOption = None,
    device: Annotated[
        str | None, typer.Option(metavar="NAME", help="cpu, cuda, ...; default that of the run.")
    ] = None,
) -> None:
    """Classify image files: probabilities, and where the model looked."""
    from magsd.evaluation import predict_ensemble
    from magsd.evaluation.predict import overlay_names, with_findings
    from magsd.evaluation.tables import predictions_table
    from magsd.outputs import check_folder, disk_errors, write_text
    from magsd.training.ensemble import ensemble_of
    from magsd.training.run import load_run

    runs, names = runs_first(words)
    if not names:
        raise ConfigError(f"no images: name some after {runs[-1]}")
    mirrored, images = tta_of(tta), [Path(name) for name in names]
    check_json_file(json_file, "image", "probabilities")
    if overlay is not None:
        check_folder(overlay, "--overlay")
        if json_file in overlay_names(images, overlay):
            raise ConfigError(f"--json {json_file}: an overlay is written there; name another file")
    console = make_console()
    overrides = () if device is None else (f"train.device={device}",)
    loaded = [load_run(run, overrides=overrides) for run in runs]
    ensemble = ensemble_of(loaded)
    if mirrored:
        warn_of_mirrors(console, loaded)
    point = _operating_point(console, loaded, mirrored is not None)
    bad: list[tuple[str, str]] = []
    with disk_errors(overlay or Path(), "free some space and run the command again"):
        try:
            predictions = predict_ensemble(
                ensemble,
                images,
                tta=mirrored,
                overlay_dir=overlay,
                on_bad=(lambda path, reason: bad.append((str(path), reason))) if skip_bad else None,
            )
        except DataError as error:
            raise DataError(f"{error}; leave out what cannot be read with --skip-bad") from error
    report_bad(console, bad)
    if not predictions:
        raise DataError(f"none of the {len(images)} images can be read")
    if point is not None:
        predictions = with_findings(predictions, point)
    if json_file is not None:
        items = [_as_json(prediction) for prediction in predictions]
        write_text(json_file, json.dumps(items, indent=2, allow_nan=False) + "\n")
    console.print(predictions_table(predictions, ensemble.classes, console.width))


def _operating_point(
    console: Console, runs: Sequence[LoadedRun], mirrored: bool
) -> OperatingPoint | None:
    """Of the refined predictions of a single run, if it has one; a line says why it is not used."""
    from magsd.reporting.operating import read_operating_points

    files = [run.folder.operating for run in runs]
    if not any(file.is_file() for file in files):
        return None
    if len(runs) > 1 or mirrored:
        what = "a single model" if len(runs) > 1 else "images without their mirrors"
        say(console, f"operating points are not used: they were fitted for {what}")
        return None
    points = read_operating_points(files[0])
    if points.classes != runs[0].classes or points.refined is None:
        raise RunError(
            f"{files[0]}: was fitted for another model, of the classes "
            f"{', '.join(points.classes)}; remove it, or train again"
        )
    return points.refined


def _as_json(prediction: Prediction) -> dict[str, Any]:
    item: dict[str, Any] = {
        "image": str(prediction.path),
        "label": prediction.label,
        "probabilities": prediction.probabilities,
        "overlay": None if prediction.overlay is None else str(prediction.overlay),
    }
    if prediction.findings is not None:
        item |= {"calibrated": prediction.calibrated, "findings": list(prediction.findings)}
    return item
