"""Where a classifier looks: boxes from its maps, and how well maps and boxes meet the masks."""

from __future__ import annotations

from magsd.evaluation.localization.boxes import Box
from magsd.evaluation.localization.images import (
    LocalizedImage,
    localization_report,
    localize,
    write_boxes,
)
from magsd.evaluation.localization.scores import (
    Localization,
    LocalizationReport,
    LocalizationScore,
    MapScores,
    attention_inside,
    score_map,
    summarize,
)

__all__ = [
    "Box",
    "Localization",
    "LocalizationReport",
    "LocalizationScore",
    "LocalizedImage",
    "MapScores",
    "attention_inside",
    "localization_report",
    "localize",
    "score_map",
    "summarize",
    "write_boxes",
]
