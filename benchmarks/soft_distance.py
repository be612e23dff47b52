"""soft_distance_loss over four classes and three views, with predictions of every confidence."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

import magsd_kernels as mk
from benchmarks import published
from benchmarks.harness.comparison import Comparison
from benchmarks.harness.recording import Entry, Recorder
from benchmarks.harness.session import Session
from benchmarks.harness.sizes import CLASSES, MAGSD, VIEWS, Draw
from benchmarks.harness.subject import Subject
from magsd_kernels.reference import soft_distance as reference


def _inputs(draw: Draw) -> dict[str, Any]:
    targets = draw.integers(CLASSES, draw.batch)
    logits = draw.normal(draw.batch, CLASSES)
    certainty = draw.uniform(draw.batch, 1, low=-2.0, high=6.0)
    logits += certainty * F.one_hot(targets, CLASSES)
    return {
        "logits": logits,
        "view_logits": [draw.normal(draw.batch, CLASSES) for _ in range(VIEWS)],
        "targets": targets,
    }


def _function(**arguments: Any) -> Tensor:
    return mk.soft_distance_loss(**arguments).loss


def _reference(logits: Tensor, view_logits: list[Tensor], targets: Tensor) -> Tensor:
    return reference.soft_distance_loss(logits, view_logits, targets, None, 0.7, 0.01)[0]


SUBJECTS = (
    Subject(
        name="soft_distance_loss",
        operation="soft_distance",
        function=_function,
        reference=_reference,
        published=published.soft_distance_loss,
        inputs=_inputs,
        networks=(MAGSD,),
        central=True,
        differentiable=("logits", "view_logits"),
        saved=("logits", "view_logits", "targets"),
    ),
)


def groups(session: Session) -> list[Comparison]:
    return [Comparison(row) for row in session.rows(SUBJECTS)]


def test_soft_distance(entry: Entry, record: Recorder) -> None:
    record(entry)
