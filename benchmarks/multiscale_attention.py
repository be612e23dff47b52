"""multiscale_attention in training, and resample_attention.

The projections are inputs: the 1x1 convolutions before them are the same for every competitor.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

import magsd_kernels as mk
from benchmarks import published
from benchmarks.harness.comparison import Comparison
from benchmarks.harness.recording import Entry, Recorder
from benchmarks.harness.session import Session
from benchmarks.harness.sizes import MAGSD, WSDAN, Draw
from benchmarks.harness.subject import Subject
from magsd_kernels.reference import multiscale_attention as reference


def _maps(draw: Draw) -> list[Tensor]:
    maps = draw.network.maps
    return [draw.normal(draw.batch, maps, side, side) for _, side in draw.network.features]


def _inputs(draw: Draw) -> dict[str, Any]:
    names = ("weights", "biases", "running_means", "running_vars")
    parameters = {
        name: [draw.parameter(draw.network.maps) for _ in draw.network.features] for name in names
    }
    return {"projections": _maps(draw), **parameters}


def _reference(projections: list[Tensor], **parameters: list[Tensor]) -> Tensor:
    size = list(projections[-1].shape[2:])
    return reference.multiscale_attention(
        projections, **parameters, size=size, training=True, momentum=0.1, eps=1e-3, mode="area",
        align_corners=False,
    )[0]  # fmt: skip


def _reference_resample(maps: list[Tensor]) -> Tensor:
    return reference.resample_attention(maps, list(maps[-1].shape[2:]), "area", False)


SUBJECTS = (
    Subject(
        name="multiscale_attention",
        operation="multiscale_attention",
        function=partial(mk.multiscale_attention, training=True),
        reference=_reference,
        published=published.multiscale_attention,
        inputs=_inputs,
        networks=(MAGSD, WSDAN),
        central=True,
        differentiable=("projections", "weights", "biases"),
        saved=("projections", "weights"),
        written=("running_means", "running_vars"),
        least_batch=4,  # over two values batch norm's gradient cancels out
    ),
    Subject(
        name="resample_attention",
        operation="multiscale_attention",
        function=mk.resample_attention,
        reference=_reference_resample,
        published=published.resample_attention,
        inputs=lambda draw: {"maps": _maps(draw)},
        networks=(MAGSD,),
        differentiable=("maps",),
    ),
)


def groups(session: Session) -> list[Comparison]:
    return [Comparison(row) for row in session.rows(SUBJECTS)]


def test_multiscale_attention(entry: Entry, record: Recorder) -> None:
    record(entry)
