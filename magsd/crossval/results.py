"""What a finished run of a cross-validation left in its folder."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

from magsd.crossval.plan import PlannedRun
from magsd.data.record import Side
from magsd.data.run_sides import sides_of
from magsd.errors import RunError
from magsd.training.checkpoint import load_checkpoint

# The false-positive rate is left out: its macro mean is one minus that of the specificity.
METRICS = ("accuracy", "precision", "recall", "f1", "specificity", "auroc")
LOGITS = ("raw", "refined")


@dataclass(frozen=True)
class RunResult:
    """Metrics of one run on its fold.

    side: "test", or "validation" where the epoch was selected on the fold itself. train_images,
    validation_images: numbers of images. measured: keys of the fold's. scores: for "raw" logits
    and, where the run has them, "refined" ones: metric -> value in 0..1, NaN if undefined.
    """

    side: Side
    train_images: int
    validation_images: int
    measured: frozenset[str]
    scores: dict[str, dict[str, float]]

    @property
    def ratio(self) -> float:
        """Images measured on, for each that training or the choice of the epoch has seen."""
        seen = self.train_images + (self.validation_images if self.side == "test" else 0)
        return len(self.measured) / seen


@dataclass(frozen=True)
class Outcome:
    """A planned run with its result, or with the reason why it has none."""

    run: PlannedRun
    result: RunResult | None
    reason: str = ""


def is_finished(run: PlannedRun) -> bool:
    """True if all epochs were trained, and the best weights evaluated with their predictions.

    Raises `RunError` for a corrupt checkpoint.
    """
    folder = run.folder
    written = (folder.last, folder.predictions, folder.operating)
    if not (
        folder.is_run() and all(file.is_file() for file in written) and _report(run) is not None
    ):
        return False
    # A report alone may be older than the last epochs, if the run was lengthened by hand.
    return int(load_checkpoint(folder.last)["epoch"]) == run.config.train.epochs


def read_result(run: PlannedRun) -> RunResult:
    """The result of a finished run; `RunError` where its report is missing or damaged."""
    report = _report(run)
    if report is None:
        raise RunError(f"no report of an evaluation at {run.folder.evaluation}")
    sides = sides_of(run.folder.split)
    scores = {
        kind: {name: _number(report[kind][name]) for name in METRICS}
        for kind in LOGITS
        if report.get(kind) is not None
    }
    side = report.get("side", "validation")
    counts = Counter(sides.values())
    measured = frozenset(key for key, on in sides.items() if on == side)
    return RunResult(side, counts["train"], counts["validation"], measured, scores)


def _report(run: PlannedRun) -> dict[str, Any] | None:
    """The run's evaluation.json, or None where it is missing or was cut off by a kill."""
    try:
        report = json.loads(run.folder.evaluation.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return report if isinstance(report, dict) and "raw" in report else None


def _number(value: float | None) -> float:
    return float("nan") if value is None else float(value)
