"""How well maps meet lesion or lung masks: attention inside them, regions, boxes, pointing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from magsd.evaluation.localization.boxes import (
    Box,
    box_iou,
    component_boxes,
    filled,
    hot_region,
    peak,
    region_iou,
    within,
)
from magsd.outputs import jsonable

# Name and heading.
MEASURES = {
    "inside": "attention in mask",
    "region_iou": "IoU of region",
    "boxes_iou": "IoU of boxes",
    "best_box_iou": "IoU of best box",
    "pointing": "pointing game",
}


@dataclass(frozen=True)
class LocalizationScore:
    """Means over images.

    inside: share of the attention that lies inside the mask. uniform: the same for a uniform map,
    that is, the share of the image that the mask covers. images: how many entered the means.
    left_out: images with a mask whose map is zero everywhere or whose mask is empty.
    """

    images: int
    inside: float
    uniform: float
    left_out: int = 0

    @property
    def gain(self) -> float:
        """How many times more attention the mask draws than a uniform map would give it."""
        return self.inside / self.uniform if self.uniform > 0 else float("nan")


@dataclass(frozen=True)
class Localization:
    """Scores over all images with a mask, and by class for classes that have any."""

    overall: LocalizationScore
    per_class: dict[str, LocalizationScore]


def attention_inside(saliency: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Share of each map inside its mask, and share of the image that the mask covers.

    saliency: (B, 1, h, w), not negative. masks: (B, H, W), nonzero inside. The map is upsampled
    bilinearly (align_corners=False) to H x W. Returns two float32 (B,); the first is NaN where the
    map is zero everywhere.
    """
    if saliency.ndim != 4 or saliency.shape[1] != 1:
        raise ValueError(f"saliency: expected (B, 1, h, w), got {tuple(saliency.shape)}")
    if masks.ndim != 3 or len(masks) != len(saliency):
        raise ValueError(f"masks: expected ({len(saliency)}, H, W), got {tuple(masks.shape)}")
    return _shares(upsampled(saliency, masks.shape[1:]), masks)


def _shares(maps: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """`attention_inside` of maps (B, H, W) of the masks' size."""
    covered = (masks > 0).to(maps.dtype)
    inside = (maps * covered).sum(dim=(1, 2)) / maps.sum(dim=(1, 2))
    return inside, covered.mean(dim=(1, 2))


def upsampled(saliency: Tensor, shape: Sequence[int]) -> Tensor:
    """Maps (B, 1, h, w) at H x W, (B, H, W) float32: bilinear, align_corners=False."""
    maps = F.interpolate(saliency.float(), tuple(shape), mode="bilinear", align_corners=False)
    return maps[:, 0]


def summarize(
    inside: NDArray[np.floating],
    uniform: NDArray[np.floating],
    targets: NDArray[np.integer],
    classes: Sequence[str],
) -> Localization:
    """Means of per-image shares (N,), overall and by class."""
    return Localization(
        overall=_score(inside, uniform),
        per_class={
            name: _score(inside[targets == k], uniform[targets == k])
            for k, name in enumerate(classes)
            if (targets == k).any()
        },
    )


def _score(inside: NDArray[np.floating], uniform: NDArray[np.floating]) -> LocalizationScore:
    usable = np.isfinite(inside) & (uniform > 0)
    count = int(usable.sum())
    return LocalizationScore(
        images=count,
        inside=float(inside[usable].mean()) if count else float("nan"),
        uniform=float(uniform[usable].mean()) if count else float("nan"),
        left_out=len(inside) - count,
    )


@dataclass(frozen=True)
class MapScores:
    """How well one map, or the mean map of several images, meets the mask.

    values: by name, each 0..1
        inside: share of the map that lies in the mask;
        region_iou: of the pixels at or above the threshold with the mask;
        boxes_iou: of all boxes together with the mask;
        best_box_iou: of the box with most of the map with the best fitting box among those of the
            mask's components;
        pointing: whether the map's maximum lies in the mask, or near it (the pointing game of
            Zhang et al., "Top-Down Neural Attention by Excitation Backprop", IJCV 2018).
    uniform: the same for a map that is the same everywhere, and a random point of it. center:
    pointing for the center of the image.
    """

    values: dict[str, float]
    uniform: dict[str, float]
    center: float


@dataclass(frozen=True)
class GroupScores:
    """Means over `images` with a mask; left_out: those whose map or mask is zero everywhere."""

    images: int
    left_out: int
    means: MapScores | None


@dataclass(frozen=True)
class LocalizationReport:
    """threshold: share of a map's maximum; tolerance: of the pointing game, in input pixels."""

    threshold: float
    tolerance: float
    image_size: int
    overall: GroupScores
    per_class: dict[str, GroupScores]

    def to_json(self, path: Path) -> None:
        """Write everything; a mean over no images is null."""
        text = json.dumps(jsonable(self), indent=2, allow_nan=False)
        path.write_text(text + "\n", encoding="utf-8")


def score_map(
    heat: NDArray[np.floating],
    mask: NDArray[np.bool_],
    *,
    threshold: float = 0.5,
    tolerance: float = 0.0,
) -> MapScores | None:
    """Scores of a map (H, W), not negative, against a mask (H, W); None where either is zero."""
    region = hot_region(heat, threshold)
    if not mask.any() or not region.any():
        return None
    boxes = component_boxes(region, heat)
    targets = component_boxes(mask, mask.astype(np.float32))
    near = within(mask, tolerance)
    height, width = mask.shape
    whole = Box(0, 0, width, height, 1.0)
    shares = _shares(torch.from_numpy(heat)[None], torch.from_numpy(mask)[None])
    inside, area = (float(share) for share in shares)
    return MapScores(
        values={
            "inside": inside,
            "region_iou": region_iou(region, mask),
            "boxes_iou": region_iou(filled(boxes, mask.shape), mask),
            "best_box_iou": max(box_iou(boxes[0], target) for target in targets),
            "pointing": float(near[peak(heat)]),
        },
        uniform={
            **dict.fromkeys(("inside", "region_iou", "boxes_iou"), area),
            "best_box_iou": max(box_iou(whole, target) for target in targets),
            "pointing": float(near.mean()),
        },
        center=float(near[height // 2, width // 2]),
    )


def group_scores(each: Sequence[MapScores | None]) -> GroupScores:
    """Means over the images that could be scored; None: one whose map or mask is zero."""
    scores = [found for found in each if found is not None]
    means = None
    if scores:
        means = MapScores(
            {name: float(np.mean([s.values[name] for s in scores])) for name in MEASURES},
            {name: float(np.mean([s.uniform[name] for s in scores])) for name in MEASURES},
            float(np.mean([s.center for s in scores])),
        )
    return GroupScores(len(scores), len(each) - len(scores), means)
