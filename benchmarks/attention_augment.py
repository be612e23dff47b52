"""The guided views: those of MAG-SD, singly and together, and those of WS-DAN.

The gradient is that of the images. All views are linear in them, so that a backward need not read
them. In training the images ask for none, and the forward is what counts.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

import magsd_kernels as mk
from benchmarks import published, rivals
from benchmarks.harness.comparison import Comparison
from benchmarks.harness.recording import Entry, Recorder
from benchmarks.harness.session import Session
from benchmarks.harness.sizes import MAGSD, WSDAN, Draw
from benchmarks.harness.subject import Function, Rival, Subject, Tolerance
from magsd_kernels.reference import attention_augment as reference

#: Their float32 coordinates count from the image's edge or center, ours from the box: hundred
#: thousandths of a pixel are rounded off, which the gradient shows most.
_COORDINATES = Tolerance(single=5e-5)
_PADDING, _WEIGHT, _FLOOR = rivals.PADDING, rivals.WEIGHT, rivals.FLOOR


def _view_inputs(draw: Draw) -> dict[str, Tensor]:
    return {"images": draw.images(), **draw.guide()}


def _dim_inputs(draw: Draw) -> dict[str, Tensor]:
    return {"images": draw.images(), **draw.guide(0.2, 0.5)}


def _patch_inputs(draw: Draw) -> dict[str, Tensor]:
    return {**_view_inputs(draw), "offsets": draw.uniform(draw.batch, 2)}


def _views_inputs(draw: Draw) -> dict[str, Tensor]:
    attention = draw.attention()
    maps, thetas = [], []
    for low, high in ((0.4, 0.6), (0.2, 0.5), (0.4, 0.6)):
        view = draw.guide(low, high, attention)
        maps.append(view["index"])
        thetas.append(view["theta"])
    return {
        "images": draw.images(),
        "attention": attention,
        "index": torch.stack(maps, 1),
        "theta": torch.stack(thetas, 1),
        "offsets": draw.uniform(draw.batch, 2),
    }


def _boxes_inputs(draw: Draw) -> dict[str, Any]:
    return {**draw.guide(), "size": (draw.network.side, draw.network.side)}


def _crop(
    images: Tensor, attention: Tensor, index: Tensor, theta: Tensor, weight: float, corners: bool
) -> Tensor:
    return reference.attention_mixup(images, attention, index, theta, _PADDING, weight, corners)[0]


def _patch(
    images: Tensor, attention: Tensor, index: Tensor, theta: Tensor, offsets: Tensor
) -> Tensor:
    return reference.attention_patch(images, attention, index, theta, offsets, _PADDING, False)[0]


def _dim(
    images: Tensor, attention: Tensor, index: Tensor, theta: Tensor, floor: float, corners: bool
) -> Tensor:
    return reference.attention_dim(images, attention, index, theta, floor, corners)


def _views(
    images: Tensor, attention: Tensor, index: Tensor, theta: Tensor, offsets: Tensor
) -> Tensor:
    return reference.attention_views(
        images, attention, index, theta, offsets, _PADDING, _WEIGHT, _FLOOR, False
    )[0]


def _boxes(attention: Tensor, index: Tensor, theta: Tensor, size: tuple[int, int]) -> Tensor:
    return reference.attention_boxes(attention, index, theta, list(size), _PADDING, False)


def _view(name: str, function: Function, definition: Function, **options: Any) -> Subject:
    """A view of the MAG-SD images, unless the options say otherwise."""
    settings = {
        "published": getattr(published, name),
        "inputs": _view_inputs,
        "networks": (MAGSD,),
        "differentiable": ("images",),
        "saved": ("attention", "theta"),
    }
    return Subject(
        name=name,
        operation="attention_augment",
        function=function,
        reference=definition,
        **(settings | options),
    )


def _grid_sample(weight: float, corners: bool) -> Rival:
    build = partial(rivals.grid_sample, weight, corners)
    return Rival("grid_sample", build, tolerance=_COORDINATES)


SUBJECTS = (
    _view(
        "attention_views",
        mk.attention_views,
        _views,
        inputs=_views_inputs,
        rivals=(Rival("grid_sample", rivals.grid_sample_views, tolerance=_COORDINATES),),
        central=True,
    ),
    _view(
        "attention_mixup",
        mk.attention_mixup,
        partial(_crop, weight=_WEIGHT, corners=False),
        rivals=(_grid_sample(_WEIGHT, corners=False),),
    ),
    _view(
        "attention_dim",
        mk.attention_dim,
        partial(_dim, floor=_FLOOR, corners=False),
        inputs=_dim_inputs,
    ),
    _view("attention_patch", mk.attention_patch, _patch, inputs=_patch_inputs),
    _view(
        "attention_crop",
        partial(mk.attention_crop, align_corners=True),
        partial(_crop, weight=1.0, corners=True),
        published=partial(published.attention_crop, align_corners=True),
        networks=(WSDAN,),
        rivals=(
            _grid_sample(1.0, corners=True),
            Rival(
                "roi_align",
                rivals.roi_align,
                why_not=rivals.why_no_torchvision,
                tolerance=_COORDINATES,
            ),
        ),
    ),
    _view(
        "attention_drop",
        partial(mk.attention_drop, align_corners=True),
        partial(_dim, floor=0.0, corners=True),
        published=partial(published.attention_drop, align_corners=True),
        inputs=_dim_inputs,
        networks=(WSDAN,),
    ),
    _view(
        "attention_boxes",
        mk.attention_boxes,
        _boxes,
        inputs=_boxes_inputs,
        differentiable=(),
    ),
)


def groups(session: Session) -> list[Comparison]:
    return [Comparison(row) for row in session.rows(SUBJECTS)]


def test_attention_augment(entry: Entry, record: Recorder) -> None:
    record(entry)
