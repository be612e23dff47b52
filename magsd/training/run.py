"""A whole run: data, split, model, training; and a run's model loaded again."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from magsd.config import Config, load_config
from magsd.console import say
from magsd.data.prepare import prepare_data
from magsd.data.run_data import RunData, preprocessing_of
from magsd.distributed import Team, restarted, team_of
from magsd.errors import RunError
from magsd.models import Classifier, build_model
from magsd.outputs import disk_errors
from magsd.runtime import Runtime
from magsd.torch_settings import cudnn_benchmark, deterministic_algorithms, kept_memory
from magsd.training.checkpoint import load_checkpoint, load_weights
from magsd.training.metrics_log import MetricsLog
from magsd.training.progress import TrainingProgress
from magsd.training.run_folder import RunFolder
from magsd.training.run_start import begin, claim, stored_state
from magsd.training.signals import StopRequest
from magsd.training.trainer import Trainer


@dataclass(frozen=True)
class LoadedRun:
    """A run with its best weights, or with its last before any epoch has ended."""

    folder: RunFolder
    config: Config
    classes: tuple[str, ...]
    model: Classifier
    epoch: int
    runtime: Runtime


@dataclass(frozen=True)
class TrainedRun:
    """What `train_run` returns; `images_per_second` is training throughput, validation left out."""

    folder: RunFolder
    config: Config
    data: RunData
    best_epoch: int
    images_per_second: float


def train_run(
    config: Config,
    out: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    console: Console | None = None,
) -> TrainedRun:
    """Train as `config` says and keep everything in the folder `out`.

    With `resume` continue from the folder's last checkpoint. Under `torchrun` the processes train
    together, the first of them writes, and after a failure that torchrun answers by a new try the
    run resumes from its checkpoint by itself. Raises `RunError` where the folder holds
    another run, a checkpoint is corrupt or the disk is full; `Interrupted` after SIGINT or SIGTERM,
    once the state is saved; `TrainingDiverged`; `DataError`; `ConfigError`.
    """
    config.validate()
    folder = RunFolder(out)
    with team_of(config.train) as team:
        if not team.is_main:
            console = Console(quiet=True)
        resume = resume or restarted(team, folder.root)
        return _train_run(config, folder, resume, overwrite, console or Console(), team)


def _train_run(
    config: Config,
    folder: RunFolder,
    resume: bool,
    overwrite: bool,
    console: Console,
    team: Team,
) -> TrainedRun:
    """`train_run` in each process of a team, of which the leader alone looks at the folder."""
    runtime = Runtime.from_config(config.train)
    if team.is_main:
        claim(folder, config, resume=resume, overwrite=overwrite)
    advice = "free some space and resume with --resume; the last checkpoint is kept"
    try:
        with (
            disk_errors(folder.root, advice),
            runtime,
            deterministic_algorithms(config.train.deterministic),
            # A run has few shapes, each of them many times.
            cudnn_benchmark(),
            kept_memory(runtime.device),
        ):
            using = runtime.kernels_in_use()
            say(console, f"kernels: {using}")
            payload = team.broadcast(stored_state(folder) if resume and team.is_main else None)
            # Images or weights that cannot be used are told before the folder is touched: a run
            # that is to be overwritten still stands then.
            data = prepare_data(config, folder.split if resume else None, payload, console, team)
            trainer = _build_trainer(config, data, folder, runtime, payload, console, team)
            if team.is_main:
                begin(
                    folder,
                    config,
                    data,
                    resume=resume,
                    overwrite=overwrite,
                )
            _fit(trainer, console, resumed=payload is not None)
            return TrainedRun(folder, config, data, trainer.best_epoch, trainer.images_per_second)
    finally:
        folder.unlock()


def _build_trainer(
    config: Config,
    data: RunData,
    folder: RunFolder,
    runtime: Runtime,
    payload: dict[str, Any] | None,
    console: Console,
    team: Team,
) -> Trainer:
    """The trainer of a new model, or in the stored state; nothing is written yet."""
    torch.manual_seed(config.train.seed)
    model = build_model(
        # Weights that a checkpoint or the leader's replace need not be fetched.
        config.model
        if payload is None and team.is_main
        else replace(config.model, pretrained=False),
        len(data.classes),
        classes=data.classes,
        preprocessing=preprocessing_of(config),
    )
    train, validation = data.loaders(config, team)
    trainer = Trainer(
        config,
        model,
        train,
        validation,
        folder,
        runtime,
        partial(say, console),
        team,
    )
    if payload is not None:
        trainer.restore(payload)
    return trainer


def _fit(trainer: Trainer, console: Console, *, resumed: bool) -> None:
    """Train with a log, a progress bar and an eye on signals."""
    train, folder = trainer.config.train, trainer.folder
    if resumed:
        say(console, f"resuming after epoch {trainer.epoch}, step {trainer.step} of the next")
    log = MetricsLog(None, None)
    if trainer.team.is_main:
        log = MetricsLog(folder.metrics, folder.tensorboard if train.tensorboard else None)
    steps = len(trainer.train_loader)
    try:
        with (
            TrainingProgress(console, train.epochs, steps, trainer.global_step) as progress,
            StopRequest() as stop,
        ):
            trainer.fit(log, progress, stop)
    finally:
        log.close()


def load_run(root: str | Path, *, overrides: tuple[str, ...] = ()) -> LoadedRun:
    """The model of a run, in evaluation mode on its device.

    Raises `RunError` where the folder is no run, or its checkpoint is missing or corrupt.
    """
    folder = RunFolder(root)
    config = load_config(overrides=overrides, base=folder.load_config())
    path = folder.best if folder.best.is_file() else folder.last
    payload = load_checkpoint(path)
    try:
        classes, epoch = tuple(payload["classes"]), int(payload["epoch"])
    except KeyError as error:
        raise RunError(f"{path} lacks {error}") from None
    # The weights come from the checkpoint; fetching others first would be wasted.
    config.model.pretrained = False
    model = build_model(
        config.model, len(classes), classes=classes, preprocessing=preprocessing_of(config)
    )
    load_weights(model, payload["model"], path)
    runtime = Runtime.from_config(config.train)
    runtime.model(model).eval()
    return LoadedRun(folder, config, classes, model, epoch, runtime)
