"""Measuring and showing what a classifier does."""

from __future__ import annotations

from magsd.evaluation.ensemble import Ensemble, Member, refined_logits
from magsd.evaluation.evaluate import EvaluationReport, evaluate, evaluate_ensemble
from magsd.evaluation.examples import draw_boxes, write_overlays
from magsd.evaluation.localization import (
    Localization,
    LocalizationScore,
    attention_inside,
    localize,
)
from magsd.evaluation.metrics import ClassMetrics, Metrics, compute_metrics
from magsd.evaluation.overlay import OverlayItem, contact_sheet, overlay_image, save_overlay
from magsd.evaluation.plots import plot_confusion, plot_curves
from magsd.evaluation.predict import Prediction, predict_ensemble, predict_images

__all__ = [
    "ClassMetrics",
    "Ensemble",
    "EvaluationReport",
    "Localization",
    "LocalizationScore",
    "Member",
    "Metrics",
    "OverlayItem",
    "Prediction",
    "attention_inside",
    "compute_metrics",
    "contact_sheet",
    "draw_boxes",
    "evaluate",
    "evaluate_ensemble",
    "localize",
    "overlay_image",
    "plot_confusion",
    "plot_curves",
    "predict_ensemble",
    "predict_images",
    "refined_logits",
    "save_overlay",
    "write_overlays",
]
