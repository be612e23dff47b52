"""Predictions for image files."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from magsd.data import z_score
from magsd.data.cache import prepare_image
from magsd.data.images import read_image_file
from magsd.errors import DataError, RunError
from magsd.evaluation.ensemble import TTA, Ensemble, Form, Member, Outputs, run_model
from magsd.evaluation.metrics import probabilities_of
from magsd.evaluation.overlay import OverlayItem, fitted, save_overlay
from magsd.models.classifier import Classifier
from magsd.models.config import Preprocessing
from magsd.outputs import check_file, has_mark
from magsd.runtime import CPU, Runtime

if TYPE_CHECKING:
    from magsd.reporting.operating import OperatingPoint

_NAMED_BAD = 10
_LONGEST_STEM = 240  # bytes, so that a number and .png fit into a name of 255
# An image as each of the models takes it, and as it is drawn.
_Read = tuple[dict[Form, NDArray[np.uint8]], NDArray[np.uint8]]


@dataclass(frozen=True)
class Prediction:
    """Of one image file: most probable class, all probabilities, overlay where one was asked.

    calibrated, findings: probabilities at the temperature of an operating point, and the classes
    whose own reaches its threshold; None without such a point.
    """

    path: Path
    label: str
    probabilities: dict[str, float]
    overlay: Path | None = None
    calibrated: dict[str, float] | None = None
    findings: tuple[str, ...] | None = None


def predict_images(
    model: Classifier,
    paths: Sequence[str | Path],
    *,
    classes: Sequence[str] | None = None,
    preprocessing: Preprocessing | None = None,
    runtime: Runtime = CPU,
    refine: bool = True,
    tta: TTA = None,
    batch_size: int = 16,
    overlay_dir: str | Path | None = None,
    on_bad: Callable[[Path, str], None] | None = None,
) -> list[Prediction]:
    """Probabilities of image files, in their order, and PNG overlays where a folder is given.

    classes and preprocessing default to those the model was saved with (RunError without any).
    No file is replaced that is not such an overlay, and none of the images (RunError, before the
    first image is read).
    refine: use the mean of the logits of the image and of its mix-up view. tta: "flip" takes the
    mean of the probabilities of each image and of its mirror. A file that cannot be read is a
    DataError that names it; with `on_bad` (called with path and reason) it is left out.
    The model is expected on the runtime's device.
    """
    member = Member(model, *_described(model, classes, preprocessing), runtime)
    return predict_ensemble(
        Ensemble([member]),
        paths,
        refine=refine,
        tta=tta,
        batch_size=batch_size,
        overlay_dir=overlay_dir,
        on_bad=on_bad,
    )


def predict_ensemble(
    ensemble: Ensemble,
    paths: Sequence[str | Path],
    *,
    refine: bool = True,
    tta: TTA = None,
    batch_size: int = 16,
    overlay_dir: str | Path | None = None,
    on_bad: Callable[[Path, str], None] | None = None,
) -> list[Prediction]:
    """`predict_images` of several models: the mean of their probabilities and of their maps.

    Each file is read once, and prepared as each of the models needs it.
    """
    files = [Path(path) for path in paths]
    if on_bad is None:
        _check_present(files)
    overlays = overlay_names(files, Path(overlay_dir)) if overlay_dir is not None else None
    check_overlays(overlays or (), files)
    read = partial(_read, forms=ensemble.forms, draws=overlays is not None)
    predictions = []
    for rows, batch in _batches(files, batch_size, read, on_bad):
        images = {form: _as_input([each[form] for each, _ in batch]) for form in ensemble.forms}
        outputs = ensemble(images, refine=refine, tta=tta)
        probabilities, saliency = _on_host(outputs)
        for place, row in enumerate(rows):
            values = probabilities[place]
            best = _likeliest(values, files[row])
            label, overlay = ensemble.classes[best], None
            if overlays is not None:
                picture, heat = batch[place][1], saliency[place, 0]
                item = OverlayItem(picture, heat, label, float(values[best]))
                overlay = save_overlay(overlays[row], item)
            named = dict(zip(ensemble.classes, values.tolist(), strict=True))
            predictions.append(Prediction(files[row], label, named, overlay))
    return predictions


def with_findings(predictions: Sequence[Prediction], point: OperatingPoint) -> list[Prediction]:
    """Predictions of the classes of an operating point, in its order, with what it says of them."""
    found = []
    for prediction in predictions:
        values = np.array([list(prediction.probabilities.values())])
        # Up to a constant these are the logits; a probability may have become 0.
        calibrated = point.probabilities(np.log(np.maximum(values, np.finfo(np.float64).tiny)))
        named = dict(zip(prediction.probabilities, calibrated[0].tolist(), strict=True))
        positive = point.positive(calibrated)[0]
        findings = tuple(name for name, is_so in zip(named, positive, strict=True) if is_so)
        found.append(replace(prediction, calibrated=named, findings=findings))
    return found


def _likeliest(probabilities: NDArray[np.float64], file: Path) -> int:
    if not np.isfinite(probabilities).all():
        raise RunError(
            f"{file}: the model's logits are not finite: its weights have diverged, or the "
            "precision overflows"
        )
    return int(probabilities.argmax())


def run_batch(
    model: Classifier, images: Tensor, refine: bool
) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
    """Probabilities (B, K) and saliency maps (B, 1, h, w) of a batch on the model's device."""
    return _on_host(run_model(model, images, refine=refine))


def _on_host(outputs: Outputs) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
    logits = outputs.logits if outputs.refined is None else outputs.refined
    return probabilities_of(logits.float().cpu().numpy()), outputs.saliency.cpu().numpy()


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


def _read(file: Path, forms: Sequence[Form], draws: bool) -> _Read:
    """What is kept of a file; its own pixels may be a hundred times as many."""
    image = read_image_file(file)
    prepared = {
        (how, channels): prepare_image(image, how.image_size, channels, how.clahe)
        for how, channels in forms
    }
    return prepared, fitted(image) if draws else next(iter(prepared.values()))


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
