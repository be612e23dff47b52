"""Which pairs of images are taken for one picture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from magsd.audit import copies
from magsd.audit.copies import Pair, find_copies
from magsd.data.cache import prepare_image

Image = NDArray[np.uint8]


def pairs_of(*images: Image) -> list[Pair]:
    thumbnails = np.stack([prepare_image(image, 64) for image in images])
    return find_copies(thumbnails, [image.tobytes() for image in images])


def jpeg(image: Image, quality: int) -> Image:
    coded = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
    return np.asarray(cv2.imdecode(coded, cv2.IMREAD_UNCHANGED), np.uint8)


CHANGES: dict[str, Callable[[Image], Any]] = {
    "reduced": lambda image: cv2.resize(image, (70, 70), interpolation=cv2.INTER_AREA),
    "enlarged": lambda image: cv2.resize(image, (300, 200), interpolation=cv2.INTER_CUBIC),
    "coded again": lambda image: jpeg(image, 50),
    "equalized": lambda image: cv2.createCLAHE(2.0, (8, 8)).apply(image),
    "brighter": lambda image: (255 * (image / 255) ** 0.7).astype(np.uint8),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_copies_are_found_as_they_lie(change: str, picture: Any) -> None:
    others = [picture(seed) for seed in range(20)]
    changed = CHANGES[change](others[7])
    (pair,) = pairs_of(*others, changed)
    assert (pair.first, pair.second, pair.kind) == (7, 20, "near")
    assert 0 < pair.distance <= copies.NEAR


def test_a_cropped_copy_is_found_after_alignment(picture: Any) -> None:
    others = [picture(seed) for seed in range(20)]
    (pair,) = pairs_of(*others, others[3][3:, 4:])
    assert (pair.first, pair.second, pair.kind) == (3, 20, "aligned")
    assert pair.distance <= copies.ALIGNED


def test_exact_copies_are_paired_with_the_first_of_them(picture: Any) -> None:
    a, b = picture(0), picture(1)
    assert pairs_of(a, b, a, a) == [Pair(0, 2, "exact", 0.0), Pair(0, 3, "exact", 0.0)]


def test_a_copy_of_a_copy_is_compared_once(picture: Any) -> None:
    a = picture(0)
    found = pairs_of(a, a, jpeg(a, 30))
    assert [(pair.first, pair.second, pair.kind) for pair in found] == [
        (0, 1, "exact"),
        (0, 2, "near"),
    ]


def test_images_of_one_gray_level_are_no_near_copies() -> None:
    flat = [np.full((64, 64), level, np.uint8) for level in (0, 9, 9, 200)]
    assert pairs_of(*flat) == [Pair(1, 2, "exact", 0.0)]


@pytest.mark.parametrize("count", [0, 1])
def test_few_images_have_no_pairs(count: int, picture: Any) -> None:
    thumbnails = np.zeros((count, 64, 64), np.uint8)
    assert find_copies(thumbnails, [b""] * count) == []


def test_blocks_of_the_matrix_of_pairs_change_nothing(
    picture: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = [picture(seed) for seed in range(9)]
    images += [jpeg(images[0], 60), jpeg(images[8], 60)]
    whole = pairs_of(*images)
    assert {(pair.first, pair.second) for pair in whole} == {(0, 9), (8, 10)}
    monkeypatch.setattr(copies, "_BLOCK", 25)  # two rows at a time
    again = pairs_of(*images)
    assert [(p.first, p.second, p.kind) for p in again] == [
        (p.first, p.second, p.kind) for p in whole
    ]


def test_of_very_many_alike_pairs_the_first_are_looked_at(
    picture: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(copies, "_MOST_PAIRS", 3)
    monkeypatch.setattr(copies, "ALIGNED", -1.0)
    a = picture(0)
    assert len(pairs_of(*(jpeg(a, quality) for quality in (30, 50, 70, 90)))) == 3
    assert "6 pairs of images are much alike; the first 3 are looked at" in caplog.text


@pytest.mark.slow
def test_different_radiographs_are_no_copies(shared_dir: Path) -> None:
    """Thresholds were chosen on these; the figures stand in docs/data.md."""
    from magsd.audit.measures import measure_images
    from magsd.data import open_source

    source = open_source(f"csv:{shared_dir}/data/cxr3/labels.csv", limit=150)
    measured = measure_images(source)
    found = find_copies(measured.thumbnails, measured.digests)
    patients = [record.patient for record in measured.records]
    assert sum(patients[p.first] != patients[p.second] for p in found) <= 1
