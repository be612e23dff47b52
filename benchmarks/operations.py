"""Every operation that is measured, in order of worth, and who else computes it.

The gradient of the guided views is that of the images. All are linear in them, so that a backward
need not read them. In training the images ask for none, and the forward is what counts. The
projections of multiscale_attention are inputs: the 1x1 convolutions before them are the same for
every competitor.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import magsd_kernels as mk
from benchmarks import published, rivals
from benchmarks.harness.sizes import CLASSES, EFFICIENTNET, MAGSD, RESNET50, WSDAN, Draw, Network
from benchmarks.harness.subject import CASE, Function, Rival, Subject
from benchmarks.rivals import FLOOR, PADDING, WEIGHT
from magsd_kernels.cases import Arguments
from magsd_kernels.reference import (
    attention_augment,
    attention_sampling,
    batch_norm_act,
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


def _subject(
    name: str,
    operation: str,
    case: str,
    reference: Function,
    networks: tuple[Network, ...] = (MAGSD,),
    **others: Any,
) -> Subject:
    """What a case calls, with its options, and the published code of the same name."""
    call = CASE[case]
    settings = {
        "function": partial(call.function, **call.options),
        "published": getattr(published, call.function.__name__),
        **others,
    }
    return Subject(name, operation, call, reference=reference, networks=networks, **settings)


def _view(
    name: str, reference: Function, *ranges: tuple[float, float], wsdan: bool = False, **others: Any
) -> Subject:
    """A guided view, with thresholds in these ranges. WS-DAN aligns corners, MAG-SD does not."""
    if wsdan:
        others["function"] = partial(getattr(mk, name), align_corners=True)
        others["published"] = partial(getattr(published, name), align_corners=True)
    return _subject(
        name,
        "attention_augment",
        name.removeprefix("attention_"),
        partial(reference, align_corners=wsdan),
        (WSDAN,) if wsdan else (MAGSD,),
        prepare=lambda draw, arguments: draw.guided(arguments, *ranges),
        saved=("attention", "theta"),
        **others,
    )


def _pool(name: str, pool: str, **others: Any) -> Subject:
    """Times 100, as the classifiers take it."""
    reference = partial(
        bilinear_pool.bilinear_attention_pool, pool=pool, signed_sqrt=True, normalize=True,
        scale=100.0, eps=1e-12, allow_tf32=False,
    )  # fmt: skip
    return _subject(
        name,
        "bilinear_pool",
        "pool_same_size",
        reference,
        function=partial(mk.bilinear_attention_pool, pool=pool, scale=100.0),
        published=partial(published.bilinear_attention_pool, pool=pool),
        saved=("features", "attention"),
        **others,
    )


def _norm(after: str, case: str = "norm_train") -> Subject:
    """In channels_last. after: what follows the norm; "residual": its addition and a rectifier."""
    act = "relu" if after == "residual" else after
    reference = partial(
        batch_norm_act.batch_norm_act, residual=None, groups=1, act=act, training=True,
        momentum=0.1, eps=1e-5,
    )  # fmt: skip
    return _subject(
        f"batch_norm_act {after}",
        "batch_norm_act",
        case,
        reference,
        (*RESNET50.get(after, ()), *EFFICIENTNET.get(after, ())),
        function=partial(mk.batch_norm_act, act=act, training=True),
        published=partial(published.batch_norm_act, act=act),
        prepare=_unbent,
        least_batch=4,  # as of multiscale_attention
        # On a CPU torch adds up a channel's pixels in float32 one by one, and silu's gradient is
        # rounded before those of the parameters, which are float32.
        rounds={"float32": 1e-4, "bfloat16": 4e-3, "float16": 1e-3},
        saved=("x", "weight"),
        central=True,
    )


def _unbent(draw: Draw, arguments: Arguments) -> Arguments:
    """As one group, in channels_last; no sum so near 0 that rounding decides whether it passes."""
    made = {name: value for name, value in arguments.items() if name != "groups"}
    for name in made.keys() & {"x", "residual"}:
        made[name] = made[name].contiguous(memory_format=torch.channels_last)
    sums = F.batch_norm(made["x"].float(), None, None, made["weight"], made["bias"], training=True)
    last = made.get("residual", made["x"])
    if "residual" in made:
        sums += last.float()
    gap = max(1e-4, 4 * torch.finfo(draw.dtype).eps)
    away = torch.where(sums < 0, -8 * gap, 8 * gap)  # sums of 0 move, too
    last += torch.where(sums.abs() < gap, away, 0).to(last.dtype)
    return made


def _loss(**arguments: Any) -> Tensor:
    return mk.soft_distance_loss(**arguments).loss


def _confident(draw: Draw, arguments: Arguments) -> Arguments:
    """Predictions of every confidence."""
    targets = arguments["targets"]
    certainty = draw.uniform(len(targets), 1, low=-2.0, high=6.0)
    logits = draw.normal(len(targets), CLASSES)
    return arguments | {"logits": logits.add_(certainty * F.one_hot(targets, CLASSES))}


_mixup = partial(attention_augment.attention_mixup, padding=PADDING, weight=WEIGHT)
_dim = partial(attention_augment.attention_dim, floor=FLOOR)
_patch = partial(attention_augment.attention_patch, padding=PADDING)
_views = partial(attention_augment.attention_views, padding=PADDING, weight=WEIGHT, floor=FLOOR)
_crop = partial(attention_augment.attention_mixup, padding=PADDING, weight=1.0)
_drop = partial(attention_augment.attention_dim, floor=0.0)
_boxes = partial(attention_augment.attention_boxes, padding=PADDING)
_multiscale = partial(
    multiscale_attention.multiscale_attention, training=True, momentum=0.1, eps=1e-3, mode="area",
    align_corners=False,
)  # fmt: skip
_resample = partial(multiscale_attention.resample_attention, mode="area", align_corners=False)
_distance = partial(
    soft_distance.soft_distance_loss, class_weights=None, confidence=0.7, smoothing=0.01
)
_sample = partial(attention_sampling.sample_attention, eps=1e-12)

_views_rival = _sampled(rivals.grid_sample_views)
_mixup_rival = _sampled(rivals.grid_sample_mixup)
_crop_rivals = (_sampled(rivals.grid_sample_crop), _roi_align)

SUBJECTS = (
    _view("attention_views", _views, _BOX, _MASK, _BOX, rivals=(_views_rival,), central=True),
    _view("attention_mixup", _mixup, _BOX, rivals=(_mixup_rival,)),
    _view("attention_dim", _dim, _MASK),
    _view("attention_patch", _patch, _BOX),
    _view("attention_crop", _crop, _BOX, wsdan=True, rivals=_crop_rivals),
    _view("attention_drop", _drop, _MASK, wsdan=True),
    _view("attention_boxes", _boxes, _BOX),
    _pool(
        "bilinear_attention_pool",
        "avg",
        networks=(MAGSD, WSDAN),
        rivals=(Rival("bmm", rivals.bmm, ("bfloat16", "float16")),),
        central=True,
    ),
    _pool(
        "bilinear_attention_pool max",
        "max",
        uncompiled="the definition loops over 32 maps, and compiling all of them takes a minute",
        precisions=("float32",),  # rounded products tie, and the gradient goes to another pixel
    ),
    _subject(
        "multiscale_attention",
        "multiscale_attention",
        "multiscale_train",
        _multiscale,
        (MAGSD, WSDAN),
        saved=("projections", "weights"),
        central=True,
        least_batch=4,  # over two values batch norm's gradient cancels out
    ),
    _norm("relu"),
    _norm("residual", "norm_residual_relu"),
    _norm("silu"),
    _norm("none"),
    _subject("resample_attention", "multiscale_attention", "resample_area", _resample),
    _subject(
        "soft_distance_loss",
        "soft_distance",
        "loss",
        _distance,
        function=_loss,
        prepare=_confident,
        saved=("logits", "view_logits", "targets"),
        central=True,
    ),
    _subject(
        "sample_attention", "attention_sampling", "sample", _sample, (MAGSD, WSDAN), central=True
    ),
)
#: By name.
SUBJECT = {subject.name: subject for subject in SUBJECTS}
