"""Damage inside image files, and what comes after their end."""

from __future__ import annotations

import warnings
from io import BytesIO
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from magsd.data import jpeg
from magsd.data.images import decode_image, read_image_file, read_orientation, upright
from magsd.errors import DataError

NOISE = np.random.default_rng(0).integers(0, 256, (160, 240), np.uint8)


def encoded(kind: str, image: np.ndarray = NOISE, **options: object) -> bytes:
    buffer = BytesIO()
    Image.fromarray(image).save(buffer, kind, **options)
    return buffer.getvalue()


def scans(data: bytes) -> list[int]:
    """Where the scans of a JPEG begin."""
    return [at for at in range(len(data)) if data[at : at + 2] == b"\xff\xda"]


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_rows": 1}])
def test_a_hole_in_a_jpeg_is_found(options: dict[str, object]) -> None:
    data = bytearray(encoded("JPEG", **options))
    middle = scans(bytes(data))[0] + 200
    data[middle : middle + 3000] = bytes(3000)
    with pytest.raises(DataError, match=r"a\.jpg: damaged JPEG \(Corrupt"):
        decode_image(bytes(data), "a.jpg")


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
@pytest.mark.parametrize("marker", [b"\xff\xbd", b"\xff\xd8", b"\xff\xe5\0\2", b"\xff\xc0\0\2"])
def test_a_marker_among_the_pixels_is_found(marker: bytes, mode: str) -> None:
    """The decoder ends there, and what it says last may be of the marker."""
    buffer = BytesIO()
    Image.fromarray(NOISE).convert(mode).save(buffer, "JPEG")
    data = buffer.getvalue()
    middle = len(data) // 2
    with pytest.raises(DataError, match=r"a\.jpg: (damaged|truncated) JPEG"):
        decode_image(data[:middle] + marker * 4 + data[middle:], "a.jpg")


def test_without_its_checker_a_jpeg_is_read_with_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(jpeg, "find_spec", lambda name: None)
    jpeg._warn_once.cache_clear()
    for _ in range(2):
        assert decode_image(encoded("JPEG"), "a.jpg").shape == NOISE.shape
    assert caplog.text.count("simplejpeg is not installed") == 1
    with pytest.raises(DataError, match="a scan is missing"):
        decode_image(encoded("JPEG")[:200] + b"\xff\xd9", "a.jpg")
    with pytest.raises(DataError, match="no end marker"):
        decode_image(encoded("JPEG")[:-2], "a.jpg")


@pytest.mark.parametrize("color", [False, True])
def test_a_jpeg_without_its_last_scans_is_found(color: bool) -> None:
    """libjpeg decodes what is there without a word."""
    image = np.stack([NOISE, NOISE.T[:160, :1].repeat(240, 1), NOISE], -1) if color else NOISE
    data = encoded("JPEG", image, progressive=True)
    assert decode_image(data, "a.jpg").shape[:2] == NOISE.shape
    starts = scans(data)
    assert len(starts) > 3
    for start in starts[1:]:
        cut = data[:start]
        # What lies before a scan may be its tables: they stay.
        with pytest.raises(DataError, match="a scan is missing"):
            decode_image(cut + b"\xff\xd9", "a.jpg")


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("what", [b"\0" * 5000, b"\xff\xd8\xff\xe0 another", b"\x1a\n", b"\xff"])
def test_bytes_after_the_end_are_accepted(kind: str, what: bytes) -> None:
    data = encoded(kind)
    after = decode_image(data + what, "a")
    np.testing.assert_array_equal(after, decode_image(data, "a"))


def test_bytes_between_pixels_and_end_are_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    data = encoded("JPEG")
    padded = data[:-2] + bytes(40) + data[-2:]
    np.testing.assert_array_equal(decode_image(padded, "a.jpg"), decode_image(data, "a.jpg"))
    assert "a.jpg" in caplog.text
    assert "extraneous bytes" in caplog.text


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_that_lacks_its_end_marker_alone(progressive: bool, caplog) -> None:
    data = encoded("JPEG", progressive=progressive)
    expected = decode_image(data, "a.jpg")
    np.testing.assert_array_equal(decode_image(data[:-2], "b.jpg"), expected)
    assert "b.jpg: a JPEG without an end marker" in caplog.text
    with pytest.raises(DataError, match=r"c\.jpg: truncated JPEG"):
        decode_image(data[:-12], "c.jpg")


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("size", [(1, 1), (7, 300), (64, 64)])
def test_whole_jpegs_pass(mode: str, progressive: bool, size: tuple[int, int]) -> None:
    buffer = BytesIO()
    image = Image.fromarray(NOISE).resize(size[::-1]).convert(mode)
    image.save(buffer, "JPEG", progressive=progressive, optimize=True)
    assert decode_image(buffer.getvalue(), "a.jpg").shape[:2] == size


@pytest.mark.parametrize("where", [0.1, 0.5, 0.95])
def test_a_changed_byte_in_a_png_is_found(where: float) -> None:
    data = bytearray(encoded("PNG"))
    at = data.index(b"IDAT") + 4 + int(where * (len(data) - data.index(b"IDAT") - 20))
    data[at] ^= 0x10
    with pytest.raises(DataError, match=r"a\.png: damaged PNG"):
        decode_image(bytes(data), "a.png")


@pytest.mark.parametrize("kind", ["BMP", "TIFF", "WEBP", "GIF"])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
def test_other_formats_that_end_too_early(kind: str, share: float) -> None:
    data = encoded(kind, lossless=True) if kind == "WEBP" else encoded(kind)
    with pytest.raises(DataError, match="a"):
        decode_image(data[: int(share * len(data))], "a")


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate"])
def test_damage_in_a_compressed_tiff(compression: str) -> None:
    smooth = cv2.GaussianBlur(NOISE, (0, 0), 3)
    data = encoded("TIFF", smooth, compression=compression)
    assert decode_image(data, "a.tif").shape == smooth.shape
    middle = len(data) // 2
    with pytest.raises(DataError, match=r"a\.tif: damaged TIFF"):
        decode_image(data[:middle] + bytes(100) + data[middle + 100 :], "a.tif")


def test_checksums_of_what_is_no_pixel_do_not_matter() -> None:
    data = bytearray(encoded("PNG"))
    data[-1] ^= 1  # of the end chunk
    assert decode_image(bytes(data), "a.png").shape == NOISE.shape


@pytest.mark.parametrize("syntax", ["JPEGBaseline8Bit", "JPEGExtended12Bit"])
def test_a_damaged_jpeg_inside_dicom_is_found(tmp_path: Path, syntax: str) -> None:
    pydicom = pytest.importorskip("pydicom")
    from pydicom.encaps import encapsulate
    from pydicom.uid import generate_uid

    def file(frame: bytes, name: str) -> Path:
        dataset = pydicom.Dataset()
        dataset.file_meta = pydicom.dataset.FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = getattr(pydicom.uid, syntax)
        dataset.SOPClassUID, dataset.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.1", generate_uid()
        dataset.Rows, dataset.Columns = NOISE.shape
        dataset.SamplesPerPixel, dataset.PixelRepresentation = 1, 0
        dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 8, 8, 7
        dataset.PhotometricInterpretation = "MONOCHROME2"
        dataset.PixelData = encapsulate([frame])
        dataset["PixelData"].is_undefined_length = True
        dataset.save_as(tmp_path / name, enforce_file_format=True)
        return tmp_path / name

    whole = encoded("JPEG")
    assert read_image_file(file(whole, "whole.dcm")).shape == NOISE.shape
    hole = bytearray(whole)
    hole[scans(whole)[0] + 200 : scans(whole)[0] + 3000] = bytes(2800)
    with pytest.raises(DataError, match=r"hole\.dcm: damaged JPEG"):
        read_image_file(file(bytes(hole), "hole.dcm"))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_every_orientation_is_as_pillow_shows_it(
    kind: str, orientation: int, tmp_path: Path
) -> None:
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    smooth = np.outer(np.arange(40), np.arange(60)).astype(np.uint8)
    path = tmp_path / f"a.{kind.lower()}"
    options = {"lossless": True} if kind == "WEBP" else {}
    Image.fromarray(smooth).save(path, kind, exif=exif, **options)
    assert read_orientation(path) == orientation
    with Image.open(path) as image:
        # Pillow turns some TIFF files as it loads them, and others not.
        stored = smooth if kind == "TIFF" else np.asarray(image.convert("L"))
    expected = upright(stored, orientation)
    if kind != "TIFF":
        with Image.open(path) as image:
            np.testing.assert_array_equal(
                expected, np.asarray(ImageOps.exif_transpose(image).convert("L"))
            )
    shown = read_image_file(path)
    assert shown.shape == expected.shape
    assert np.abs(shown.astype(int) - expected).max() <= 2


def test_a_large_image_is_read_without_a_warning(tmp_path: Path) -> None:
    """Pillow takes images above 89 million pixels for an attack."""
    path = tmp_path / "large.png"
    cv2.imwrite(str(path), np.zeros((9000, 10000), np.uint8), [cv2.IMWRITE_PNG_COMPRESSION, 1])
    exif = Image.Exif()
    exif[0x0112] = 6
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_image_file(path).shape == (9000, 10000)
        small = Image.fromarray(NOISE)
        small.save(tmp_path / "small.jpg", exif=exif)
        assert read_image_file(tmp_path / "small.jpg").shape == (240, 160)


def test_notes_say_what_was_changed(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 8
    deep = (NOISE.astype(np.uint16) << 4) + 7
    cv2.imwrite(str(tmp_path / "a.png"), np.dstack([deep, deep, deep, deep]))
    notes: list[str] = []
    read_image_file(tmp_path / "a.png", notes)
    assert notes[0] == "PNG, 240x160 pixels, 4 channel(s), uint16"
    assert notes[1] == "alpha channel dropped"
    assert notes[2].startswith("levels ")
    assert notes[3] == "equal channels: gray"
    Image.fromarray(NOISE).save(tmp_path / "b.jpg", exif=exif)
    notes = []
    read_image_file(tmp_path / "b.jpg", notes)
    assert notes[1:] == ["EXIF orientation 8: turned upright"]
    Image.fromarray(NOISE).save(
        tmp_path / "c.gif", save_all=True, append_images=[Image.fromarray(NOISE.T)]
    )
    notes = []
    read_image_file(tmp_path / "c.gif", notes)
    assert "the first of 2 pages" in notes
