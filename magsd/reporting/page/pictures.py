"""Images that a run's model got wrong or right, with its attention maps."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from magsd.errors import MagsdError
from magsd.reporting.page.contents import ModelReport
from magsd.reporting.page.words import number

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from magsd.data import ImageCache
    from magsd.training.run import LoadedRun

# Shorter side in pixels: about two for each of the page's.
_SIZE = 384


@dataclass(frozen=True)
class Picture:
    """One image as data URIs, alone and under its attention map."""

    image: str
    overlay: str
    caption: str
    alt: str


@dataclass(frozen=True)
class Group:
    """Pictures under a title."""

    title: str
    items: list[Picture]


@dataclass(frozen=True)
class Pictures:
    """What the page shows, and notes of what it cannot show."""

    groups: list[Group] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def draw_pictures(models: list[ModelReport], limit: int) -> Pictures:
    """Up to `limit` wrong and as many right images of each model whose run and images are there.

    Both are those of the highest probability of the predicted class.
    """
    if not limit:
        return Pictures(notes=["No images were asked for (--images 0)."])
    found = Pictures()
    for model in models:
        run = model.input.run
        if run is None:
            what = "predictions out of several folds" if model.input.folds else "a file alone"
            found.notes.append(
                f"{model.name}: {what}; images are shown of a run's folder whose images are there."
            )
            continue
        try:
            found.groups.extend(_of_run(run, model, limit, title=len(models) > 1))
        except (MagsdError, OSError) as error:
            found.notes.append(f"{model.name}: its images cannot be shown: {error}")
    return found


def _of_run(run: Path, model: ModelReport, limit: int, *, title: bool) -> list[Group]:
    from magsd.data.run_data import open_images
    from magsd.data.shards import is_shards
    from magsd.errors import DataError
    from magsd.training.run import load_run

    loaded = load_run(run)
    data = loaded.config.data
    table = model.table
    apart = table.splits[0] == "test" and data.test not in ("folds", "none")
    source = data.test if apart else data.source
    if is_shards(source):
        raise DataError("the run read its images from shards, in which no image is looked up")
    _, cache = open_images(loaded.config, source, classes=loaded.classes)
    rows = {record.key: row for row, record in enumerate(cache.records)}
    predicted = table.predicted(model.kind)
    confidence = table.of(model.kind).max(axis=1)
    wrong = predicted != table.labels
    groups = []
    for name, chosen in (("Wrong, though sure", wrong), ("Right, and sure", ~wrong)):
        order = np.argsort(-confidence, kind="stable")
        known = [int(k) for k in order if chosen[k] and table.keys[k] in rows][:limit]
        items = _draw(loaded, cache, [rows[table.keys[k]] for k in known], model.kind == "refined")
        pictures = [_picture(model, k, *images) for k, images in zip(known, items, strict=True)]
        heading = f"{model.name}: {name.lower()}" if title else name
        if pictures:
            groups.append(Group(heading, pictures))
    if not groups:
        raise DataError(f"{source} holds none of the reported images")
    return groups


def _draw(
    loaded: LoadedRun, cache: ImageCache, rows: list[int], refine: bool
) -> list[tuple[NDArray[np.uint8], NDArray[np.uint8]]]:
    """Each image as it is and under its map, in the order of the rows."""
    from magsd.data.run_data import plain_loader
    from magsd.evaluation.overlay import fitted, overlay_image
    from magsd.evaluation.predict import run_batch

    drawn = {}
    with loaded.runtime.inference(loaded.model):
        for batch in plain_loader(loaded.config, cache, rows, loaded.classes) if rows else ():
            _, maps = run_batch(loaded.model, loaded.runtime.images(batch.images), refine)
            for k, row in enumerate(batch.indices):
                image = np.array(cache.images[row])
                overlay = overlay_image(image, maps[k, 0], cache.mask(row), size=_SIZE)
                drawn[row] = fitted(image, _SIZE), overlay
    return [drawn[row] for row in rows]


def _picture(
    model: ModelReport, row: int, image: NDArray[np.uint8], overlay: NDArray[np.uint8]
) -> Picture:
    table = model.table
    scores = table.of(model.kind)[row]
    true, best = table.classes[table.labels[row]], table.classes[int(scores.argmax())]
    sure = number(float(scores.max()), 2)
    caption = f"{true}, predicted with {sure}"
    if true != best:
        caption = f"{true}, taken for {best} with {sure}"
    return Picture(_uri(image), _uri(overlay), f"{caption} ({table.keys[row]})", caption)


def _uri(picture: NDArray[np.uint8]) -> str:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
