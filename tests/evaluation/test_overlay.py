"""Pictures: where heat and outlines land, and that files can be read back."""

from __future__ import annotations

import tracemalloc

import cv2
import numpy as np
import pytest

from magsd.evaluation import OverlayItem, contact_sheet, overlay_image, save_overlay
from magsd.evaluation.localization.boxes import Box
from magsd.evaluation.overlay import BOX, OUTLINE, fitted, heat_map, save_items

GRAY = np.full((64, 64), 100, np.uint8)


def _item(**changes):
    values = {
        "image": GRAY,
        "saliency": np.eye(4),
        "predicted": "pneumonia",
        "probability": 0.914,
        "label": "pneumonia",
    }
    return OverlayItem(**(values | changes))


@pytest.mark.parametrize("shape", [(64, 64), (48, 80), (64, 64, 3), (900, 700)])
def test_size_and_type(shape):
    picture = overlay_image(np.zeros(shape, np.uint8), np.random.rand(7, 7), size=200)
    assert picture.dtype == np.uint8
    assert min(picture.shape[:2]) == 200
    assert picture.shape[2] == 3
    assert picture.shape[1] / picture.shape[0] == pytest.approx(shape[1] / shape[0], rel=0.01)


@pytest.mark.parametrize("value", [0.0, 3.0, np.nan])
def test_constant_or_undefined_map_leaves_the_image(value):
    image = np.random.default_rng(0).integers(0, 256, (64, 64)).astype(np.uint8)
    picture = overlay_image(image, np.full((7, 7), value), size=64)
    assert np.array_equal(picture, np.repeat(image[..., None], 3, axis=2))


def test_heat_lies_where_the_map_is_high():
    saliency = np.zeros((7, 7))
    saliency[1, 5] = 2.0
    heat = heat_map(saliency, (70, 70))
    assert np.unravel_index(heat.argmax(), heat.shape) in {
        (y, x) for y in (14, 15) for x in (54, 55)
    }
    assert heat.max() == pytest.approx(1.0, abs=0.05)
    assert heat[50:, :40].max() == 0
    changed = np.abs(overlay_image(GRAY, saliency, size=70).astype(int) - 100).sum(axis=2)
    assert changed[15, 55] > 100
    assert changed[60, 10] == 0


def test_heat_does_not_depend_on_the_maps_offset_or_scale():
    saliency = np.random.default_rng(0).random((7, 7))
    np.testing.assert_allclose(
        heat_map(saliency, (40, 40)), heat_map(5 + 100 * saliency, (40, 40)), atol=1e-4
    )


def test_outline_follows_the_mask_of_another_size():
    mask = np.zeros((32, 32), np.uint8)
    mask[8:24, 8:24] = 1
    picture = overlay_image(GRAY, np.zeros((4, 4)), mask, size=640)
    outlined = (np.abs(picture.astype(int) - OUTLINE) < 30).all(axis=2)
    rows, columns = np.nonzero(outlined)
    # One mask pixel is 20 of the picture's; the line lies within half of one from the edge.
    for found in (rows, columns):
        assert abs(found.min() - 160) <= 10
        assert abs(found.max() - 480) <= 10
    assert not outlined[180:460, 180:460].any()
    assert outlined[300:340].any(axis=1).all()


def test_outline_of_a_mask_at_the_edge_and_of_an_empty_one():
    full = overlay_image(GRAY, np.zeros((4, 4)), np.ones((64, 64)), size=128)
    assert not (full == 100).all()
    assert (full[20:-20, 20:-20] == 100).all()
    empty = overlay_image(GRAY, np.zeros((4, 4)), np.zeros((64, 64)), size=128)
    assert (empty == 100).all()


def test_box_is_drawn_in_the_images_pixels():
    boxes = [Box(8, 16, 40, 48, 1.0), Box(60, 0, 64, 4, 0.1)]
    picture = overlay_image(GRAY, np.zeros((4, 4)), boxes=boxes, size=640)
    drawn = (picture == BOX).all(axis=2)
    rows, columns = np.nonzero(drawn[100:, :500])
    assert (columns.min(), columns.max()) == pytest.approx((80, 400), abs=3)
    assert (100 + rows.min(), 100 + rows.max()) == pytest.approx((160, 480), abs=3)
    assert not drawn[170:470, 90:390].any()
    assert drawn[:50, 590:].sum() > 80  # the one in the corner lies in the picture


@pytest.mark.parametrize("upright", [False, True])
@pytest.mark.parametrize("across", [1, 40, 500])
def test_box_and_outline_keep_their_places_on_a_strip(across, upright):
    """A strip is drawn with a longer side of four times `size`; the scales differ where it is thin.

    The box covers the second quarter of its length, the mask the last.
    """
    image = np.full((across, 4000), 100, np.uint8)
    mask = np.zeros_like(image)
    mask[:, 3000:] = 1
    box = Box(1000, 0, 2000, across, 1.0)
    if upright:
        image, mask = image.T, mask.T
        box = Box(0, 1000, across, 2000, 1.0)
    picture = overlay_image(image, np.zeros((4, 4)), mask, boxes=[box], size=200)
    picture = picture.transpose(1, 0, 2) if upright else picture
    assert picture.shape == (max(round(across / 5), 10), 800, 3)
    # Lines of one pixel are blended with the ground.
    columns = np.nonzero((picture > 150).all(axis=2).any(axis=0))[0]
    assert (columns.min(), columns.max()) == pytest.approx((200, 400), abs=3)
    outlined = picture[..., 1].astype(int) - picture[..., 0] > 60
    columns = np.nonzero(outlined.any(axis=0))[0]
    assert (columns.min(), columns.max()) == pytest.approx((600, 799), abs=3)


@pytest.mark.parametrize("shape", [(1, 5000), (5000, 1), (3, 300), (2000, 2100), (50, 60)])
def test_fitted_once_is_fitted(shape):
    once = fitted(np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8))
    assert np.array_equal(fitted(once), once)
    assert once.size <= 3 * 4 * 672**2


def test_large_gray_image_is_made_small_before_it_has_colors():
    image = np.zeros((6000, 6000), np.uint8)
    tracemalloc.start()
    try:
        overlay_image(image, np.eye(4))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 60e6  # in three channels it would be 108 MB


def test_inputs_are_not_changed():
    image, saliency, mask = GRAY.copy(), np.random.rand(7, 7), np.eye(64)
    copies = image.copy(), saliency.copy(), mask.copy()
    overlay_image(image, saliency, mask, size=64)
    for given, kept in zip((image, saliency, mask), copies, strict=True):
        assert np.array_equal(given, kept)


def test_saved_file_is_the_picture(tmp_path):
    item = _item(mask=np.eye(64))
    path = save_overlay(tmp_path / "new" / "one.png", item, size=128)
    read = cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)
    assert np.array_equal(read, overlay_image(item.image, item.saliency, item.mask, size=128))


def test_fewer_pictures_replace_more(tmp_path):
    own = tmp_path / "001_mine.png"
    own.touch()
    save_items(tmp_path, [_item()])
    assert own.exists()  # no earlier call had written here
    own.unlink()
    save_items(tmp_path, [_item(), _item(label="other"), _item()])
    (tmp_path / "mine.png").touch()
    save_items(tmp_path, [_item()])
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["000_pneumonia.png", "contact_sheet.png", "mine.png"]


@pytest.mark.parametrize("count", [1, 3, 5])
def test_contact_sheet(tmp_path, count):
    items = [_item(mask=np.eye(64) if k % 2 else None) for k in range(count)]
    path = contact_sheet(tmp_path / "sheet.png", items, title="a title", dpi=60)
    sheet = cv2.imread(str(path))
    pictures = (sheet < 200).any(axis=2).sum()
    assert pictures >= count * 2 * (2.1 * 60) ** 2 * 0.95
    with pytest.raises(ValueError, match="items"):
        contact_sheet(tmp_path / "none.png", [])


def test_contact_sheet_of_many(tmp_path):
    """As many as fit in a picture that can be drawn."""
    sheet = cv2.imread(str(contact_sheet(tmp_path / "sheet.png", [_item()] * 300, dpi=20)))
    assert sheet.shape[0] < 16 * 5 * 20


def test_captions():
    assert _item().caption() == "pneumonia 91%"
    assert _item(label=None).caption() == "pneumonia 91%"
    assert _item(label="covid-19").caption() == "covid-19, taken for pneumonia 91%"
    shared = _item(inside=0.5, uniform=0.25).caption()
    assert shared == "pneumonia 91%\n50% of attention in mask (25% of area)"
    assert _item(inside=float("nan"), uniform=0.25).caption() == "pneumonia 91%"


@pytest.mark.parametrize(
    ("image", "saliency"),
    [
        (GRAY.astype(float), np.ones((7, 7))),
        (GRAY[0], np.ones((7, 7))),
        (GRAY, np.ones((1, 7, 7))),
    ],
)
def test_refusals(image, saliency):
    with pytest.raises(ValueError, match="expected"):
        overlay_image(image, saliency)
