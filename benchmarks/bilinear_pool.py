"""bilinear_attention_pool at the head of each network, times 100 as the classifiers take it."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import magsd_kernels as mk
from benchmarks import published, rivals
from benchmarks.harness.session import Entry, Recorder
from benchmarks.harness.sizes import MAGSD, WSDAN
from benchmarks.harness.subject import CASE, Rival, Subject
from magsd_kernels.reference import bilinear_pool as reference

_pool = partial(
    reference.bilinear_attention_pool, signed_sqrt=True, normalize=True, scale=100.0, eps=1e-12,
    allow_tf32=False,
)  # fmt: skip
_AVERAGE = Subject(
    name="bilinear_attention_pool",
    operation="bilinear_pool",
    case=CASE["pool_same_size"],
    function=partial(mk.bilinear_attention_pool, scale=100.0),
    reference=partial(_pool, pool="avg"),
    published=published.bilinear_attention_pool,
    networks=(MAGSD, WSDAN),
    saved=("features", "attention"),
    rivals=(Rival("bmm", rivals.bmm, ("bfloat16", "float16")),),
    central=True,
)
_MAXIMUM = replace(
    _AVERAGE,
    name="bilinear_attention_pool max",
    function=partial(mk.bilinear_attention_pool, pool="max", scale=100.0),
    reference=partial(_pool, pool="max"),
    published=partial(published.bilinear_attention_pool, pool="max"),
    networks=(MAGSD,),
    rivals=(),
    uncompiled="the definition loops over 32 maps, and compiling all of them takes a minute",
    central=False,
    precisions=("float32",),  # rounded products tie, and the gradient goes to another pixel
)
SUBJECTS = (_AVERAGE, _MAXIMUM)


def test_bilinear_pool(entry: Entry, record: Recorder) -> None:
    record(entry)
