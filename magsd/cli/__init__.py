"""The command `magsd`: its commands are `app.command`s here and in the modules beside."""

from __future__ import annotations

import io
import logging
import os
import platform
import shlex
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

from magsd.console import say
from magsd.errors import ConfigError, MagsdError
from magsd.launch import launched, process_rank

try:
    import typer
    from typer.core import TyperGroup
except ImportError as _error:  # the base install holds the kernels alone
    raise SystemExit(
        f"magsd: {_error.name} is not installed; the command needs: pip install 'magsd[train]'"
    ) from None

from magsd.cli.auditing import audit
from magsd.cli.common import SOURCES, make_console, training_config
from magsd.cli.cross_validation import crossval
from magsd.cli.evaluation import evaluate
from magsd.cli.inspection import inspect
from magsd.cli.localization import localize
from magsd.cli.prediction import predict
from magsd.cli.reporting import report
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


app.command()(evaluate)
app.command()(predict)
app.command()(localize)
app.command()(audit)
app.command()(inspect)
app.command()(crossval)
app.command()(report)
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
