"""The guided views: those of MAG-SD, singly and together, and those of WS-DAN.

The gradient is that of the images. All views are linear in them, so that a backward need not read
them. In training the images ask for none, and the forward is what counts.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import magsd_kernels as mk
from benchmarks import published, rivals
from benchmarks.harness.session import Entry, Recorder
from benchmarks.harness.sizes import MAGSD, WSDAN, Draw
from benchmarks.harness.subject import CASE, Function, Rival, Subject
from benchmarks.rivals import FLOOR, PADDING, WEIGHT
from magsd_kernels.cases import Arguments
from magsd_kernels.reference import attention_augment as reference

#: Their float32 coordinates count from the image's edge or center, ours from the box: hundred
#: thousandths of a pixel are rounded off, which the gradient shows most.
_COORDINATES = 5e-5
#: Ranges of the thresholds.
_BOX, _MASK = (0.4, 0.6), (0.2, 0.5)


def _view(name: str, reference: Function, *ranges: tuple[float, float], **options: Any) -> Subject:
    """A view of the MAG-SD images, unless the options say otherwise."""

    def prepare(draw: Draw, arguments: Arguments) -> Arguments:
        return draw.guided(arguments, *ranges)

    case = CASE[name.removeprefix("attention_")]
    corners = {"align_corners": True} if options.get("networks") == (WSDAN,) else {}
    settings: dict[str, Any] = {
        "function": partial(getattr(mk, name), **corners),
        "published": partial(getattr(published, name), **corners),
        "networks": (MAGSD,),
        "saved": ("attention", "theta"),
    } | options
    return Subject(
        name, "attention_augment", case, reference=reference, prepare=prepare, **settings
    )


_mixup = partial(reference.attention_mixup, padding=PADDING, weight=WEIGHT, align_corners=False)
_dim = partial(reference.attention_dim, floor=FLOOR, align_corners=False)
_patch = partial(reference.attention_patch, padding=PADDING, align_corners=False)
_views = partial(
    reference.attention_views, padding=PADDING, weight=WEIGHT, floor=FLOOR, align_corners=False
)
_crop = partial(reference.attention_mixup, padding=PADDING, weight=1.0, align_corners=True)
_drop = partial(reference.attention_dim, floor=0.0, align_corners=True)
_boxes = partial(reference.attention_boxes, padding=PADDING, align_corners=False)

_grid_sample = partial(Rival, "grid_sample", tolerance=_COORDINATES)
_sampled_views = _grid_sample(rivals.grid_sample_views)
_sampled_mixup = _grid_sample(rivals.grid_sample_mixup)
_sampled_crop = _grid_sample(rivals.grid_sample_crop)
_roi_align = Rival(
    "roi_align", rivals.roi_align, why_not=rivals.why_no_torchvision, tolerance=_COORDINATES
)

SUBJECTS = (
    _view("attention_views", _views, _BOX, _MASK, _BOX, rivals=(_sampled_views,), central=True),
    _view("attention_mixup", _mixup, _BOX, rivals=(_sampled_mixup,)),
    _view("attention_dim", _dim, _MASK),
    _view("attention_patch", _patch, _BOX),
    _view("attention_crop", _crop, _BOX, networks=(WSDAN,), rivals=(_sampled_crop, _roi_align)),
    _view("attention_drop", _drop, _MASK, networks=(WSDAN,)),
    _view("attention_boxes", _boxes, _BOX),
)


def test_attention_augment(entry: Entry, record: Recorder) -> None:
    record(entry)
