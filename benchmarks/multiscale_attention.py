"""multiscale_attention in training, and resample_attention.

The projections are inputs: the 1x1 convolutions before them are the same for every competitor.
"""

from __future__ import annotations

from functools import partial

import magsd_kernels as mk
from benchmarks import published
from benchmarks.harness.session import Entry, Recorder
from benchmarks.harness.sizes import MAGSD, WSDAN
from benchmarks.harness.subject import CASE, Subject
from magsd_kernels.reference import multiscale_attention as reference

_definition = partial(
    reference.multiscale_attention, training=True, momentum=0.1, eps=1e-3, mode="area",
    align_corners=False,
)  # fmt: skip
SUBJECTS = (
    Subject(
        name="multiscale_attention",
        operation="multiscale_attention",
        case=CASE["multiscale_train"],
        function=partial(mk.multiscale_attention, training=True),
        reference=_definition,
        published=published.multiscale_attention,
        networks=(MAGSD, WSDAN),
        saved=("projections", "weights"),
        central=True,
        least_batch=4,  # over two values batch norm's gradient cancels out
    ),
    Subject(
        name="resample_attention",
        operation="multiscale_attention",
        case=CASE["resample_area"],
        function=mk.resample_attention,
        reference=partial(reference.resample_attention, mode="area", align_corners=False),
        published=published.resample_attention,
        networks=(MAGSD,),
    ),
)


def test_multiscale_attention(entry: Entry, record: Recorder) -> None:
    record(entry)
