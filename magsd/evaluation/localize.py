"""Where a classifier looks: boxes from its maps, and how well they meet the masks."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.markup import escape
from rich.table import Table

from magsd.data import Batch, ImageCache, Record
from magsd.evaluation.boxes import (
    Box,
    box_iou,
    component_boxes,
    filled,
    hot_region,
    peak,
    region_iou,
    within,
)
from magsd.evaluation.evaluate import inference, jsonable, probabilities_of
from magsd.evaluation.localization import upsampled
from magsd.evaluation.overlay import save_items
from magsd.evaluation.predict import cached_item, in_turn
from magsd.evaluation.tables import new_table, percent
from magsd.models.classifier import Classifier

# Name and heading.
MEASURES = {
    "inside": "attention in mask",
    "region_iou": "IoU of region",
    "boxes_iou": "IoU of boxes",
    "best_box_iou": "IoU of best box",
    "pointing": "pointing game",
}
_BOX_COLUMNS = [
    *("key", "label", "predicted", "number", "x0", "y0", "x1", "y1", "share"),
    *("image_width", "image_height"),
]


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
class LocalizedImage:
    """One image of a cache.

    index: its row. probabilities: (K,) of the raw logits. saliency: (1, h, w). boxes: in pixels of
    the cached image, the one with most of the map first. masked: whether it has a mask; scores:
    None without one, or where either is zero.
    """

    index: int
    probabilities: NDArray[np.float64]
    saliency: NDArray[np.float32]
    boxes: list[Box]
    masked: bool
    scores: MapScores | None


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
        text = json.dumps(jsonable(asdict(self)), indent=2, allow_nan=False)
        path.write_text(text + "\n", encoding="utf-8")


def localize(
    model: Classifier,
    loader: Iterable[Batch],
    cache: ImageCache,
    *,
    device: torch.device | str = "cpu",
    precision: str = "float32",
    threshold: float = 0.5,
    tolerance: float = 0.0,
) -> list[LocalizedImage]:
    """Boxes of every image of a loader over `cache`, and scores of those with a mask.

    threshold: 0..1, share of a map's maximum from which on a pixel belongs to a box. tolerance: in
    pixels of the network's input; Zhang et al. allow 15.
    """
    device = torch.device(device)
    found = []
    with inference(model, device, precision):
        for batch in loader:
            output = model(batch.images.to(device, non_blocking=True))
            saliency = model.saliency(output).float()
            heat = upsampled(saliency, cache.images.shape[1:3]).cpu().numpy()
            probabilities = probabilities_of(output.logits.float().cpu().numpy())
            low = saliency.cpu().numpy()
            for k, index in enumerate(batch.indices):
                mask = mask_of(cache, index)
                found.append(
                    LocalizedImage(
                        index=index,
                        probabilities=probabilities[k],
                        saliency=low[k],
                        boxes=component_boxes(hot_region(heat[k], threshold), heat[k]),
                        masked=mask is not None,
                        scores=(
                            None
                            if mask is None
                            else score_map(heat[k], mask, threshold=threshold, tolerance=tolerance)
                        ),
                    )
                )
    return found


def mask_of(cache: ImageCache, index: int) -> NDArray[np.bool_] | None:
    """The mask (S, S) of an image of a cache, if it has one."""
    if cache.masks is None or not cache.has_mask[index]:
        return None
    return np.array(cache.masks[index]) > 0


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
    area = float(mask.mean())
    return MapScores(
        values={
            "inside": float((heat * mask).sum() / heat.sum()),
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


def localization_report(
    found: Sequence[LocalizedImage],
    records: Sequence[Record],
    classes: Sequence[str],
    *,
    threshold: float,
    tolerance: float,
    image_size: int,
) -> LocalizationReport:
    """Means over the images with a mask, and by true class for classes that have any."""
    masked = [image for image in found if image.masked]
    by_class = {
        name: [image for image in masked if records[image.index].label == name] for name in classes
    }
    return LocalizationReport(
        threshold,
        tolerance,
        image_size,
        _group(masked),
        {name: _group(images) for name, images in by_class.items() if images},
    )


def _group(images: Sequence[LocalizedImage]) -> GroupScores:
    scores = [image.scores for image in images if image.scores is not None]
    means = None
    if scores:
        means = MapScores(
            {name: float(np.mean([s.values[name] for s in scores])) for name in MEASURES},
            {name: float(np.mean([s.uniform[name] for s in scores])) for name in MEASURES},
            float(np.mean([s.center for s in scores])),
        )
    return GroupScores(len(scores), len(images) - len(scores), means)


def map_scores_table(report: LocalizationReport) -> Table:
    """What maps reach by class; in brackets a uniform map, or a point without aim."""
    title = f"Maps against masks (boxes from {report.threshold:g} of the maximum"
    title += f", pointing within {report.tolerance:g} pixels)" if report.tolerance else ")"
    table = new_table(title, ["images", "left out", *MEASURES.values()])
    table.caption = "in brackets: a uniform map; pointing: a random point, then the image's center"
    table.caption_justify = "left"
    for name, group in report.per_class.items():
        table.add_row(escape(name), *_group_cells(group))
    table.add_section()
    table.add_row("all", *_group_cells(report.overall))
    return table


def _group_cells(group: GroupScores) -> list[str]:
    counts = [str(group.images), str(group.left_out)]
    means = group.means
    if means is None:
        return [*counts, *["-"] * len(MEASURES)]
    chance = {name: percent(means.uniform[name]) for name in MEASURES}
    chance["pointing"] += f", {percent(means.center)}"
    cells = [f"{percent(means.values[name])} ({chance[name]})" for name in MEASURES]
    return [*counts, *cells]


def write_boxes(
    path: Path,
    found: Sequence[LocalizedImage],
    cache: ImageCache,
    classes: Sequence[str],
    size_of: Callable[[Record], tuple[int, ...]],
) -> None:
    """Write a CSV with one row a box, in pixels of the image as it was before it was resized.

    size_of: height and width of that image. number counts an image's boxes from 1, the one with
    most of the map (`share`) first.
    """
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(_BOX_COLUMNS)
        for image in found:
            record = cache.records[image.index]
            height, width = size_of(record)
            predicted = classes[int(image.probabilities.argmax())]
            for number, box in enumerate(image.boxes, start=1):
                box = box.scaled(width / cache.image_size, height / cache.image_size)
                corners = [round(value, 1) for value in (box.x0, box.y0, box.x1, box.y1)]
                row = [record.key, record.label, predicted, number, *corners]
                writer.writerow([*row, round(box.share, 4), width, height])


def draw_boxes(
    folder: Path,
    found: Sequence[LocalizedImage],
    cache: ImageCache,
    classes: Sequence[str],
    limit: int,
) -> Path:
    """Write overlays of up to `limit` images with heat map, boxes and mask, classes in turn.

    Returns the path of their contact sheet.
    """
    images = {image.index: image for image in found}
    chosen = [images[index] for index in in_turn(cache, list(images), classes, limit)]
    items = [
        replace(
            cached_item(cache, image.index, classes, image.probabilities, image.saliency),
            boxes=image.boxes,
        )
        for image in chosen
    ]
    return save_items(folder, items)
