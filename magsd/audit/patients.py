"""Images and patients of each class and side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from magsd.data.record import Record


@dataclass(frozen=True)
class ClassCounts:
    """One class: images, patients, images of a patient (median and most), images by side."""

    images: int
    patients: int
    median_images: float
    most_images: int
    by_side: dict[str, int]


@dataclass(frozen=True)
class PatientReport:
    """patients: how many. on_several_sides, in_several_classes: patient -> images there."""

    patients: int
    on_several_sides: dict[str, dict[str, int]]
    in_several_classes: dict[str, dict[str, int]]
    per_class: dict[str, ClassCounts]


def count_patients(
    records: Sequence[Record], sides: Sequence[str], classes: Sequence[str]
) -> PatientReport:
    """Count; sides: of each record, empty for none."""
    by_side: dict[str, Counter[str]] = {}
    by_class: dict[str, Counter[str]] = {}
    for record, side in zip(records, sides, strict=True):
        by_class.setdefault(record.patient, Counter())[record.label] += 1
        if side:
            by_side.setdefault(record.patient, Counter())[side] += 1
    return PatientReport(
        patients=len(by_class),
        on_several_sides=_several(by_side),
        in_several_classes=_several(by_class),
        per_class={name: _class_counts(records, sides, name) for name in classes},
    )


def _several(counts: dict[str, Counter[str]]) -> dict[str, dict[str, int]]:
    return {patient: dict(found) for patient, found in sorted(counts.items()) if len(found) > 1}


def _class_counts(records: Sequence[Record], sides: Sequence[str], name: str) -> ClassCounts:
    own = [(r.patient, side) for r, side in zip(records, sides, strict=True) if r.label == name]
    images = list(Counter(patient for patient, _ in own).values())
    return ClassCounts(
        images=len(own),
        patients=len(images),
        median_images=float(np.median(images)) if images else 0.0,
        most_images=max(images, default=0),
        by_side=dict(Counter(side for _, side in own if side)),
    )
