"""Masks and boxes are turned with an image that its EXIF orientation turns."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from magsd.data import Record, open_source
from magsd.data.images import upright
from magsd.data.sources import PublishedSource
from magsd.data.sources.published import Box

HEIGHT, WIDTH = 40, 64
ORIENTATIONS = range(1, 9)


def lesion() -> np.ndarray:
    """A mask without any symmetry, of the image as it is stored."""
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[5:12, 3:30] = True
    return mask


def write_image(path: Path, orientation: int) -> None:
    """An image that is bright in the lesion."""
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(lesion().astype(np.uint8) * 200).save(path, "PNG", exif=exif)


def check(source: object, key: str, orientation: int) -> None:
    """The mask covers what is bright."""
    record = next(r for r in source.records if r.key == key)  # type: ignore[attr-defined]
    image = source.read_image(record)  # type: ignore[attr-defined]
    mask = source.read_mask(record)  # type: ignore[attr-defined]
    assert image.shape == ((WIDTH, HEIGHT) if orientation > 4 else (HEIGHT, WIDTH))
    np.testing.assert_array_equal(mask, image > 100)


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("drawn", ["stored", "upright", "tagged"])
def test_mask_of_a_table(drawn: str, orientation: int, tmp_path: Path) -> None:
    """Drawn on the image as it is stored, or as it is shown, or with an orientation itself."""
    write_image(tmp_path / "a.png", orientation)
    mask = lesion()
    exif = Image.Exif()
    if drawn == "upright":
        if orientation < 5:
            pytest.skip("no one can tell: both have the same size")
        mask = upright(mask, orientation)
    elif drawn == "tagged":
        exif[0x0112] = orientation
    Image.fromarray(mask.astype(np.uint8)).save(tmp_path / "m.png", exif=exif)
    (tmp_path / "t.csv").write_text("file,label,mask\na.png,x,m.png\nb.png,y,\n")
    check(open_source(f"csv:{tmp_path / 't.csv'}"), "a.png", orientation)


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("drawn", ["stored", "upright"])
def test_polygons_of_an_annotation(drawn: str, orientation: int, tmp_path: Path) -> None:
    write_image(tmp_path / "a.png", orientation)
    mask = lesion()
    if drawn == "upright":
        if orientation < 5:
            pytest.skip("no one can tell: both have the same size")
        mask = upright(mask, orientation)
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    # opencv draws the corners, too.
    top, bottom, left, right = rows[0] + 0.5, rows[-1] + 0.5, columns[0] + 0.5, columns[-1] + 0.5
    corners = [(left, top), (right, top), (right, bottom), (left, bottom)]
    content = {
        "image": {"width": mask.shape[1], "height": mask.shape[0], "filename": "a.png"},
        "annotations": [
            {"name": "Lung", "polygon": {"path": [{"x": x, "y": y} for x, y in corners]}},
        ],
    }
    (tmp_path / "a.json").write_text(json.dumps(content, default=float))
    (tmp_path / "t.csv").write_text("file,label,mask\na.png,x,a.json\nb.png,y,\n")
    check(open_source(f"csv:{tmp_path / 't.csv'}"), "a.png", orientation)


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_boxes(orientation: int, tmp_path: Path) -> None:
    write_image(tmp_path / "a.png", orientation)

    class Boxed(PublishedSource):
        kind = name = home = "boxed"

        def _find(self) -> list[Record]:
            return [self._record(self.folder / "a.png", "x", boxes=[Box(3, 5, 27, 7)])]

    check(Boxed(tmp_path), "a.png", orientation)


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_masks_beside_images(orientation: int, tmp_path: Path) -> None:
    for label in "ab":
        write_image(tmp_path / label / "images" / "1.png", orientation)
        (tmp_path / label / "masks").mkdir()
        Image.fromarray(lesion()).save(tmp_path / label / "masks" / "1.png")
    check(open_source(f"folder:{tmp_path}"), "a/images/1.png", orientation)
