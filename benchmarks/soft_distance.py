"""soft_distance_loss over four classes and three views, with predictions of every confidence."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor

import magsd_kernels as mk
from benchmarks import published
from benchmarks.harness.session import Entry, Recorder
from benchmarks.harness.sizes import CLASSES, MAGSD, Draw
from benchmarks.harness.subject import CASE, Subject
from magsd_kernels.cases import Arguments
from magsd_kernels.reference import soft_distance as reference


def _confident(draw: Draw, arguments: Arguments) -> Arguments:
    targets = arguments["targets"]
    certainty = draw.uniform(len(targets), 1, low=-2.0, high=6.0)
    logits = draw.normal(len(targets), CLASSES)
    return arguments | {"logits": logits.add_(certainty * F.one_hot(targets, CLASSES))}


def _loss(**arguments: Any) -> Tensor:
    return mk.soft_distance_loss(**arguments).loss


_definition = partial(
    reference.soft_distance_loss, class_weights=None, confidence=0.7, smoothing=0.01
)
SUBJECTS = (
    Subject(
        name="soft_distance_loss",
        operation="soft_distance",
        case=CASE["loss"],
        function=_loss,
        reference=_definition,
        published=published.soft_distance_loss,
        networks=(MAGSD,),
        prepare=_confident,
        saved=("logits", "view_logits", "targets"),
        central=True,
    ),
)


def test_soft_distance(entry: Entry, record: Recorder) -> None:
    record(entry)
