"""Evaluation of a classifier over a loader: metrics, refined metrics, localization, speed."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console, ConsoleOptions, RenderResult
from torch import Tensor

from magsd.data import Batch, ImageCache
from magsd.errors import MagsdError
from magsd.evaluation.ensemble import TTA, Ensemble, Form, Outputs, run_model
from magsd.evaluation.localization import Localization, attention_inside, summarize
from magsd.evaluation.metrics import Metrics, compute_metrics, probabilities_of
from magsd.evaluation.tables import report_tables
from magsd.models.classifier import Classifier
from magsd.outputs import jsonable
from magsd.runtime import CPU, Runtime


@dataclass(frozen=True)
class Predictions:
    """Per image, in the loader's order: logits (N, K), refined logits or None, targets, indices."""

    logits: NDArray[np.float32]
    refined_logits: NDArray[np.float32] | None
    targets: NDArray[np.int64]
    indices: NDArray[np.int64]


@dataclass(frozen=True)
class EvaluationReport:
    """Result of `evaluate`; printing it with rich shows tables.

    raw: metrics of the logits of the image. refined: of the mean of these and of the logits of the
    image blended with the crop that its attention names, or None. localization: None without masks.
    """

    classes: tuple[str, ...]
    raw: Metrics
    refined: Metrics | None
    localization: Localization | None
    images_per_second: float
    predictions: Predictions = field(repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the predictions, as JSON types; an undefined number is None."""
        return {
            "classes": list(self.classes),
            "raw": jsonable(self.raw),
            "refined": jsonable(self.refined),
            "localization": jsonable(self.localization),
            "images_per_second": jsonable(self.images_per_second),
        }

    def to_json(self, path: str | Path | None = None) -> str:
        """JSON text of `to_dict`, also written to `path` where given."""
        text = json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from report_tables(
            console, options, self.classes, self.raw, self.refined, self.localization
        )


def evaluate(
    model: Classifier,
    loader: Iterable[Batch],
    cache: ImageCache | None = None,
    *,
    classes: Sequence[str],
    runtime: Runtime = CPU,
    refine: bool = True,
    tta: TTA = None,
) -> EvaluationReport:
    """Run `model` over `loader` without augmentation and report.

    loader yields batches with images (B, C, S, S), labels (B,) and indices, the rows of the images
    in `cache`. cache: where the masks are; None or no masks leaves localization out.
    runtime: device, where the model is expected, precision and kernels. The model's mode is
    restored. The results are read from the device once, at the end.
    tta: "flip" takes the mean with each image's mirror, see `magsd.evaluation.ensemble`.
    """

    def run(batch: Batch) -> tuple[Batch, Outputs]:
        return batch, run_model(model, runtime.images(batch.images), refine=refine, tta=tta)

    with runtime.inference(model):
        return _report(loader, run, cache, classes)


def evaluate_ensemble(
    ensemble: Ensemble,
    loaders: Mapping[Form, Iterable[Batch]],
    cache: ImageCache | None = None,
    *,
    refine: bool = True,
    tta: TTA = None,
) -> EvaluationReport:
    """`evaluate` of the mean of several models, whose logits are log mean probabilities.

    loaders: of every form of the ensemble, with the same images in the same batches, labels by the
    ensemble's classes. cache: that of the first form. Saliency is `mean_saliency`.
    """
    forms = ensemble.forms

    def run(batches: tuple[Batch, ...]) -> tuple[Batch, Outputs]:
        images = {form: each.images for form, each in zip(forms, batches, strict=True)}
        return batches[0], ensemble(images, refine=refine, tta=tta)

    together = zip(*(loaders[form] for form in forms), strict=True)
    return _report(together, run, cache, ensemble.classes)


T = TypeVar("T")


def _report(
    batches: Iterable[T],
    run: Callable[[T], tuple[Batch, Outputs]],
    cache: ImageCache | None,
    classes: Sequence[str],
) -> EvaluationReport:
    gathered = _Gathered()
    start = time.perf_counter()
    for each in batches:
        batch, outputs = run(each)
        gathered.add(outputs.logits, outputs.refined, batch)
        if cache is not None and cache.masks is not None:
            gathered.add_localization(outputs.saliency, cache, batch)
    predictions = gathered.predictions()
    localization = gathered.localization(classes)
    seconds = time.perf_counter() - start
    refined_metrics = (
        None
        if predictions.refined_logits is None
        else _metrics(predictions.targets, predictions.refined_logits, classes)
    )
    return EvaluationReport(
        classes=tuple(classes),
        raw=_metrics(predictions.targets, predictions.logits, classes),
        refined=refined_metrics,
        localization=localization,
        images_per_second=len(predictions.targets) / max(seconds, 1e-9),
        predictions=predictions,
    )


class _Gathered:
    """Results of the batches so far; they stay on the device until all have run."""

    def __init__(self) -> None:
        self._logits: list[Tensor] = []
        self._refined: list[Tensor] = []
        self._labels: list[Tensor] = []
        self._indices: list[int] = []
        self._shares: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, logits: Tensor, refined: Tensor | None, batch: Batch) -> None:
        self._logits.append(logits.float())
        if refined is not None:
            self._refined.append(refined.float())
        self._labels.append(batch.labels)
        self._indices.extend(batch.indices)

    def add_localization(self, saliency: Tensor, cache: ImageCache, batch: Batch) -> None:
        assert cache.masks is not None
        rows = np.asarray(batch.indices, dtype=np.int64)
        masked = np.flatnonzero(np.asarray(cache.has_mask)[rows])
        if len(masked) == 0:
            return
        within = torch.from_numpy(masked)
        masks = torch.from_numpy(np.array(cache.masks[rows[masked]])).to(saliency.device)
        shares = attention_inside(saliency[within.to(saliency.device)], masks)
        self._shares.append((*shares, batch.labels[within.to(batch.labels.device)]))

    def predictions(self) -> Predictions:
        if not self._indices:
            raise MagsdError("nothing to evaluate: the loader gave no images")
        return Predictions(
            logits=_read(self._logits),
            refined_logits=_read(self._refined) if self._refined else None,
            targets=_read(self._labels),
            indices=np.asarray(self._indices, dtype=np.int64),
        )

    def localization(self, classes: Sequence[str]) -> Localization | None:
        if not self._shares:
            return None
        inside, uniform, labels = (
            _read(list(column)) for column in zip(*self._shares, strict=True)
        )
        return summarize(inside, uniform, labels, classes)


def _metrics(
    targets: NDArray[np.int64], logits: NDArray[np.float32], classes: Sequence[str]
) -> Metrics:
    if not np.isfinite(logits).all():
        bad = int((~np.isfinite(logits)).any(axis=1).sum())
        raise MagsdError(
            f"the model's logits are not finite for {bad} of {len(logits)} images: its weights "
            "have diverged, or the precision overflows"
        )
    return compute_metrics(targets, probabilities_of(logits), classes)


def _read(values: list[Tensor]) -> NDArray[Any]:
    """One array of all, in their dtype."""
    return torch.cat(values).cpu().numpy()
