"""What a user sees while a run trains: a live bar on a terminal, a line per epoch elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from magsd.console import say


class TrainingProgress:
    """Bar over all steps of a run, with the loss, throughput and time left."""

    def __init__(self, console: Console, epochs: int, steps_per_epoch: int, done: int) -> None:
        self._console = console
        self._epochs = epochs
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]:.0f} images/s  loss {task.fields[loss]:.3f}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task(
            "training",
            total=epochs * steps_per_epoch,
            completed=done,
            rate=float("nan"),
            loss=float("nan"),
        )

    def __enter__(self) -> TrainingProgress:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def step(self, epoch: int) -> None:
        """One more step of `epoch` (from 0)."""
        self._progress.update(
            self._task, advance=1, description=f"epoch {epoch + 1}/{self._epochs}"
        )

    def measured(self, loss: float, rate: float) -> None:
        """Figures that were read from the device."""
        self._progress.update(self._task, loss=loss, rate=rate)

    def epoch(self, row: Mapping[str, Any]) -> None:
        """Report a finished epoch."""
        say(
            self._console,
            f"epoch {row['epoch']}/{self._epochs}"
            f"  loss {row['train_loss']:.4f}"
            f"  train accuracy {row['train_accuracy']:.3f}"
            f"  validation accuracy {row['validation_accuracy']:.3f}"
            f"  lr {row['lr']:.2e}"
            f"  {row['images_per_second']:.0f} images/s"
            f"  {row['seconds']:.1f} s",
        )
