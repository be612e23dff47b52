"""The drawn radiographs."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from magsd.data import open_source
from magsd.data.phantom import CLASSES, draw_phantom
from magsd.errors import DataError


def test_records() -> None:
    source = open_source("phantom:n=48,seed=3,size=64")
    assert source.classes == ("diffuse", "focal", "ground-glass", "normal")
    assert Counter(r.label for r in source.records) == dict.fromkeys(CLASSES, 12)
    assert source.records[7].key == "phantom/3/000007"
    assert len({r.patient for r in source.records}) == 32
    labels: dict[str, set[str]] = {}
    for record in source.records:
        labels.setdefault(record.patient, set()).add(record.label)
    assert all(len(names) == 1 for names in labels.values())
    assert all((r.mask_kind is None) == (r.label == "normal") for r in source.records)


def test_spec_opens_the_same_again() -> None:
    source = open_source("phantom")
    assert source.spec == "phantom:n=480,seed=0,size=224"
    assert open_source(source.spec).records == source.records


def test_image_depends_on_seed_and_number_only() -> None:
    few, many = open_source("phantom:n=6,size=64"), open_source("phantom:n=60,size=64")
    record = few.records[5]
    image = few.read_image(record)
    assert image.dtype == np.uint8
    assert image.shape == (64, 64)
    many.read_image(many.records[1])
    np.testing.assert_array_equal(many.read_image(many.records[5]), image)
    other = open_source("phantom:n=6,seed=1,size=64")
    assert not np.array_equal(other.read_image(other.records[5]), image)
    assert not np.array_equal(few.read_image(few.records[4]), image)


@pytest.mark.parametrize("label", CLASSES)
@pytest.mark.parametrize("size", [32, 96, 225])
def test_sizes_and_masks(label: str, size: int) -> None:
    for number in range(3):
        image, mask = draw_phantom(label, size=size, seed=0, patient=number, number=number)
        assert image.shape == mask.shape == (size, size)
        assert image.max() > 200
        assert image.min() < 30
        share = float(mask.mean())
        if label == "normal":
            assert share == 0
        else:
            low, high = {
                "focal": (0.005, 0.12), "diffuse": (0.1, 0.5), "ground-glass": (0.015, 0.25),
            }[label]  # fmt: skip
            assert low < share < high


def test_lesions_are_brighter_than_the_same_lung_without() -> None:
    for label in ("focal", "diffuse", "ground-glass"):
        for number in range(4):
            image, mask = draw_phantom(label, size=128, seed=5, patient=number, number=number)
            healthy, _ = draw_phantom("normal", size=128, seed=5, patient=number, number=number)
            # Noise and exposure differ, the anatomy does not.
            assert image[mask].mean() > healthy[mask].mean() + 20


def test_focal_is_on_one_side_and_ground_glass_on_both() -> None:
    for number in range(6):
        for label, both in (("focal", False), ("ground-glass", True), ("diffuse", True)):
            _, mask = draw_phantom(label, size=96, seed=1, patient=number, number=number)
            left, right = mask[:, :48].sum(), mask[:, 48:].sum()
            assert (min(left, right) > 0.15 * max(left, right)) == both


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("size=x", "whole number"),
        ("color=1", "option 'color' is not known; use n, seed, size"),
        ("n=0", "n >= 1"),
        ("size=8", "size >= 32"),
        ("seed=-1", "seed >= 0"),
    ],
)
def test_bad_options(options: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_source(f"phantom:{options}")


def test_classes_of_another_data_set_are_refused() -> None:
    with pytest.raises(DataError, match=r"'normal' .* classes covid-19, pneumonia"):
        open_source("phantom:n=6", classes=["covid-19", "pneumonia"])


def test_image_and_mask_are_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from magsd.data.sources import phantom

    drawn: list[int] = []

    def count(label: str, **where: int) -> tuple[np.ndarray, np.ndarray]:
        drawn.append(where["number"])
        return draw_phantom(label, **where)

    monkeypatch.setattr(phantom, "draw_phantom", count)
    source = open_source("phantom:n=6,size=32")
    for record in source.records:
        image = source.read_image(record)
        source.read_mask(record)
        assert not image.flags.writeable
    assert drawn == list(range(6))
