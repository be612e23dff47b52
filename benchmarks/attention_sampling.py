"""sample_attention: three maps an image for MAG-SD, two for WS-DAN."""

from __future__ import annotations

from functools import partial

import magsd_kernels as mk
from benchmarks import published
from benchmarks.harness.session import Entry, Recorder
from benchmarks.harness.sizes import MAGSD, WSDAN
from benchmarks.harness.subject import CASE, Subject
from magsd_kernels.reference import attention_sampling as reference

SUBJECTS = (
    Subject(
        name="sample_attention",
        operation="attention_sampling",
        case=CASE["sample"],
        function=mk.sample_attention,
        reference=partial(reference.sample_attention, eps=1e-12),
        published=published.sample_attention,
        networks=(MAGSD, WSDAN),
        central=True,
    ),
)


def test_attention_sampling(entry: Entry, record: Recorder) -> None:
    record(entry)
