"""sample_attention: three maps an image for MAG-SD, two for WS-DAN."""

from __future__ import annotations

from torch import Tensor

import magsd_kernels as mk
from benchmarks import published
from benchmarks.harness.comparison import Comparison
from benchmarks.harness.recording import Entry, Recorder
from benchmarks.harness.session import Session
from benchmarks.harness.sizes import MAGSD, WSDAN, Draw
from benchmarks.harness.subject import Subject
from magsd_kernels.reference import attention_sampling as reference


def _inputs(draw: Draw) -> dict[str, Tensor]:
    draws = 3 if draw.network.name == MAGSD.name else 2
    return {"attention": draw.attention(), "uniforms": draw.uniform(draw.batch, draws)}


def _reference(attention: Tensor, uniforms: Tensor) -> Tensor:
    return reference.sample_attention(attention, uniforms, 1e-12)


SUBJECTS = (
    Subject(
        name="sample_attention",
        operation="attention_sampling",
        function=mk.sample_attention,
        reference=_reference,
        published=published.sample_attention,
        inputs=_inputs,
        networks=(MAGSD, WSDAN),
        central=True,
    ),
)


def groups(session: Session) -> list[Comparison]:
    return [Comparison(row) for row in session.rows(SUBJECTS)]


def test_attention_sampling(entry: Entry, record: Recorder) -> None:
    record(entry)
