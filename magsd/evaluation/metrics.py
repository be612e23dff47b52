"""Classification metrics: each class against the rest, and their means over classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support, roc_auc_score

NAN = float("nan")


@dataclass(frozen=True)
class ClassMetrics:
    """One class against the rest, each in 0..1; NaN where undefined.

    A class that is never predicted has precision 0. Recall and F1 of a class without images, and
    specificity and AUROC where every image is of the class, are undefined.
    """

    images: int
    precision: float
    recall: float
    f1: float
    specificity: float
    false_positive_rate: float
    auroc: float


@dataclass(frozen=True)
class Metrics:
    """Over all images; means are unweighted over the classes that have images (macro).

    confusion[i][j]: images of class i that were taken for class j, classes in the given order.
    top5_accuracy: share of the images whose class is among the five likeliest; None for fewer than
    eleven classes.
    """

    images: int
    accuracy: float
    precision: float
    recall: float
    f1: float
    specificity: float
    false_positive_rate: float
    auroc: float
    confusion: list[list[int]]
    per_class: dict[str, ClassMetrics]
    top5_accuracy: float | None = None


AVERAGED: tuple[str, ...] = (
    "precision",
    "recall",
    "f1",
    "specificity",
    "false_positive_rate",
    "auroc",
)


def compute_metrics(
    targets: ArrayLike, probabilities: ArrayLike, classes: Sequence[str]
) -> Metrics:
    """Metrics of probabilities (N, K) against class indices (N,); the prediction is the argmax.

    Raises ValueError for no images, wrong shapes, a target outside the classes, or a probability
    that is not finite.
    """
    truth = np.asarray(targets)
    scores = np.asarray(probabilities, dtype=np.float64)
    _check(truth, scores, len(classes))
    predicted = scores.argmax(axis=1)
    labels = np.arange(len(classes))
    confusion = confusion_matrix(truth, predicted, labels=labels)
    precision, recall, f1, support = precision_recall_fscore_support(
        truth, predicted, labels=labels, zero_division=0.0
    )
    others = len(truth) - support
    false_positives = confusion.sum(axis=0) - confusion.diagonal()
    per_class = {}
    for k, name in enumerate(classes):
        present = support[k] > 0
        # Share of the images of other classes that were not taken for this one.
        specificity = float(1.0 - false_positives[k] / others[k]) if others[k] else NAN
        per_class[name] = ClassMetrics(
            images=int(support[k]),
            precision=float(precision[k]),
            recall=float(recall[k]) if present else NAN,
            f1=float(f1[k]) if present else NAN,
            specificity=specificity,
            false_positive_rate=1.0 - specificity,
            auroc=_auroc(truth == k, scores[:, k]),
        )
    present_classes = [m for m in per_class.values() if m.images]
    return Metrics(
        images=len(truth),
        accuracy=float(np.trace(confusion) / len(truth)),
        **{name: _mean([getattr(m, name) for m in present_classes]) for name in AVERAGED},
        confusion=confusion.tolist(),
        per_class=per_class,
        top5_accuracy=_top5_accuracy(truth, scores) if len(classes) > 10 else None,
    )


def _top5_accuracy(truth: NDArray[np.integer], scores: NDArray[np.float64]) -> float:
    """Of equal scores the first class is the likelier one, as in the argmax."""
    own = np.take_along_axis(scores, truth[:, None], axis=1)
    earlier = np.arange(scores.shape[1]) < truth[:, None]
    likelier = ((scores > own) | ((scores == own) & earlier)).sum(axis=1)
    return float((likelier < 5).mean())


def _check(truth: NDArray[np.integer], scores: NDArray[np.float64], num_classes: int) -> None:
    if truth.ndim != 1 or len(truth) == 0:
        raise ValueError(f"targets: expected (N,) with N >= 1, got shape {truth.shape}")
    if scores.shape != (len(truth), num_classes):
        raise ValueError(
            f"probabilities: expected shape {(len(truth), num_classes)}, got {scores.shape}"
        )
    if truth.min() < 0 or truth.max() >= num_classes:
        raise ValueError(f"targets: expected 0..{num_classes - 1}, got {np.unique(truth).tolist()}")
    bad = int((~np.isfinite(scores)).any(axis=1).sum())
    if bad:
        raise ValueError(f"probabilities: not finite for {bad} of {len(truth)} images")


def _auroc(positive: NDArray[np.bool_], score: NDArray[np.float64]) -> float:
    return float(roc_auc_score(positive, score)) if 0 < positive.sum() < len(positive) else NAN


def _mean(values: list[float]) -> float:
    defined = [v for v in values if not np.isnan(v)]
    return float(np.mean(defined)) if defined else NAN


def probabilities_of(logits: NDArray[np.floating]) -> NDArray[np.float64]:
    """Softmax over the last axis in double precision."""
    return torch.from_numpy(np.asarray(logits, dtype=np.float64)).softmax(dim=-1).numpy()
