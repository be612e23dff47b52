"""Predictions for image files."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from magsd.data import z_score
from magsd.data.cache import prepare_image
from magsd.data.images import read_image_file
from magsd.errors import DataError, RunError
from magsd.evaluation.evaluate import refined_logits
from magsd.evaluation.metrics import probabilities_of
from magsd.evaluation.overlay import OverlayItem, fitted, save_overlay
from magsd.models.classifier import Classifier
from magsd.models.config import Preprocessing
from magsd.outputs import check_file, has_mark
from magsd.runtime import CPU, Runtime

_NAMED_BAD = 10
_LONGEST_STEM = 240  # bytes, so that a number and .png fit into a name of 255
# An image as the model takes it, and as it is drawn.
_Read = tuple[NDArray[np.uint8], NDArray[np.uint8]]


@dataclass(frozen=True)
class Prediction:
    """Of one image file: most probable class, all probabilities, overlay where one was asked."""

    path: Path
    label: str
    probabilities: dict[str, float]
    overlay: Path | None = None


def predict_images(
    model: Classifier,
    paths: Sequence[str | Path],
    *,
    classes: Sequence[str] | None = None,
    preprocessing: Preprocessing | None = None,
    runtime: Runtime = CPU,
    refine: bool = True,
    batch_size: int = 16,
    overlay_dir: str | Path | None = None,
    on_bad: Callable[[Path, str], None] | None = None,
) -> list[Prediction]:
    """Probabilities of image files, in their order, and PNG overlays where a folder is given.

    classes and preprocessing default to those the model was saved with (RunError without any).
    No file is replaced that is not such an overlay, and none of the images (RunError, before the
    first image is read).
    refine: use the mean of the logits of the image and of its mix-up view. A file that cannot be
    read is a DataError that names it; with `on_bad` (called with path and reason) it is left out.
    The model is expected on the runtime's device.
    """
    classes, preprocessing = _described(model, classes, preprocessing)
    files = [Path(path) for path in paths]
    if on_bad is None:
        _check_present(files)
    overlays = overlay_names(files, Path(overlay_dir)) if overlay_dir is not None else None
    check_overlays(overlays or (), files)
    read = partial(
        _read,
        preprocessing=preprocessing,
        channels=model.in_channels,
        draws=overlays is not None,
    )
    predictions = []
    with runtime.inference(model):
        for rows, batch in _batches(files, batch_size, read, on_bad):
            images = _as_input([prepared for prepared, _ in batch])
            probabilities, saliency = run_batch(model, runtime.images(images), refine)
            for place, row in enumerate(rows):
                values = probabilities[place]
                if not np.isfinite(values).all():
                    raise RunError(
                        f"{files[row]}: the model's logits are not finite: its weights have"
                        " diverged, or the precision overflows"
                    )
                best = int(values.argmax())
                overlay = None
                if overlays is not None:
                    overlay = save_overlay(
                        overlays[row],
                        OverlayItem(
                            image=batch[place][1],
                            saliency=saliency[place, 0],
                            predicted=classes[best],
                            probability=float(values[best]),
                        ),
                    )
                named = dict(zip(classes, values.tolist(), strict=True))
                predictions.append(Prediction(files[row], classes[best], named, overlay))
    return predictions


def run_batch(
    model: Classifier, images: Tensor, refine: bool
) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
    """Probabilities (B, K) and saliency maps (B, 1, h, w) of a batch on the model's device."""
    output = model(images)
    saliency = model.saliency(output)
    logits = refined_logits(model, images, output, saliency) if refine else output.logits
    return probabilities_of(logits.float().cpu().numpy()), saliency.cpu().numpy()


def _described(
    model: Classifier, classes: Sequence[str] | None, preprocessing: Preprocessing | None
) -> tuple[tuple[str, ...], Preprocessing]:
    names = classes if classes is not None else model.classes
    prepared = preprocessing if preprocessing is not None else model.preprocessing
    if names is None or prepared is None:
        lacking = "class names" if names is None else "preprocessing"
        raise RunError(f"the model was saved without its {lacking}, and none were given")
    if len(names) != model.num_classes:
        raise RunError(f"the model has {model.num_classes} classes, got the names {list(names)}")
    return tuple(names), prepared


def _check_present(files: Sequence[Path]) -> None:
    missing = [str(file) for file in files if not os.path.isfile(file)]
    if missing:
        more = f" and {len(missing) - _NAMED_BAD} more" if len(missing) > _NAMED_BAD else ""
        raise DataError(
            f"{len(missing)} of {len(files)} images not found: "
            f"{', '.join(missing[:_NAMED_BAD])}{more}"
        )


def check_overlays(overlays: Sequence[Path], files: Sequence[Path]) -> None:
    """Raise RunError where an overlay would replace an image, or another file that is none."""
    inputs = {file.resolve() for file in files}

    def is_own(path: Path) -> bool:
        return has_mark(path) and path.resolve() not in inputs

    for path in overlays:
        check_file(path, "overlay", is_own=is_own)


def _read(file: Path, preprocessing: Preprocessing, channels: int, draws: bool) -> _Read:
    """What is kept of a file; its own pixels may be a hundred times as many."""
    image = read_image_file(file)
    prepared = prepare_image(image, preprocessing.image_size, channels, preprocessing.clahe)
    return prepared, fitted(image) if draws else prepared


def _batches(
    files: Sequence[Path],
    batch_size: int,
    read: Callable[[Path], _Read],
    on_bad: Callable[[Path, str], None] | None,
) -> Iterator[tuple[list[int], list[_Read]]]:
    """Numbers of the readable files and what is kept of them, a batch at a time."""
    rows: list[int] = []
    images: list[_Read] = []
    for row, file in enumerate(files):
        try:
            image = read(file)
        except DataError as error:
            if on_bad is None:
                raise
            on_bad(file, str(error))
            continue
        rows.append(row)
        images.append(image)
        if len(rows) == batch_size:
            yield rows, images
            rows, images = [], []
    if rows:
        yield rows, images


def _as_input(prepared: Sequence[NDArray[np.uint8]]) -> Tensor:
    """The batch (B, channels, S, S) that training would make of prepared images."""
    pixels = torch.from_numpy(np.stack(prepared))
    pixels = pixels[:, None] if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)
    return z_score(pixels.to(torch.float32).div_(255).contiguous())


def overlay_names(files: Sequence[Path], folder: Path) -> list[Path]:
    """A PNG in `folder` for every file; files of the same stem are numbered, long ones cut."""
    taken: set[str] = set()
    names = []
    for file in files:
        stem = os.fsdecode(os.fsencode(file.stem)[:_LONGEST_STEM])
        name, number = stem, 1
        while name in taken:
            number += 1
            name = f"{stem}_{number}"
        taken.add(name)
        names.append(folder / f"{name}.png")
    return names
