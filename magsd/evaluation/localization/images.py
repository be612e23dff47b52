"""Where a classifier looks: boxes from its maps, and how well they meet the masks."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from magsd.data import Batch, ImageCache, Record
from magsd.evaluation.localization.boxes import Box, component_boxes, hot_region
from magsd.evaluation.localization.scores import (
    LocalizationReport,
    MapScores,
    group_scores,
    score_map,
    upsampled,
)
from magsd.evaluation.metrics import probabilities_of
from magsd.models.classifier import Classifier
from magsd.runtime import CPU, Runtime

_BOX_COLUMNS = [
    *("key", "label", "predicted", "number", "x0", "y0", "x1", "y1", "share"),
    *("image_width", "image_height"),
]


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


def localize(
    model: Classifier,
    loader: Iterable[Batch],
    cache: ImageCache,
    *,
    runtime: Runtime = CPU,
    threshold: float = 0.5,
    tolerance: float = 0.0,
) -> list[LocalizedImage]:
    """Boxes of every image of a loader over `cache`, and scores of those with a mask.

    threshold: 0..1, share of a map's maximum from which on a pixel belongs to a box. tolerance: in
    pixels of the network's input; Zhang et al. allow 15.
    """
    found = []
    with runtime.inference(model):
        for batch in loader:
            output = model(runtime.images(batch.images))
            saliency = model.saliency(output).float()
            heat = upsampled(saliency, cache.images.shape[1:3]).cpu().numpy()
            probabilities = probabilities_of(output.logits.float().cpu().numpy())
            low = saliency.cpu().numpy()
            for k, index in enumerate(batch.indices):
                mask, scores = cache.mask(index), None
                if mask is not None:
                    scores = score_map(heat[k], mask > 0, threshold=threshold, tolerance=tolerance)
                found.append(
                    LocalizedImage(
                        index=index,
                        probabilities=probabilities[k],
                        saliency=low[k],
                        boxes=component_boxes(hot_region(heat[k], threshold), heat[k]),
                        masked=mask is not None,
                        scores=scores,
                    )
                )
    return found


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
    by_class: dict[str, list[LocalizedImage]] = {name: [] for name in classes}
    for image in masked:
        by_class[records[image.index].label].append(image)
    return LocalizationReport(
        threshold,
        tolerance,
        image_size,
        group_scores([image.scores for image in masked]),
        {
            name: group_scores([image.scores for image in images])
            for name, images in by_class.items()
            if images
        },
    )


def write_boxes(
    path: Path,
    found: Sequence[LocalizedImage],
    cache: ImageCache,
    classes: Sequence[str],
    size_of: Callable[[Record], tuple[int, ...]],
) -> None:
    """Write a CSV with one row per box, in pixels of the image as it was before it was resized.

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
