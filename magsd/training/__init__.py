"""The training step, the loop around it, and runs in folders; imported when first used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from magsd.training.ensemble import ensemble_of, evaluate_runs
    from magsd.training.report import evaluate_run, finish_run
    from magsd.training.run import LoadedRun, TrainedRun, load_run, train_run
    from magsd.training.step import StepResult, attention_step, plain_step
    from magsd.training.train_step import TrainStep
    from magsd.training.trainer import Interrupted, Trainer

_LAZY = {
    "Interrupted": "trainer",
    "LoadedRun": "run",
    "StepResult": "step",
    "TrainStep": "train_step",
    "TrainedRun": "run",
    "Trainer": "trainer",
    "attention_step": "step",
    "ensemble_of": "ensemble",
    "evaluate_run": "report",
    "evaluate_runs": "ensemble",
    "finish_run": "report",
    "load_run": "run",
    "plain_step": "step",
    "train_run": "run",
}

__all__ = [
    "Interrupted",
    "LoadedRun",
    "StepResult",
    "TrainStep",
    "TrainedRun",
    "Trainer",
    "attention_step",
    "ensemble_of",
    "evaluate_run",
    "evaluate_runs",
    "finish_run",
    "load_run",
    "plain_step",
    "train_run",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(f"magsd.training.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
