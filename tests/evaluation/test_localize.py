"""Boxes, overlaps and the pointing game on made maps with known answers."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from magsd.data import load_cache, open_source
from magsd.evaluation.examples import draw_boxes
from magsd.evaluation.localization import (
    LocalizedImage,
    localization_report,
    localize,
    score_map,
    write_boxes,
)
from magsd.evaluation.localization.boxes import (
    Box,
    box_iou,
    component_boxes,
    hot_region,
    peak,
    within,
)


def rectangle(shape: tuple[int, int], rows: slice, columns: slice) -> np.ndarray:
    region = np.zeros(shape, dtype=bool)
    region[rows, columns] = True
    return region


def corners(box: Box) -> tuple[float, ...]:
    return box.x0, box.y0, box.x1, box.y1


def test_boxes_are_ordered_by_mass_and_hold_their_share():
    heat = np.zeros((20, 30), np.float32)
    heat[2:4, 3:5] = 1.0  # the hottest, but small: 4 of 28
    heat[10:15, 20:28] = 0.5  # 20 of 28
    heat[18, 0] = 4 * 0.49  # under half of the maximum once that is 4
    assert [corners(b) for b in component_boxes(hot_region(heat[:16], 0.5), heat[:16])] == [
        (20, 10, 28, 15),
        (3, 2, 5, 4),
    ]
    shares = [box.share for box in component_boxes(hot_region(heat[:16], 0.5), heat[:16])]
    assert shares == pytest.approx([20 / 24, 4 / 24])
    heat[19, 29] = 4.0
    assert [corners(b) for b in component_boxes(hot_region(heat, 0.5), heat)] == [(29, 19, 30, 20)]
    assert len(component_boxes(hot_region(heat, 0.49), heat)) == 2


def test_pixels_that_touch_at_a_corner_are_one_component():
    heat = np.eye(4, dtype=np.float32)
    assert [corners(b) for b in component_boxes(hot_region(heat, 0.5), heat)] == [(0, 0, 4, 4)]


def test_empty_map_has_no_region():
    assert not hot_region(np.zeros((4, 4), np.float32), 0.5).any()
    assert component_boxes(np.zeros((4, 4), bool), np.zeros((4, 4), np.float32)) == []


@pytest.mark.parametrize(
    ("second", "expected"),
    [((0, 0, 4, 2), 1.0), ((2, 1, 6, 3), 2 / 14), ((4, 0, 8, 2), 0.0), ((9, 9, 10, 10), 0.0)],
)
def test_iou_of_boxes(second: tuple[int, ...], expected: float):
    assert box_iou(Box(0, 0, 4, 2, 1.0), Box(*second, 1.0)) == pytest.approx(expected)


def test_scores_by_hand():
    """Two hot rectangles, 8 and 4 pixels; the mask covers half of the first and as much beside."""
    heat = np.zeros((10, 20), np.float32)
    heat[2:4, 0:4] = 1.0
    heat[8:10, 16:18] = 1.0
    heat[2, 3] = 2.0
    mask = rectangle(heat.shape, slice(2, 4), slice(2, 6)) | rectangle(
        heat.shape, slice(5, 6), slice(10, 20)
    )
    scores = score_map(heat, mask, threshold=0.5)
    assert scores is not None
    assert scores.values == pytest.approx(
        {
            "inside": 5 / 13,
            "region_iou": 4 / 26,
            "boxes_iou": 4 / 26,
            "best_box_iou": 4 / 12,
            "pointing": 1.0,
        }
    )
    assert scores.uniform == pytest.approx(
        {
            "inside": 18 / 200,
            "region_iou": 18 / 200,
            "boxes_iou": 18 / 200,
            "best_box_iou": 10 / 200,
            "pointing": 18 / 200,
        }
    )
    assert scores.center == 1.0  # row 5, column 10 lies in the long part


def test_perfect_map():
    mask = rectangle((12, 12), slice(3, 6), slice(2, 9))
    scores = score_map(mask.astype(np.float32), mask)
    assert scores is not None
    assert set(scores.values.values()) == {1.0}
    assert scores.center == 0.0


def test_boxes_reach_beyond_their_region():
    """The region is an L of 7 pixels, its box has 16; the mask is the L."""
    mask = rectangle((8, 8), slice(1, 5), slice(1, 2)) | rectangle((8, 8), slice(4, 5), slice(1, 5))
    scores = score_map(mask.astype(np.float32), mask)
    assert scores is not None
    assert (scores.values["region_iou"], scores.values["boxes_iou"]) == (1.0, 7 / 16)


def test_pointing_allows_a_tolerance():
    heat = np.zeros((20, 20), np.float32)
    heat[10, 4] = 1.0
    mask = rectangle(heat.shape, slice(8, 13), slice(9, 12))
    hits = [score_map(heat, mask, tolerance=pixels).values["pointing"] for pixels in (0, 4.9, 5)]
    assert hits == [0.0, 0.0, 1.0]
    assert within(mask, 1).sum() == 15 + 2 * 3 + 2 * 5
    assert score_map(heat, mask, tolerance=1).uniform["pointing"] == pytest.approx(31 / 400)


def test_peak_of_a_plateau_is_its_middle():
    assert peak(np.ones((5, 7))) == (2, 3)
    heat = np.zeros((6, 6))
    heat[0:3, 5] = 1
    assert peak(heat) == (1, 5)


@pytest.mark.parametrize(("heat", "mask"), [(0.0, True), (1.0, False)])
def test_nothing_to_score(heat: float, mask: bool):
    assert score_map(np.full((4, 4), heat, np.float32), np.full((4, 4), mask)) is None


class Bright(torch.nn.Module):
    """Takes every image for the first class; its small maps show what is bright."""

    def forward(self, images: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=torch.eye(3)[[0] * len(images)], images=images)

    def saliency(self, output: SimpleNamespace) -> torch.Tensor:
        return F.avg_pool2d((output.images - 1.0).clamp(min=0.0), 8)


@pytest.fixture
def found(cache, make_loader):
    return localize(Bright(), make_loader(), cache, threshold=0.5)


def test_bright_discs_are_found(found, cache, classes):
    report = localization_report(
        found, cache.records, classes, threshold=0.5, tolerance=0, image_size=64
    )
    assert set(report.per_class) == {"left", "right"}
    assert (report.overall.images, report.overall.left_out) == (8, 0)
    means = report.overall.means
    assert means is not None
    assert means.values["pointing"] == 1.0
    assert means.values["best_box_iou"] > 0.6 > means.uniform["best_box_iou"]
    centers = [(i.boxes[0].x0 + i.boxes[0].x1) / 2 for i in found if i.masked]
    labels = [cache.records[i.index].label for i in found if i.masked]
    for center, label in zip(centers, labels, strict=True):
        assert center == pytest.approx(16 if label == "left" else 48, abs=3)


def test_files(found, cache, classes, tmp_path: Path):
    write_boxes(tmp_path / "boxes.csv", found, cache, classes, lambda record: (128, 320))
    with open(tmp_path / "boxes.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    first = next(row for row in rows if row["key"] == "img/02" and row["number"] == "1")
    assert (first["label"], first["predicted"], first["image_width"]) == ("right", "left", "320")
    # Among 64 x 64 pixels the disc stands at 48, 32; the file's image is 5 x as wide, 2 x as high.
    assert (float(first["x0"]) + float(first["x1"])) / 2 == pytest.approx(240, abs=15)
    assert (float(first["y0"]) + float(first["y1"])) / 2 == pytest.approx(64, abs=6)
    assert len(rows) == sum(len(image.boxes) for image in found)
    sheet = draw_boxes(tmp_path / "overlays", found, cache, classes, limit=2)
    assert sheet.is_file()
    assert len(list(sheet.parent.glob("0*.png"))) == 2
    report = localization_report(
        [image for image in found if not image.masked],
        cache.records,
        classes,
        threshold=0.5,
        tolerance=0,
        image_size=64,
    )
    report.to_json(tmp_path / "localization.json")
    text = json.loads((tmp_path / "localization.json").read_text())
    assert (text["overall"]["means"], text["per_class"]) == (None, {})


def test_real_lungs(shared_dir: Path, tmp_path: Path):
    """Maps that are the lungs themselves: all is met, and boxes lie in the files' own pixels."""
    source = open_source(f"csv:{shared_dir / 'data' / 'cxr3' / 'labels.csv'}", limit=90)
    cache = load_cache(source, image_size=96, cache_dir=tmp_path)
    rows = np.flatnonzero(cache.has_mask)
    assert len(rows) >= 3
    found = []
    for row in map(int, rows):
        heat = cache.masks[row].astype(np.float32)
        boxes = component_boxes(hot_region(heat, 0.5), heat)
        scores = score_map(heat, heat > 0)
        assert scores is not None
        assert scores.values["best_box_iou"] == scores.values["region_iou"] == 1.0
        found.append(LocalizedImage(row, np.ones(3), heat[None], boxes, True, scores))
    write_boxes(
        tmp_path / "boxes.csv",
        found,
        cache,
        source.classes,
        lambda record: source.read_image(record).shape[:2],
    )
    for line in csv.DictReader((tmp_path / "boxes.csv").open(newline="")):
        box = Box(*(float(line[name]) for name in ("x0", "y0", "x1", "y1", "share")))
        assert 0 <= box.x0 < box.x1 <= float(line["image_width"])
        assert 0 <= box.y0 < box.y1 <= float(line["image_height"])
        assert min(int(line["image_width"]), int(line["image_height"])) == 256
