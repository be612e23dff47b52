"""Rivals compute what ours computes, where their rules allow it; a wrong one is found."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from benchmarks import rivals
from benchmarks.harness.contender import Contender, WrongResult, check, definition
from benchmarks.harness.session import Session
from benchmarks.harness.sizes import MAGSD, PRECISIONS, WSDAN, Draw
from benchmarks.harness.subject import Row
from benchmarks.operations import SUBJECT, _unbent

SMALL = replace(MAGSD, side=80, features=((16, 20), (16, 10), (24, 5)), maps=3)
SMALL_WSDAN = replace(WSDAN, side=96, features=((24, 12),), maps=3)
CASES = [
    pytest.param(name, rival.name, precision, id=f"{name}-{rival.name}-{precision}")
    for name, subject in SUBJECT.items()
    for rival in subject.rivals
    for precision in rival.precisions
]


@pytest.fixture(autouse=True)
def _uncompiled(monkeypatch):
    """What torch.compile makes of it is checked in every run, and takes long."""
    monkeypatch.setattr(rivals, "_compiled", lambda function: function)


def row_of(name: str, precision: str, backward: bool = True) -> Row:
    subject = SUBJECT[name]
    network = SMALL if subject.networks[0] == MAGSD else SMALL_WSDAN
    return Row(subject, network, 3, precision, "cpu", backward)


def compare(row: Row, rival: str) -> None:
    arguments = row.draw(0)
    check(Contender(rival, row, [arguments]), definition(row, arguments))


@pytest.mark.parametrize(("name", "rival", "precision"), CASES)
def test_a_rival_agrees(name, rival, precision):
    row = row_of(name, precision)
    assert rival in row.competitors()
    why = row.competitors()[rival].why_not()
    if why is not None:
        pytest.skip(why)
    compare(row, rival)


def test_a_rival_that_is_half_a_pixel_off_is_found(monkeypatch):
    right = rivals._grid
    step = 1 / (SMALL.side - 1)
    monkeypatch.setattr(rivals, "_grid", lambda *a, **k: right(*a, **k) + step)
    for name in ("attention_views", "attention_mixup", "attention_crop"):
        with pytest.raises(WrongResult, match="grid_sample"):
            compare(row_of(name, "float32"), "grid_sample")


def test_without_aligned_corners_roi_align_reads_beside_the_box():
    """Why it competes for one crop alone: inside the box it agrees, at the edges it does not."""
    ops = pytest.importorskip("torchvision.ops")
    image = torch.rand(1, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    wanted = F.interpolate(image[:, :, 8:24, 8:24], (32, 32), mode="bilinear", align_corners=False)
    box = torch.tensor([[0.0, 8, 8, 24, 24]])
    found = ops.roi_align(image, box, (32, 32), 1.0, 1, True)
    inside = (slice(None), slice(None), slice(1, -1), slice(1, -1))
    torch.testing.assert_close(found[inside], wanted[inside])
    assert (found - wanted)[:, :, 0].abs().max() > 0.05
    roi_align = {name for name, s in SUBJECT.items() for r in s.rivals if r.name == "roi_align"}
    assert roi_align == {"attention_crop"}


def test_roi_align_is_skipped_where_torchvision_is_not(monkeypatch):
    monkeypatch.setattr(rivals, "find_spec", lambda name: None)
    why = row_of("attention_crop", "float32").competitors()["roi_align"].why_not()
    assert why == "torchvision is not installed"


def test_bmm_competes_in_half_precision_alone():
    names = {p: row_of("bilinear_attention_pool", p).competitors() for p in PRECISIONS}
    assert [p for p, found in names.items() if "bmm" in found] == ["bfloat16", "float16"]


@pytest.mark.parametrize("asked", [False, True])
def test_max_autotune_competes_on_request(asked):
    class GPU:
        type = "cuda"

    session = Session(GPU(), 1.0, autotuned=asked)
    rows = session.rows(SUBJECT.values())
    tuned = [row for row in rows if "compiled-max" in row.competitors()]
    assert {(row.batch, row.network.name) for row in tuned} == (
        {(256, "magsd"), (64, "wsdan")} if asked else set()
    )
    assert {row.precision for row in rows} == {"float32", "bfloat16"}


def test_a_norms_sums_lie_away_from_the_rectifiers_bend():
    ones = torch.ones(4)
    made = _unbent(
        Draw(MAGSD, "float32", "cpu", 0),
        # Sums of exactly 0: another order of additions may pass or hold back their gradients.
        {"x": torch.randn(2, 4, 3, 3), "residual": torch.zeros(2, 4, 3, 3), "groups": 2}
        | {"weight": 0 * ones, "bias": 0 * ones},
    )
    assert float(made["residual"].abs().min()) >= 1e-4
