"""Decoding of image files."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from magsd.data.images import read_image_file, to_uint8
from magsd.errors import DataError


@pytest.fixture
def ramp() -> np.ndarray:
    return np.tile(np.arange(200, dtype=np.uint8), (50, 1))


def test_png_8_bit_is_unchanged(tmp_path: Path, ramp: np.ndarray) -> None:
    cv2.imwrite(str(tmp_path / "a.png"), ramp)
    np.testing.assert_array_equal(read_image_file(tmp_path / "a.png"), ramp)


def test_jpeg(tmp_path: Path, ramp: np.ndarray) -> None:
    cv2.imwrite(str(tmp_path / "a.JPG"), ramp, [cv2.IMWRITE_JPEG_QUALITY, 95])
    image = read_image_file(tmp_path / "a.JPG")
    assert image.shape == ramp.shape
    assert np.abs(image.astype(int) - ramp).max() < 6


def test_png_16_bit_uses_percentiles(tmp_path: Path) -> None:
    image = np.linspace(1000, 3000, 10_000).reshape(100, 100).astype(np.uint16)
    image[0, 0] = 65535  # one hot pixel must not darken the rest
    cv2.imwrite(str(tmp_path / "deep.png"), image)
    gray = read_image_file(tmp_path / "deep.png")
    assert gray.dtype == np.uint8
    assert gray[0, 0] == 255
    assert abs(int(gray[50, 0]) - 127) <= 2
    assert gray[0, 1:20].max() == 0
    assert gray[-1, -1] == 255


def test_color_is_rgb_and_equal_channels_become_gray(tmp_path: Path, ramp: np.ndarray) -> None:
    color = np.zeros((8, 8, 3), np.uint8)
    color[..., 0] = 200  # red, in RGB
    cv2.imwrite(str(tmp_path / "red.png"), color[..., ::-1])
    np.testing.assert_array_equal(read_image_file(tmp_path / "red.png"), color)
    cv2.imwrite(str(tmp_path / "gray.png"), np.repeat(ramp[..., None], 3, 2))
    np.testing.assert_array_equal(read_image_file(tmp_path / "gray.png"), ramp)
    alpha = np.dstack([np.repeat(ramp[..., None], 3, 2), np.full_like(ramp, 9)])
    cv2.imwrite(str(tmp_path / "alpha.png"), alpha)
    np.testing.assert_array_equal(read_image_file(tmp_path / "alpha.png"), ramp)


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.97])
def test_truncated_is_an_error(tmp_path: Path, suffix: str, share: float) -> None:
    image = np.random.default_rng(0).integers(0, 256, (64, 64)).astype(np.uint8)
    path = tmp_path / f"cut{suffix}"
    cv2.imwrite(str(path), image)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(DataError, match=r"cut"):
        read_image_file(path)


def test_damaged_inside_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "torn.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"\0" * 50 + b"IEND")
    with pytest.raises(DataError, match=r"torn\.png"):
        read_image_file(path)


def test_missing_and_foreign_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_image_file(tmp_path / "none.png")
    (tmp_path / "text.png").write_text("not an image")
    with pytest.raises(DataError, match="not a PNG"):
        read_image_file(tmp_path / "text.png")


def test_to_uint8_of_a_constant_image() -> None:
    assert to_uint8(np.full((3, 3), 700, np.uint16)).max() == 0


def _write_dicom(path: Path, pixels: np.ndarray, **attributes: object) -> Path:
    pydicom = pytest.importorskip("pydicom")
    dataset = pydicom.Dataset()
    dataset.SOPClassUID = "1.2.840.10008.5.1.4.1.1.1.1"
    dataset.SOPInstanceUID = "1.2.3.4"
    dataset.Rows, dataset.Columns = pixels.shape
    dataset.SamplesPerPixel = 1
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 16, 15
    dataset.PixelRepresentation = 0
    dataset.PhotometricInterpretation = "MONOCHROME2"
    for name, value in attributes.items():
        setattr(dataset, name, value)
    dataset.PixelData = pixels.astype(np.uint16).tobytes()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    dataset.save_as(path, enforce_file_format=True)
    return path


def test_dicom_rescale_window_and_inversion(tmp_path: Path) -> None:
    stored = np.arange(0, 2000, 20, dtype=np.uint16).reshape(10, 10)
    settings = {
        "RescaleSlope": 2, "RescaleIntercept": -1000, "WindowCenter": 500, "WindowWidth": 1000,
    }  # fmt: skip
    expected = np.rint(np.clip((stored * 2.0 - 1000) / 1000, 0, 1) * 255)
    path = _write_dicom(tmp_path / "a.dcm", stored, **settings)
    np.testing.assert_allclose(read_image_file(path), expected, atol=1)
    settings["PhotometricInterpretation"] = "MONOCHROME1"
    path = _write_dicom(tmp_path / "b.dcm", stored, **settings)
    np.testing.assert_allclose(read_image_file(path), 255 - expected, atol=1)


def test_dicom_without_window_uses_percentiles(tmp_path: Path) -> None:
    stored = np.linspace(100, 4000, 2500).reshape(50, 50).astype(np.uint16)
    image = read_image_file(_write_dicom(tmp_path / "a.dcm", stored))
    np.testing.assert_allclose(image, to_uint8(stored), atol=1)


def test_dicom_without_a_suffix(tmp_path: Path) -> None:
    stored = np.arange(1000, dtype=np.uint16).reshape(20, 50)
    named = _write_dicom(tmp_path / "a.dcm", stored)
    image = read_image_file(named)
    np.testing.assert_array_equal(read_image_file(named.rename(tmp_path / "IM0001")), image)


def test_dicom_with_a_palette_is_refused(tmp_path: Path) -> None:
    stored = np.arange(1000, dtype=np.uint16).reshape(20, 50)
    path = _write_dicom(tmp_path / "a.dcm", stored, PhotometricInterpretation="PALETTE COLOR")
    with pytest.raises(DataError, match="PALETTE COLOR pixels"):
        read_image_file(path)


def test_damaged_dicom(tmp_path: Path) -> None:
    pytest.importorskip("pydicom")
    (tmp_path / "a.dcm").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"a\.dcm"):
        read_image_file(tmp_path / "a.dcm")
