"""Overlays of some of a cache's images: what a model looks at, or boxes around that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain, zip_longest
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from magsd.data import BatchLoader, ImageCache
from magsd.evaluation.localization import LocalizedImage, attention_inside
from magsd.evaluation.overlay import OverlayItem, save_items
from magsd.evaluation.predict import run_batch
from magsd.models.classifier import Classifier
from magsd.runtime import CPU, Runtime


def write_overlays(
    model: Classifier,
    cache: ImageCache,
    indices: Sequence[int],
    folder: str | Path,
    *,
    classes: Sequence[str],
    limit: int = 16,
    runtime: Runtime = CPU,
    refine: bool = True,
    title: str | None = None,
) -> Path:
    """Write overlays of up to `limit` of the cache's images, the classes in turn, into a folder.

    Returns the path of their contact sheet.
    """
    if limit < 1 or not len(indices):
        raise ValueError(f"expected at least one image, got limit {limit} of {len(indices)}")
    chosen = in_turn(cache, indices, classes, limit)
    loader = BatchLoader(
        cache,
        chosen,
        classes,
        batch_size=16,
        shuffle=False,
        seed=0,
        augment=None,
        device=runtime.device,
        channels=model.in_channels,
    )
    items: list[OverlayItem] = []
    with runtime.inference(model):
        for batch in loader:
            probabilities, saliency = run_batch(model, runtime.images(batch.images), refine)
            for k, index in enumerate(batch.indices):
                mask = cache.mask(index)
                shares = None
                if mask is not None:
                    one = torch.from_numpy(saliency[k])[None], torch.from_numpy(mask)[None]
                    shares = tuple(float(share) for share in attention_inside(*one))
                items.append(
                    cached_item(cache, index, classes, probabilities[k], saliency[k], shares)
                )
    return save_items(folder, items, title=title)


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
    items = []
    for image in chosen:
        scores = image.scores
        shares = None if scores is None else (scores.values["inside"], scores.uniform["inside"])
        item = cached_item(cache, image.index, classes, image.probabilities, image.saliency, shares)
        items.append(replace(item, boxes=image.boxes))
    return save_items(folder, items)


def in_turn(
    cache: ImageCache, indices: Sequence[int], classes: Sequence[str], limit: int
) -> list[int]:
    """Up to `limit` of the indices, one of each class after the other."""
    by_class: dict[str, list[int]] = {name: [] for name in classes}
    for i in indices:
        by_class[cache.records[i].label].append(i)
    rounds = chain.from_iterable(zip_longest(*by_class.values()))
    return [i for i in rounds if i is not None][:limit]


def cached_item(
    cache: ImageCache,
    index: int,
    classes: Sequence[str],
    probabilities: NDArray[np.float64],
    saliency: NDArray[np.float32],
    shares: tuple[float, ...] | None,
) -> OverlayItem:
    """Picture of a cached image: probabilities (K,), saliency (1, h, w).

    shares: of the attention, and of the area, inside the mask.
    """
    best = int(probabilities.argmax())
    inside, uniform = shares or (None, None)
    return OverlayItem(
        image=np.array(cache.images[index]),
        saliency=saliency[0],
        predicted=classes[best],
        probability=float(probabilities[best]),
        label=cache.records[index].label,
        mask=cache.mask(index),
        inside=inside,
        uniform=uniform,
        name=cache.records[index].key,
    )
