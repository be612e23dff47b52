"""Every operation that is measured, in order of worth, and who else computes it.

The gradient of the guided views is that of the images. All are linear in them, so that a backward
need not read them. In training the images ask for none, and the forward is what counts. The
projections of multiscale_attention are inputs: the 1x1 convolutions before them are the same for
every competitor.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor

import magsd_kernels as mk
from benchmarks import published, rivals
from benchmarks.harness.sizes import CLASSES, MAGSD, WSDAN, Draw
from benchmarks.harness.subject import CASE, Function, Rival, Subject
from benchmarks.rivals import FLOOR, PADDING, WEIGHT
from magsd_kernels.cases import Arguments
from magsd_kernels.reference import (
    attention_augment,
    attention_sampling,
    bilinear_pool,
    multiscale_attention,
    soft_distance,
)

#: Ranges of the thresholds.
_BOX, _MASK = (0.4, 0.6), (0.2, 0.5)
#: Float32 coordinates of these rivals count from the image's edge or center, ours from the box:
#: hundred thousandths of a pixel are rounded off, which the gradient shows most.
_sampled = partial(Rival, "grid_sample", tolerance=5e-5)
_roi_align = Rival("roi_align", rivals.roi_align, why_not=rivals.why_no_torchvision, tolerance=5e-5)


def _view(
    name: str,
    reference: Function,
    *ranges: tuple[float, float],
    align_corners: bool = False,
    **others: Any,
) -> Subject:
    """A guided view: of WS-DAN where corners are aligned, else of MAG-SD."""

    def prepare(draw: Draw, arguments: Arguments) -> Arguments:
        return draw.guided(arguments, *ranges)

    corners = {"align_corners": True} if align_corners else {}
    return Subject(
        name=name,
        operation="attention_augment",
        case=CASE[name.removeprefix("attention_")],
        function=partial(getattr(mk, name), **corners),
        reference=partial(reference, align_corners=align_corners),
        published=partial(getattr(published, name), **corners),
        networks=(WSDAN if align_corners else MAGSD,),
        prepare=prepare,
        saved=("attention", "theta"),
        **others,
    )


_mixup = partial(attention_augment.attention_mixup, padding=PADDING, weight=WEIGHT)
_dim = partial(attention_augment.attention_dim, floor=FLOOR)
_patch = partial(attention_augment.attention_patch, padding=PADDING)
_views = partial(attention_augment.attention_views, padding=PADDING, weight=WEIGHT, floor=FLOOR)
_crop = partial(attention_augment.attention_mixup, padding=PADDING, weight=1.0)
_drop = partial(attention_augment.attention_dim, floor=0.0)
_boxes = partial(attention_augment.attention_boxes, padding=PADDING)

_pool = partial(
    bilinear_pool.bilinear_attention_pool, signed_sqrt=True, normalize=True, scale=100.0, eps=1e-12,
    allow_tf32=False,
)  # fmt: skip
_average = Subject(
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
_maximum = replace(
    _average,
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

_multiscale = Subject(
    name="multiscale_attention",
    operation="multiscale_attention",
    case=CASE["multiscale_train"],
    function=partial(mk.multiscale_attention, training=True),
    reference=partial(
        multiscale_attention.multiscale_attention, training=True, momentum=0.1, eps=1e-3,
        mode="area", align_corners=False,
    ),
    published=published.multiscale_attention,
    networks=(MAGSD, WSDAN),
    saved=("projections", "weights"),
    central=True,
    least_batch=4,  # over two values batch norm's gradient cancels out
)  # fmt: skip
_resample = Subject(
    name="resample_attention",
    operation="multiscale_attention",
    case=CASE["resample_area"],
    function=mk.resample_attention,
    reference=partial(multiscale_attention.resample_attention, mode="area", align_corners=False),
    published=published.resample_attention,
    networks=(MAGSD,),
)


def _loss(**arguments: Any) -> Tensor:
    return mk.soft_distance_loss(**arguments).loss


def _confident(draw: Draw, arguments: Arguments) -> Arguments:
    """Predictions of every confidence."""
    targets = arguments["targets"]
    certainty = draw.uniform(len(targets), 1, low=-2.0, high=6.0)
    logits = draw.normal(len(targets), CLASSES)
    return arguments | {"logits": logits.add_(certainty * F.one_hot(targets, CLASSES))}


_distance = Subject(
    name="soft_distance_loss",
    operation="soft_distance",
    case=CASE["loss"],
    function=_loss,
    reference=partial(
        soft_distance.soft_distance_loss, class_weights=None, confidence=0.7, smoothing=0.01
    ),
    published=published.soft_distance_loss,
    networks=(MAGSD,),
    prepare=_confident,
    saved=("logits", "view_logits", "targets"),
    central=True,
)

_sample = Subject(
    name="sample_attention",
    operation="attention_sampling",
    case=CASE["sample"],
    function=mk.sample_attention,
    reference=partial(attention_sampling.sample_attention, eps=1e-12),
    published=published.sample_attention,
    networks=(MAGSD, WSDAN),
    central=True,
)

SUBJECTS = (
    _view(
        "attention_views", _views, _BOX, _MASK, _BOX,
        rivals=(_sampled(rivals.grid_sample_views),), central=True,
    ),
    _view("attention_mixup", _mixup, _BOX, rivals=(_sampled(rivals.grid_sample_mixup),)),
    _view("attention_dim", _dim, _MASK),
    _view("attention_patch", _patch, _BOX),
    _view(
        "attention_crop", _crop, _BOX, align_corners=True,
        rivals=(_sampled(rivals.grid_sample_crop), _roi_align),
    ),
    _view("attention_drop", _drop, _MASK, align_corners=True),
    _view("attention_boxes", _boxes, _BOX),
    _average,
    _maximum,
    _multiscale,
    _resample,
    _distance,
    _sample,
)  # fmt: skip
#: By name.
SUBJECT = {subject.name: subject for subject in SUBJECTS}
