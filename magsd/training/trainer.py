"""The training loop: epochs of steps, validation, checkpoints, and resuming.

Everything random at a step is a function of (seed, epoch, step), or lies in the checkpoint; so a
resumed run repeats an uninterrupted one bit for bit where the device's arithmetic is repeatable.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from magsd.config import Config
from magsd.data import Batch, Loader, step_seed
from magsd.distributed import ALONE, Team
from magsd.errors import TrainingDiverged
from magsd.methods import method
from magsd.models import Classifier
from magsd.runtime import Runtime
from magsd.training.averaging import weight_average
from magsd.training.captured import CAPTURE_DEVICES, CapturedStep
from magsd.training.checkpoint import (
    all_finite,
    load_weights,
    random_state,
    save_checkpoint,
    set_random_state,
)
from magsd.training.metrics_log import MetricsLog, StepSums
from magsd.training.optim import build_optimizer, learning_rate, set_learning_rate
from magsd.training.progress import TrainingProgress
from magsd.training.run_folder import RunFolder
from magsd.training.signals import StopRequest
from magsd.training.step import StepResult, class_weights
from magsd.training.train_step import TrainStep, shard_of
from magsd.training.validation import validate

_NAMED_IMAGES = 16


class Interrupted(Exception):
    """A signal asked the run to stop; the state was saved."""

    def __init__(self, signum: int, checkpoint: Path) -> None:
        super().__init__(f"stopped by signal {signum}; state saved in {checkpoint}")
        self.signum = signum


class _Stop(Exception):
    """Unwinds the loop to the place where the state is saved."""

    def __init__(self, signum: int) -> None:
        self.signum = signum


class Trainer:
    """Trains `model` on `train` and keeps its run in `folder`.

    `epoch` counts finished epochs, `step` finished steps of the current one; `step` equal to the
    epoch's length means that its validation is still to come. Each process of a `team` has such a
    trainer, with loaders that bring its part of the images; their states stay the same.
    """

    def __init__(
        self,
        config: Config,
        model: Classifier,
        train: Loader,
        validation: Loader,
        folder: RunFolder,
        runtime: Runtime,
        warn: Callable[[str], None] = print,
        team: Team = ALONE,
    ) -> None:
        self.config = config
        self.model = runtime.model(model)
        self.train_loader = train
        self.validation_loader = validation
        self.folder = folder
        self.runtime = runtime
        self.team = team
        if config.train.recompute:
            self.model.backbone.recompute = True
        if config.train.compile:
            self.model.backbone.compile()
        weights = class_weights(config.loss.class_weights, train)
        self._class_weights = None if weights is None else weights.double()
        weights = None if weights is None else weights.to(runtime.device)
        objective = method(config.model.name).objective(config, weights)
        capture = self._can_capture(warn)
        self.sums = StepSums(runtime.device, team)
        self.train_step = TrainStep(
            self.model,
            build_optimizer(self.model, config.optim, capturable=capture),
            objective,
            runtime,
            clip_norm=config.optim.clip_norm,
            sums=self.sums,
            team=team,
            sync_batchnorm=config.train.sync_batchnorm,
            fuse_norm=config.train.fuse_norm,
        )
        self.average = weight_average(self.model, config.train.ema)
        #: The model that is validated and kept as the best: the average, where there is one.
        self.measured: Classifier = self.model if self.average is None else self.average.module
        if self.average is not None and config.train.compile:
            self.measured.backbone.compile()  # a copy is not compiled
        if config.train.views == "grouped" and fields(config.views) and self.train_step.ungrouped:
            warn(f"the views pass one by one (views=separate): {self.train_step.ungrouped}")
        self.captured_step: CapturedStep[StepResult] | None = None
        if capture:
            self.captured_step = CapturedStep(
                self.train_step, runtime.device, warn, team=team, reset=self.train_step.reset
            )
        self._saved = False
        self.epoch = 0
        self.step = 0
        self.best: list[float] = [-math.inf, -math.inf]
        self.best_epoch = 0
        self.epoch_seconds = 0.0
        self.train_seconds = 0.0
        self.images_seen = 0
        self._recent: dict[int, list[int]] = {}
        self._clock = time.perf_counter()

    def _can_capture(self, warn: Callable[[str], None]) -> bool:
        """True where a CUDA graph can hold the step; a line says why not."""
        train = self.config.train
        if not train.cuda_graph or self.runtime.device.type not in CAPTURE_DEVICES:
            return False
        if train.recompute and self.model.backbone.draws:
            warn(
                "training without a CUDA graph: train.recompute=true draws dropout or stochastic "
                "depth a second time, from a state of the generator that no graph can go back to"
            )
            return False
        return True

    @property
    def global_step(self) -> int:
        """Steps done since the start of the run."""
        return self.epoch * len(self.train_loader) + self.step

    @property
    def images_per_second(self) -> float:
        """Training throughput of the whole run so far, validation left out."""
        return self.images_seen / self.train_seconds if self.train_seconds else float("nan")

    def fit(self, log: MetricsLog, progress: TrainingProgress, stop: StopRequest) -> None:
        """Train up to the configured epoch.

        Raises `Interrupted` after a signal, once the state is saved, and `TrainingDiverged`.
        """
        log.start(self.epoch, self.global_step)
        if not self._saved:
            self.save_last()
        try:
            while self.epoch < self.config.train.epochs:
                self._train_epoch(log, progress, stop)
                self._finish_epoch(log, progress, stop)
        except _Stop as request:
            if self.team.size > 1:
                stop.ignore_sigterm()
            self.save_last()
            raise Interrupted(request.signum, self.folder.last) from None

    def _train_epoch(self, log: MetricsLog, progress: TrainingProgress, stop: StopRequest) -> None:
        train = self.config.train
        self.model.train()
        self._clock = time.perf_counter()
        for batch in self.train_loader.epoch(self.epoch, self.step):
            self._recent[self.step] = batch.positions
            self._one_step(batch)
            progress.step(self.epoch)
            report = self.global_step % train.log_interval == 0
            if report:
                self._report(log, progress)
            self._leave_if_asked(stop, meeting=report)
            every = train.checkpoint_interval
            if every and self.global_step % every == 0 and self.step < len(self.train_loader):
                self.save_last()

    def _leave_if_asked(self, stop: StopRequest, *, meeting: bool) -> None:
        """Raise `_Stop` after a signal; a team does where it meets, so that none waits for another.

        A signal may reach the processes of a team at different steps.
        """
        if meeting or self.team.size == 1:
            signum = self.team.all_reduce_max(stop.signum or 0)
            if signum:
                raise _Stop(signum)

    def _one_step(self, batch: Batch) -> None:
        set_learning_rate(self.train_step.optimizer, self.current_lr())
        seed = step_seed(self.config.train.seed, self.epoch, self.step, "views")
        shard = None
        if self.team.size > 1:
            labels = self.train_loader.whole_labels(batch)
            shard = shard_of(batch, self.team, self._class_weights, labels)
            self._seed_process()
        if self.captured_step is not None:
            self.captured_step(batch.images, batch.labels, seed, shard)
        else:
            generator = torch.Generator(self.runtime.device).manual_seed(seed)
            self.train_step(batch.images, batch.labels, generator, shard)
        self.step += 1
        if self.average is not None:  # by a decay that changes, which no graph can hold
            self.average.update(self.model, self.global_step)

    def _seed_process(self) -> None:
        """Let what layers draw (dropout, random depth) differ between the processes of a team.

        The checkpoint holds one process's generators; so these depend on the place in training.
        """
        stream = f"process {self.team.rank}"
        torch.manual_seed(step_seed(self.config.train.seed, self.epoch, self.step, stream))

    def current_lr(self) -> float:
        """Learning rate of the next step."""
        return learning_rate(
            self.config.optim, self.global_step, len(self.train_loader), self.config.train.epochs
        )

    def _report(self, log: MetricsLog, progress: TrainingProgress) -> dict[str, float]:
        """Read the sums (the interval's one synchronization), check them and show them."""
        values = self.read_sums()
        rate = self._images_in_epoch() / max(self._tick(), 1e-9)
        progress.measured(values["train_loss"], rate)
        points = {f"running/{k.removeprefix('train_')}": v for k, v in values.items()}
        log.scalars(points | {"running/images_per_second": rate}, self.global_step)
        return values

    def read_sums(self) -> dict[str, float]:
        """Means of the epoch so far. Raises `TrainingDiverged` after a loss that is not finite."""
        values = self.sums.read()
        bad = int(values.pop("first_bad"))
        if bad >= 0:
            raise TrainingDiverged(self._diverged("the loss became NaN or infinite", bad))
        self._recent = dict(list(self._recent.items())[-1:])
        return values

    def _diverged(self, what: str, step: int) -> str:
        keys = self.train_loader.describe(self._recent.get(step, []))
        more = f" and {len(keys) - _NAMED_IMAGES} more" if len(keys) > _NAMED_IMAGES else ""
        return (
            f"{what} at epoch {self.epoch + 1}, step {step + 1} of {len(self.train_loader)}; "
            f"its batch: {', '.join(keys[:_NAMED_IMAGES])}{more}. The last good checkpoint is "
            f"kept in {self.folder.last}; resume from it with --resume and a lower optim.lr, or "
            "look at these images"
        )

    def _finish_epoch(self, log: MetricsLog, progress: TrainingProgress, stop: StopRequest) -> None:
        def leave() -> None:
            try:
                self._leave_if_asked(stop, meeting=False)
            except _Stop:
                self._clock = time.perf_counter()  # validation is no training time
                raise

        values = self._report(log, progress)
        self._leave_if_asked(stop, meeting=True)
        last_lr = float(self.train_step.optimizer.param_groups[0]["lr"])
        self._share_buffers()
        measured = validate(
            self.measured,
            self.validation_loader,
            self.runtime,
            each_batch=leave,
            team=self.team,
        )
        row: dict[str, Any] = {
            "epoch": self.epoch + 1,
            "step": self.global_step,
            "lr": last_lr,
            **values,
            **measured,
            "seconds": self.epoch_seconds,
            "images_per_second": self._images_in_epoch() / max(self.epoch_seconds, 1e-9),
        }
        self._check_weights()
        # Order matters for a kill in between: whatever is newer than last.pt is done again.
        log.epoch(row)
        self.train_seconds += self.epoch_seconds
        self.images_seen += self._images_in_epoch()
        self.epoch, self.step, self.epoch_seconds = self.epoch + 1, 0, 0.0
        self.sums.reset()
        score = self._score(measured)
        if score > self.best:
            self.best, self.best_epoch = score, self.epoch
            self._save_best()
        self.save_last(checked=True)
        progress.epoch(row)

    def _score(self, measured: dict[str, float]) -> list[float]:
        """Larger is better; the loss decides between equal accuracies."""
        loss = measured["validation_loss"]
        if not math.isfinite(loss):
            return [-math.inf, -math.inf]
        monitor = self.config.train.monitor
        first = -loss if monitor == "loss" else measured[f"validation_{monitor}"]
        return [first, -loss]

    def _images_in_epoch(self) -> int:
        return min(self.step * self.train_loader.batch_size, self.train_loader.count)

    def _tick(self) -> float:
        """Seconds of training in this epoch, those before a resume included."""
        now = time.perf_counter()
        self.epoch_seconds += now - self._clock
        self._clock = now
        return self.epoch_seconds

    def _share_buffers(self) -> None:
        self.team.broadcast_buffers(self.model)
        if self.average is not None:
            self.team.broadcast_buffers(self.measured)

    def _check_weights(self) -> None:
        if not all_finite(self.model, self.train_step.optimizer):
            raise TrainingDiverged(
                self._diverged("weights became NaN or infinite", max(self.step - 1, 0))
            )

    def save_last(self, *, checked: bool = False) -> None:
        """Write the whole state, unless it is spoilt: then the older checkpoint stays."""
        if not checked:
            self._share_buffers()
            self.read_sums()
            self._check_weights()
            self._tick()
        payload = {
            **self._weights(self.model),
            **({} if self.average is None else {"ema": self.measured.state_dict()}),
            **self.train_step.state_dict(),
            "step": self.step,
            "best": self.best,
            "best_epoch": self.best_epoch,
            "sums": self.sums.state(),
            "random": random_state(),
            "epoch_seconds": self.epoch_seconds,
            "train_seconds": self.train_seconds,
            "images_seen": self.images_seen,
        }
        if self.team.is_main:
            save_checkpoint(self.folder.last, payload)
        self._saved = True
        self._clock = time.perf_counter()

    def _save_best(self) -> None:
        if self.team.is_main:
            save_checkpoint(self.folder.best, self._weights(self.measured))

    def _weights(self, model: Classifier) -> dict[str, Any]:
        return {
            "model": model.state_dict(),
            "classes": list(self.train_loader.classes),
            "config": self.config.to_dict(),
            "epoch": self.epoch,
            "global_step": self.global_step,
        }

    def restore(self, payload: dict[str, Any]) -> None:
        """Take over the state that `save_last` wrote."""
        load_weights(self.model, payload["model"], self.folder.last)
        if self.average is not None:
            load_weights(self.measured, payload["ema"], self.folder.last)
        self.train_step.load_state_dict(payload)
        self.epoch, self.step = payload["epoch"], payload["step"]
        self.best, self.best_epoch = payload["best"], payload["best_epoch"]
        self.sums.load(payload["sums"])
        self.epoch_seconds = payload["epoch_seconds"]
        self.train_seconds = payload["train_seconds"]
        self.images_seen = payload["images_seen"]
        set_random_state(payload["random"])
        self._saved = True
