"""What is read of files and measured of images."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from magsd.audit.headers import read_header
from magsd.audit.measures import measure_images, pixel_facts
from magsd.data import open_source

GRAY = np.random.default_rng(0).integers(0, 256, (40, 60), np.uint8)


@pytest.mark.parametrize(
    ("name", "image", "options", "expected"),
    [
        ("a.png", GRAY, [], ("PNG", 8, "gray")),
        ("a.png", GRAY.astype(np.uint16) * 200, [], ("PNG", 16, "gray")),
        ("a.png", np.dstack([GRAY, GRAY, GRAY]), [], ("PNG", 8, "RGB")),
        ("a.jpg", GRAY, [], ("JPEG", 8, "gray")),
        ("a.jpg", np.dstack([GRAY, 255 - GRAY, GRAY]), [], ("JPEG", 8, "YCbCr")),
        ("a.tif", GRAY.astype(np.uint16) * 200, [], ("TIFF", 16, "BlackIsZero")),
        ("a.bmp", GRAY, [], ("BMP", math.nan, "unknown")),
    ],
)
def test_headers(
    name: str, image: Any, options: list[int], expected: tuple[Any, ...], tmp_path: Path
) -> None:
    cv2.imwrite(str(tmp_path / name), image, options)
    facts = read_header(tmp_path / name)
    found = facts["format"], facts["bits"], facts["colors"]
    assert found == pytest.approx(expected, nan_ok=True)
    assert facts["bytes"] == (tmp_path / name).stat().st_size


@pytest.mark.parametrize("quality", [30, 75, 95])
def test_the_quality_of_a_jpeg(quality: int, tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    cv2.imwrite(str(path), GRAY, [cv2.IMWRITE_JPEG_QUALITY, quality])
    assert read_header(path)["quality"] == pytest.approx(quality, abs=1)


def test_headers_of_dicom(tmp_path: Path) -> None:
    pydicom = pytest.importorskip("pydicom")
    dataset = pydicom.Dataset()
    dataset.BitsStored, dataset.PhotometricInterpretation = 12, "MONOCHROME1"
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    dataset.save_as(tmp_path / "a.dcm", enforce_file_format=False)
    facts = read_header(tmp_path / "a.dcm")
    assert (facts["format"], facts["bits"], facts["colors"]) == ("DICOM", 12, "MONOCHROME1")


@pytest.mark.parametrize("content", [b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"II*\0", b"x"])
def test_a_header_that_says_nothing(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(content)
    facts = read_header(path)
    assert math.isnan(float(facts["bits"]))
    assert facts["colors"] == "unknown"


def test_margins(picture: Any) -> None:
    image = np.zeros((100, 200), np.uint8)
    image[10:95, 40:] = picture(0, 85, 160)
    facts = pixel_facts(image)
    sides = [facts[f"margin {side}"] for side in ("left", "right", "top", "bottom")]
    assert sides == pytest.approx([0.2, 0, 0.1, 0.05])
    flat = pixel_facts(np.full((50, 50), 7, np.uint8))
    assert (flat["margin left"], flat["margin top"], flat["deviation"]) == (1, 1, 0)


def test_markers_are_letters_near_the_edges_not_what_is_bright_within() -> None:
    image = np.full((256, 256), 60, np.uint8)
    cv2.putText(image, "L", (120, 120), cv2.FONT_HERSHEY_SIMPLEX, 0.8, 255, 2)
    image[200:, :60] = 255  # broad, up to the edges
    assert pixel_facts(image)["markers"] == 0
    cv2.putText(image, "L", (10, 30), cv2.FONT_HERSHEY_SIMPLEX, 0.8, 255, 2)
    assert pixel_facts(image)["markers"] == 1
    assert pixel_facts(cv2.resize(image, (2048, 2048)))["markers"] == 1


def test_drawn_images_have_no_facts_of_files() -> None:
    measured = measure_images(open_source("phantom:n=3,size=32"))
    assert {"width", "mean", "markers"} <= measured.facts[0].keys()
    assert not {"format", "bits", "bytes", "bytes per pixel"} & measured.facts[0].keys()
    assert measured.thumbnails.shape == (3, 64, 64)
    assert len(set(measured.digests)) == 3
