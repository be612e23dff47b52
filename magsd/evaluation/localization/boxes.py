"""Boxes around the hot parts of a map, and how well they meet a mask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

# Pixels that touch at a corner belong together: a component is what the eye takes for one.
_NEIGHBORS = np.ones((3, 3), dtype=bool)


@dataclass(frozen=True)
class Box:
    """Columns x0 to x1 and rows y0 to y1 in pixels, the ends not included.

    share: the part of the whole map's sum that lies in the box's component, 0..1.
    """

    x0: float
    y0: float
    x1: float
    y1: float
    share: float

    def scaled(self, across: float, down: float) -> Box:
        """The box in an image that is `across` times as wide and `down` times as high."""
        return Box(self.x0 * across, self.y0 * down, self.x1 * across, self.y1 * down, self.share)


def hot_region(heat: NDArray[np.floating], threshold: float) -> NDArray[np.bool_]:
    """Where a map (H, W), not negative, reaches `threshold` (0..1) times its maximum.

    Empty for a map that is zero everywhere.
    """
    top = float(heat.max())
    return np.asarray(heat >= threshold * top) if top > 0 else np.zeros(heat.shape, dtype=bool)


def component_boxes(region: NDArray[np.bool_], heat: NDArray[np.floating]) -> list[Box]:
    """Box of each connected component of a region (H, W), the one with most of `heat` first."""
    labels, count = ndimage.label(region, structure=_NEIGHBORS)
    sums = ndimage.sum_labels(heat.astype(np.float64), labels, range(1, count + 1))
    total = heat.sum(dtype=np.float64)
    boxes = [
        Box(columns.start, rows.start, columns.stop, rows.stop, float(mass / total))
        for (rows, columns), mass in zip(ndimage.find_objects(labels), sums, strict=True)
    ]
    return sorted(boxes, key=lambda box: -box.share)


def box_iou(first: Box, second: Box) -> float:
    """Area of the intersection over that of the union of two boxes."""
    width = min(first.x1, second.x1) - max(first.x0, second.x0)
    height = min(first.y1, second.y1) - max(first.y0, second.y0)
    common = max(width, 0.0) * max(height, 0.0)
    return common / (_area(first) + _area(second) - common)


def region_iou(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> float:
    """The same of two regions (H, W), not both empty."""
    return float((first & second).sum() / (first | second).sum())


def filled(boxes: Sequence[Box], shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """Union of boxes with whole coordinates as a region (H, W)."""
    region = np.zeros(shape, dtype=bool)
    for box in boxes:
        region[int(box.y0) : int(box.y1), int(box.x0) : int(box.x1)] = True
    return region


def peak(heat: NDArray[np.floating]) -> tuple[int, int]:
    """Row and column of the maximum of a map (H, W); of several, that next to their center.

    Interpolation by an even factor leaves the maximum to four neighbors, and a plateau at the
    image's edge to more.
    """
    positions = np.argwhere(heat == heat.max())
    row, column = positions[((positions - positions.mean(axis=0)) ** 2).sum(axis=1).argmin()]
    return int(row), int(column)


def within(mask: NDArray[np.bool_], tolerance: float) -> NDArray[np.bool_]:
    """Pixels that lie in a mask (H, W), not empty, or at most `tolerance` pixels from it."""
    return ndimage.distance_transform_edt(~mask) <= tolerance if tolerance > 0 else mask


def _area(box: Box) -> float:
    return (box.x1 - box.x0) * (box.y1 - box.y0)
