"""bilinear_attention_pool at the head of each network, times 100 as the classifiers take it."""

from __future__ import annotations

from functools import partial

from torch import Tensor

import magsd_kernels as mk
from benchmarks import published, rivals
from benchmarks.harness.comparison import Comparison
from benchmarks.harness.recording import Entry, Recorder
from benchmarks.harness.session import Session
from benchmarks.harness.sizes import MAGSD, WSDAN, Draw
from benchmarks.harness.subject import Rival, Subject
from magsd_kernels.reference import bilinear_pool as reference


def _inputs(draw: Draw) -> dict[str, Tensor]:
    return {"features": draw.features(), "attention": draw.attention()}


def _reference(features: Tensor, attention: Tensor, pool: str) -> Tensor:
    return reference.bilinear_attention_pool(
        features, attention, pool, True, True, scale=100.0, eps=1e-12, allow_tf32=False
    )[0]


_AVERAGE = Subject(
    name="bilinear_attention_pool",
    operation="bilinear_pool",
    function=partial(mk.bilinear_attention_pool, scale=100.0),
    reference=partial(_reference, pool="avg"),
    published=published.bilinear_attention_pool,
    inputs=_inputs,
    networks=(MAGSD, WSDAN),
    rivals=(Rival("bmm", rivals.bmm, ("bfloat16", "float16")),),
    central=True,
    differentiable=("features", "attention"),
    saved=("features", "attention"),
)
_MAXIMUM = Subject(
    name="bilinear_attention_pool max",
    operation="bilinear_pool",
    function=partial(mk.bilinear_attention_pool, pool="max", scale=100.0),
    reference=partial(_reference, pool="max"),
    published=partial(published.bilinear_attention_pool, pool="max"),
    inputs=_inputs,
    networks=(MAGSD,),
    differentiable=("features", "attention"),
    saved=("features", "attention"),
    precisions=("float32",),  # rounded products tie, and the gradient goes to another pixel
    uncompiled="the definition loops over 32 maps, and compiling all of them takes a minute",
)
SUBJECTS = (_AVERAGE, _MAXIMUM)


def groups(session: Session) -> list[Comparison]:
    return [Comparison(row) for row in session.rows(SUBJECTS)]


def test_bilinear_pool(entry: Entry, record: Recorder) -> None:
    record(entry)
