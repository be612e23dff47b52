"""The command `magsd`: its commands are `app.command`s here and in the modules beside."""

from __future__ import annotations

import io
import json
import logging
import os
import platform
import shlex
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

from magsd.cli.common import (
    CLASSES_HELP,
    SOURCES,
    check_json_file,
    make_console,
    report_bad,
    select_images,
    training_config,
)
from magsd.console import say
from magsd.errors import ConfigError, DataError, MagsdError
from magsd.launch import launched, process_rank

try:
    import typer
    from typer.core import TyperGroup
except ImportError as _error:  # the base install holds the kernels alone
    raise SystemExit(
        f"magsd: {_error.name} is not installed; the command needs: pip install 'magsd[train]'"
    ) from None

from magsd.cli.auditing import audit
from magsd.cli.cross_validation import crossval
from magsd.cli.inspection import inspect
from magsd.cli.localization import localize
from magsd.cli.shards import shards

# torch, timm and the rest are imported by the command that needs them: help must be quick.


class _Stopped(Exception):
    """Ctrl-C, with what was going on: typer would end the process without a word of it."""


class _Commands(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stopped:
            raise _Stopped(*stopped.args) from None


app = typer.Typer(
    cls=_Commands,
    help="Attention-guided classification of chest radiographs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Run the command; errors a user can act on are printed without a traceback, exit code 2."""
    if "OMP_WAIT_POLICY" not in os.environ:
        # OpenMP's threads otherwise spin for long while they wait for one another; beside another
        # busy process single training steps then take ten times their time.
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A pipe's encoding, or a file name that is no text, must not end a run that is done.
        sys.stdout.reconfigure(errors="backslashreplace")
    logging.basicConfig(format="%(levelname)s: %(message)s")
    if process_rank():  # the first process says for all what is to be noted
        logging.getLogger("magsd").setLevel(logging.ERROR)
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
    except (KeyboardInterrupt, _Stopped) as stopped:
        print(": ".join(["magsd: interrupted", *map(str, stopped.args)]), file=sys.stderr)
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

    # timm, torchvision and the like take seconds: a wrong key raises its error before that.
    from magsd.training.report import finish_run
    from magsd.training.run import train_run
    from magsd.training.trainer import Interrupted

    console = make_console(quiet=process_rank() > 0)
    say(console, f"run: {folder}")
    try:
        trained = train_run(settings, folder, resume=resume, overwrite=overwrite, console=console)
    except Interrupted as stopped:
        say(
            console,
            f"{signal.Signals(stopped.signum).name}: the step was finished and the state saved; "
            f"resume with: magsd train --resume --out {shlex.quote(str(folder))}",
        )
        raise typer.Exit(128 + stopped.signum) from None
    if process_rank() == 0:
        finish_run(trained, console)


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
    classes: Annotated[
        str | None, typer.Option(metavar="'THEIRS=OURS,...'", help=CLASSES_HELP)
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
    from magsd.data.run_data import same_source
    from magsd.data.shards import is_shards
    from magsd.outputs import check_folder, disk_errors, has_mark, write_text
    from magsd.training.report import PLOTS, draw_confusion, evaluate_run, evaluate_shards
    from magsd.training.run import load_run
    from magsd.training.run_folder import RunFolder

    check_json_file(json_file, "classes", "raw")
    if plots is not None:
        check_folder(
            plots,
            "--plots",
            writes=PLOTS,
            is_own=lambda folder: has_mark(folder / PLOTS[0]),
        )
    else:
        RunFolder(run).require_run()
        check_folder(RunFolder(run).plots, "plots:")
    console = make_console()
    loaded = load_run(run, overrides=tuple(overrides or ()))
    validation = loaded.config.data.validation or loaded.config.data.source
    spec = data or validation
    if is_shards(spec):
        if classes is not None:
            raise ConfigError("--classes: shards have the labels of their index")
        own = same_source(spec, validation)
        say(console, f"epoch {loaded.epoch} of {run}: {spec}")
        report = evaluate_shards(loaded, spec)
    else:
        cache, indices, own = select_images(console, loaded, data, classes)
        report = evaluate_run(loaded, cache, indices)
    console.print(report)
    if json_file is not None:
        write_text(json_file, report.to_json())
    folder = plots or loaded.folder.plots / ("validation" if own else "evaluation")
    with disk_errors(folder, "free some space and run the command again"):
        draw_confusion(report, folder)
    say(console, f"plots: {folder}")


@app.command()
def predict(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")],
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="PNG, JPEG, DICOM ...")],
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
    from magsd.data.run_data import preprocessing_of
    from magsd.evaluation import predict_images
    from magsd.evaluation.predict import overlay_names
    from magsd.evaluation.tables import predictions_table
    from magsd.outputs import check_folder, disk_errors, write_text
    from magsd.training.run import load_run

    check_json_file(json_file, "image", "probabilities")
    if overlay is not None:
        check_folder(overlay, "--overlay")
        if json_file in overlay_names(images, overlay):
            raise ConfigError(f"--json {json_file}: an overlay is written there; name another file")
    console = make_console()
    loaded = load_run(run, overrides=() if device is None else (f"train.device={device}",))
    bad: list[tuple[str, str]] = []
    with disk_errors(overlay or Path(), "free some space and run the command again"):
        try:
            predictions = predict_images(
                loaded.model,
                images,
                classes=loaded.classes,
                preprocessing=preprocessing_of(loaded.config),
                runtime=loaded.runtime,
                overlay_dir=overlay,
                on_bad=(lambda path, reason: bad.append((str(path), reason))) if skip_bad else None,
            )
        except DataError as error:
            raise DataError(f"{error}; leave out what cannot be read with --skip-bad") from error
    report_bad(console, bad)
    if not predictions:
        raise DataError(f"none of the {len(images)} images can be read")
    if json_file is not None:
        items = [_as_json(prediction) for prediction in predictions]
        write_text(json_file, json.dumps(items, indent=2, allow_nan=False) + "\n")
    console.print(predictions_table(predictions, loaded.classes, console.width))


def _as_json(prediction: Any) -> dict[str, Any]:
    return {
        "image": str(prediction.path),
        "label": prediction.label,
        "probabilities": prediction.probabilities,
        "overlay": None if prediction.overlay is None else str(prediction.overlay),
    }


app.command()(localize)
app.command()(audit)
app.command()(inspect)
app.command()(crossval)
app.command()(shards)


@app.command()
def info() -> None:
    """Versions, devices, kernel backends, packaged configurations and models."""
    from importlib.metadata import PackageNotFoundError, version

    import torch

    import magsd_kernels
    from magsd import __version__
    from magsd.config import packaged_configs, packaged_models

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
    lines.append(("models", ", ".join(packaged_models())))
    for name, value in lines:
        typer.echo(f"{name:24} {value}")
