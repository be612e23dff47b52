"""What a run measures: sums kept on the device, one CSV row per epoch, TensorBoard curves."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from magsd.distributed import ALONE, Team
from magsd.outputs import write_atomically
from magsd.training.step import StepResult

COLUMNS = (
    "epoch",  # counted from 1
    "step",  # steps done since the start of the run
    "lr",
    "train_loss",
    "train_cross_entropy",
    "train_distance",
    "train_accuracy",
    "validation_loss",
    "validation_accuracy",
    "validation_balanced_accuracy",
    "seconds",
    "images_per_second",
)


class StepSums:
    """Sums over the steps of an epoch, on the device; reading them is the only synchronization.

    `first_bad` is the first step whose loss was NaN or infinite, -1 while there is none. Each
    process of a team keeps its own sums; `read` and `state`, which all must call, add them up.
    """

    _LOSS, _CE, _DISTANCE, _CORRECT, _COUNT, _STEPS, _FIRST_BAD = range(7)

    def __init__(self, device: torch.device, team: Team = ALONE) -> None:
        self._team = team
        self.values = torch.zeros(7, dtype=torch.float64, device=device)
        self.reset()

    def reset(self) -> None:
        """Start an epoch, in the same memory."""
        self.values.zero_()
        self.values[self._FIRST_BAD].fill_(-1)

    def add(self, result: StepResult, batch: int, weight: float | None = None) -> None:
        """Take in one step of `batch` images; `weight` of its losses where it is another."""
        values = self.values
        losses = torch.stack(
            [result.loss.detach().double(), result.cross_entropy.double(), result.distance.double()]
        )
        values[: self._CORRECT] += losses * (batch if weight is None else weight)
        values[self._CORRECT] += result.correct
        values[self._COUNT] += batch
        first = values[self._FIRST_BAD]
        is_first = ~torch.isfinite(losses[0]) & (first < 0)
        values[self._FIRST_BAD] = torch.where(is_first, values[self._STEPS], first)
        values[self._STEPS] += 1

    def read(self) -> dict[str, float]:
        """Means per image and the first bad step; waits for the device."""
        loss, ce, distance, correct, count, _, bad = self._total().tolist()
        count = max(count, 1.0)
        return {
            "train_loss": loss / count,
            "train_cross_entropy": ce / count,
            "train_distance": distance / count,
            "train_accuracy": correct / count,
            "first_bad": bad,
        }

    def state(self) -> Tensor:
        """A copy on the host, for a checkpoint."""
        return self._total().cpu().clone()

    def load(self, state: Tensor) -> None:
        """The inverse of `state`."""
        self.values.copy_(state)
        if not self._team.is_main:
            self.values[: self._STEPS].zero_()  # they count once

    def _total(self) -> Tensor:
        """The sums of all processes, and their first bad step."""
        if self._team.size == 1:
            return self.values
        total = self.values.clone()
        self._team.all_reduce(total[: self._STEPS])
        bad = total[self._FIRST_BAD]
        bad.copy_(torch.where(bad < 0, math.inf, bad))
        self._team.all_reduce_min(bad)
        bad.copy_(torch.where(torch.isinf(bad), -1, bad))
        return total


class MetricsLog:
    """`metrics.csv`, rewritten whole so that it never holds half a row, and TensorBoard.

    Without a path nothing is written: processes that do not lead keep such a log.
    """

    def __init__(self, csv_path: Path | None, tensorboard: Path | None) -> None:
        self._path = csv_path
        self._rows: list[dict[str, Any]] = []
        self._writer: Any = None
        self._folder = tensorboard

    def start(self, epochs_done: int, step: int) -> None:
        """Forget what an interrupted run wrote after the checkpoint from which it resumes."""
        rows = read_metrics(self._path) if self._path is not None and self._path.is_file() else []
        self._rows = [row for row in rows if int(row["epoch"]) <= epochs_done]
        self._write_csv()
        if self._folder is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._folder), purge_step=step)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Points on TensorBoard curves."""
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def epoch(self, row: Mapping[str, Any]) -> None:
        """Add an epoch's row to the CSV and its values to TensorBoard."""
        self._rows.append({name: row.get(name, "") for name in COLUMNS})
        self._write_csv()
        points = {}
        for name in COLUMNS[3:]:
            group, _, rest = name.partition("_")
            points[f"{group}/{rest}" if group in ("train", "validation") else name] = row[name]
        self.scalars(points, int(row["step"]))
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        """End the TensorBoard file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _write_csv(self) -> None:
        if self._path is None:
            return
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for row in self._rows:
            writer.writerow({name: _format(row[name]) for name in COLUMNS})
        write_atomically(self._path, lambda file: file.write(text.getvalue().encode()))


def read_metrics(path: Path) -> list[dict[str, str]]:
    """Rows of a `metrics.csv`, oldest first."""
    with open(path, newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if row.get("epoch", "").isdigit()]


def _format(value: Any) -> Any:
    if isinstance(value, float):
        return f"{value:.8g}" if math.isfinite(value) else str(value)
    return value
