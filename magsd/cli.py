"""The command `magsd`: train, evaluate, predict, info."""

from __future__ import annotations

import json
import os
import platform
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from magsd.errors import ConfigError, DataError, MagsdError
from magsd.training.launch import launched, process_rank

try:
    import typer
except ImportError as _error:  # the base install holds the kernels alone
    raise SystemExit(
        f"magsd: {_error.name} is not installed; the command needs: pip install 'magsd[train]'"
    ) from None

if TYPE_CHECKING:
    from rich.console import Console

    from magsd.config import Config
    from magsd.evaluation import EvaluationReport
    from magsd.training.run import LoadedRun

# torch, timm and the rest are imported by the command that needs them: help must be quick.

app = typer.Typer(
    help="Attention-guided classification of chest radiographs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

SOURCES = (
    "folder:DIR, csv:FILE, phantom[:n=..,seed=..,size=..], or a public set (docs/data.md): v7:DIR, "
    "nih:DIR, cohen:DIR, covidx:DIR, cub:DIR, aircraft:DIR, cars:DIR, dogs:DIR; or shards:PATTERN"
)


def main() -> None:
    """Run the command; errors a user can act on are printed without a traceback, exit code 2."""
    if "OMP_WAIT_POLICY" not in os.environ:
        # OpenMP's threads otherwise spin for long while they wait for one another; beside another
        # busy process single training steps then take ten times their time.
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    try:
        app()
    except MagsdError as error:
        place = f" (process {process_rank()})" if process_rank() else ""
        print(f"magsd{place}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except ModuleNotFoundError as error:
        if not _optional(error.name):
            raise
        print(
            f"magsd: {error.name} is not installed; this command needs: pip install 'magsd[train]'",
            file=sys.stderr,
        )
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("magsd: interrupted", file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT) from None
    except BrokenPipeError:
        # Whoever read the output is gone; Python's own flush at exit must not complain again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None


def _optional(name: str | None) -> bool:
    return name is not None and not name.startswith(("magsd", "torch."))


@app.command()
def train(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Override single values, e.g. epochs=20."),
    ] = None,
    config: Annotated[
        str | None,
        typer.Option(metavar="F", help="YAML file, or the name of a packaged configuration."),
    ] = None,
    data: Annotated[
        str | None, typer.Option(metavar="SOURCE", help=f"Images to train on: {SOURCES}.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The run's folder; default runs/NAME-TIME.")
    ] = None,
    kernels: Annotated[
        str | None, typer.Option(metavar="BACKEND", help="auto, reference, cpu, cuda or triton.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the run in --out.")
    ] = False,
) -> None:
    """Train a model. Without --config and --data: a short run on drawn radiographs."""
    from magsd.training.run_folder import RunFolder, default_run_folder

    if resume and overwrite:
        raise ConfigError("--resume and --overwrite exclude each other")
    if resume and out is None:
        raise ConfigError("--resume needs the run's folder: --out DIR")
    if launched() and out is None:
        raise ConfigError("under torchrun the run's folder must be given: --out DIR")
    base = RunFolder(out).load_config() if resume and out is not None else None
    settings = training_config(overrides or [], config, data, kernels, base)
    folder = out if out is not None else default_run_folder(settings.data.source)

    # timm, torchvision and the like take seconds: a wrong key is told before.
    from magsd.training.report import finish_run
    from magsd.training.run import train_run
    from magsd.training.trainer import Interrupted

    console = _console(quiet=process_rank() > 0)
    console.print(f"run: {folder}", highlight=False, soft_wrap=True)
    try:
        trained = train_run(settings, folder, resume=resume, overwrite=overwrite, console=console)
    except Interrupted as stopped:
        console.print(
            f"{signal.Signals(stopped.signum).name}: the step was finished and the state saved; "
            f"go on with: magsd train --resume --out {folder}",
            highlight=False,
            soft_wrap=True,
        )
        raise typer.Exit(128 + stopped.signum) from None
    if process_rank() == 0:
        finish_run(trained, console)


def training_config(
    overrides: list[str],
    config: str | None,
    data: str | None,
    kernels: str | None,
    base: Config | None = None,
) -> Config:
    """What `magsd train` uses: `base` or the published recipe, the file, then single values.

    Without a file, drawn images are trained on as the packaged phantom configuration says; they are
    also what is taken where nothing names a source.
    """
    from magsd.config import load_config, named_source

    values = list(overrides)
    if data is not None:
        values.append(f"data.source={data}")
    source = named_source(values)
    if base is None and config is None and (source is None or source.startswith("phantom")):
        config = "phantom"
    if kernels is not None:
        values.append(f"train.kernels={kernels}")
    return load_config(config, values, base=base)


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")],
    data: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help=f"Images: {SOURCES}. The run's own source, or none: its validation images.",
        ),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the report as JSON.")
    ] = None,
    plots: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where PNGs go; default a folder under RUN/plots."),
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="E.g. train.device=cpu.")
    ] = None,
) -> None:
    """Measure a run's best model: raw and refined logits, and attention inside masks."""
    from magsd.data.shards import is_shards
    from magsd.training.checkpoint import disk_full_as_error
    from magsd.training.report import draw_confusion, evaluate_shards
    from magsd.training.run import load_run
    from magsd.training.run_data import same_source

    console = _console()
    loaded = load_run(run, overrides=tuple(overrides or ()))
    held = loaded.config.data.validation or loaded.config.data.source
    spec = data or held
    own = same_source(spec, held)
    if is_shards(spec):
        console.print(f"epoch {loaded.epoch} of {run}: {spec}", highlight=False, soft_wrap=True)
        report = evaluate_shards(loaded, spec)
    else:
        report = _evaluate_cached(console, loaded, spec, own)
    console.print(report)
    folder = plots or loaded.folder.plots / ("validation" if own else "evaluation")
    with disk_full_as_error(folder, "free some space and run the command again"):
        draw_confusion(report, folder)
        if json_file is not None:
            json_file.parent.mkdir(parents=True, exist_ok=True)
            report.to_json(json_file)
    console.print(f"plots: {folder}", highlight=False, soft_wrap=True)


def _evaluate_cached(console: Console, loaded: LoadedRun, spec: str, own: bool) -> EvaluationReport:
    """Metrics over a source's images; over the validation images where it is the run's own."""
    from magsd.data import read_split
    from magsd.training.report import evaluate_run
    from magsd.training.run_data import open_images, trained_on

    _, cache = open_images(loaded.config, spec, classes=loaded.classes)
    _report_bad(console, cache.bad)
    if own:
        indices = read_split(loaded.folder.split, cache.records).validation
        what = "validation images of the run's own source"
    else:
        indices, what = list(range(len(cache.records))), f"images of {spec}"
        seen = trained_on(loaded.folder.split).intersection(r.key for r in cache.records)
        if seen:
            console.print(
                f"[yellow]warning:[/] {len(seen)} of them have names that the run trained on, "
                f"e.g. {min(seen)}; the figures may flatter",
                highlight=False,
                soft_wrap=True,
            )
    console.print(
        f"epoch {loaded.epoch} of {loaded.folder.root}: {len(indices)} {what}",
        highlight=False,
        soft_wrap=True,
    )
    return evaluate_run(loaded, cache, indices)


@app.command()
def predict(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")],
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="PNG, JPEG or DICOM.")],
    overlay: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write a heat map over each image.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write probabilities as JSON.")
    ] = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave images out that cannot be read.")
    ] = False,
    device: Annotated[
        str | None, typer.Option(metavar="NAME", help="cpu, cuda, ...; default that of the run.")
    ] = None,
) -> None:
    """Classify image files: probabilities, and where the model looked."""
    from magsd.evaluation import predict_images
    from magsd.training.checkpoint import disk_full_as_error
    from magsd.training.run import kernels, load_run
    from magsd.training.run_data import preprocessing_of

    console = _console()
    loaded = load_run(run, overrides=() if device is None else (f"train.device={device}",))
    bad: list[tuple[str, str]] = []
    with (
        disk_full_as_error(overlay or Path(), "free some space and run the command again"),
        kernels(loaded.config),
    ):
        try:
            predictions = predict_images(
                loaded.model,
                images,
                classes=loaded.classes,
                preprocessing=preprocessing_of(loaded.config),
                device=loaded.precision.device,
                precision=loaded.config.train.precision,
                overlay_dir=overlay,
                on_bad=(lambda path, reason: bad.append((str(path), reason))) if skip_bad else None,
            )
        except DataError as error:
            raise DataError(f"{error}; leave out what cannot be read with --skip-bad") from error
        _report_bad(console, bad)
        if json_file is not None:
            json_file.parent.mkdir(parents=True, exist_ok=True)
            json_file.write_text(json.dumps([_as_json(p) for p in predictions], indent=2) + "\n")
    _print_predictions(console, predictions, loaded)


def _as_json(prediction: Any) -> dict[str, Any]:
    return {
        "image": str(prediction.path),
        "label": prediction.label,
        "probabilities": prediction.probabilities,
        "overlay": None if prediction.overlay is None else str(prediction.overlay),
    }


def _print_predictions(console: Console, predictions: list[Any], loaded: LoadedRun) -> None:
    from rich.table import Table

    table = Table()
    table.add_column("image", overflow="fold")
    for name in loaded.classes:
        table.add_column(name, justify="right")
    table.add_column("overlay", overflow="fold")
    for prediction in predictions:
        cells = [
            f"[bold]{value:.3f}[/]" if name == prediction.label else f"{value:.3f}"
            for name, value in prediction.probabilities.items()
        ]
        table.add_row(str(prediction.path), *cells, str(prediction.overlay or ""))
    console.print(table)


def _report_bad(console: Console, bad: list[tuple[str, str]]) -> None:
    if not bad:
        return
    console.print(
        f"left out {len(bad)} images that cannot be read:", highlight=False, soft_wrap=True
    )
    for key, reason in bad[:10]:
        console.print(f"  {key}: {reason}", highlight=False, soft_wrap=True, markup=False)


@app.command()
def info() -> None:
    """Versions, devices, kernel backends and packaged configurations."""
    from importlib.metadata import PackageNotFoundError, version

    import torch

    import magsd_kernels
    from magsd import __version__
    from magsd.config import packaged_configs

    lines = [
        ("magsd", __version__),
        ("python", f"{platform.python_version()} on {platform.platform()}"),
        ("torch", f"{torch.__version__}, {torch.get_num_threads()} CPU threads"),
    ]
    for package in ("timm", "torchvision", "scikit-learn", "opencv-python-headless", "pydicom"):
        try:
            lines.append((package, version(package)))
        except PackageNotFoundError:
            lines.append((package, "not installed"))
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    lines += [(f"cuda:{i}", torch.cuda.get_device_name(i)) for i in range(count)]
    lines += [(f"kernels {name}", state) for name, state in magsd_kernels.backends().items()]
    lines.append(("configurations", ", ".join(packaged_configs())))
    for name, value in lines:
        typer.echo(f"{name:24} {value}")


def _console(*, quiet: bool = False) -> Console:
    from rich.console import Console

    # Files and pipes have no width of their own; rich would break tables at 80 columns.
    known = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(width=None if known else 120, quiet=quiet)
