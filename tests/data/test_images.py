"""Decoding of image files."""

from __future__ import annotations

import struct
import subprocess
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import cv2
import numpy as np
import pytest

from magsd.data.images import decode_image, read_image_file, to_uint8
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


def test_dicom_with_a_palette(tmp_path: Path) -> None:
    stored = np.arange(256, dtype=np.uint16).reshape(16, 16)
    palette = {"PhotometricInterpretation": "PALETTE COLOR"}
    path = _write_dicom(tmp_path / "a.dcm", stored, **palette)
    with pytest.raises(DataError, match=r"a\.dcm: .*Palette"):
        read_image_file(path)
    for place, name in enumerate(("Red", "Green", "Blue")):
        table = (np.arange(256) * (place + 1) % 256).astype(np.uint16) << 8
        palette[f"{name}PaletteColorLookupTableDescriptor"] = [256, 0, 16]
        palette[f"{name}PaletteColorLookupTableData"] = table.tobytes()
    image = read_image_file(_write_dicom(tmp_path / "a.dcm", stored, **palette))
    for place in range(3):
        np.testing.assert_array_equal(image[..., place], stored * (place + 1) % 256)


RAMP = np.arange(0, 4000, 40, dtype=np.uint16).reshape(10, 10)


@pytest.mark.parametrize(
    ("settings", "shares"),
    [
        # The second window is the first that is valid.
        (
            {"WindowCenter": [900, 1000], "WindowWidth": [0, 1001]},
            np.clip((RAMP - 999.5) / 1000 + 0.5, 0, 1),
        ),
        (
            {"WindowCenter": 1000, "WindowWidth": 800, "VOILUTFunction": "LINEAR_EXACT"},
            np.clip((RAMP - 1000.0) / 800 + 0.5, 0, 1),
        ),
        (
            {"WindowCenter": 1000, "WindowWidth": 800, "VOILUTFunction": "SIGMOID"},
            1 / (1 + np.exp(-4 * (RAMP - 1000.0) / 800)),
        ),
        ({"WindowCenter": 1000, "WindowWidth": 801, "VOILUTFunction": ""}, (RAMP - 599.5) / 800),
        ({"WindowCenter": 1000, "WindowWidth": -801}, to_uint8(RAMP) / 255),
        # No pixel lies in the window: the percentiles.
        ({"WindowCenter": 50000, "WindowWidth": 100}, to_uint8(RAMP) / 255),
    ],
    ids=["second", "exact", "sigmoid", "no function", "negative", "outside"],
)
def test_windows(tmp_path: Path, settings: dict[str, object], shares: np.ndarray) -> None:
    image = read_image_file(_write_dicom(tmp_path / "a.dcm", RAMP, **settings))
    np.testing.assert_allclose(image, np.clip(shares, 0, 1) * 255, atol=1)


@pytest.mark.parametrize("number", [b"1,5 ", b"abc ", b"NaN ", b"inf ", b"    "])
def test_a_window_that_is_no_number_is_passed_over(tmp_path: Path, number: bytes) -> None:
    settings = {"WindowCenter": ["3", "1000"], "WindowWidth": ["9876", "801"]}
    path = _write_dicom(tmp_path / "a.dcm", RAMP, **settings)
    path.write_bytes(path.read_bytes().replace(b"9876", number))
    expected = np.clip((RAMP - 599.5) / 800, 0, 1) * 255
    np.testing.assert_allclose(read_image_file(path), expected, atol=1)


@pytest.mark.parametrize("last", [None, 65000])
def test_padding_counts_in_no_percentile(tmp_path: Path, last: int | None) -> None:
    stored = np.pad(RAMP, 20, constant_values=65535)
    stored[0] = 65100
    settings = {"PixelPaddingValue": 65535, "PixelPaddingRangeLimit": last or 65100}
    image = read_image_file(_write_dicom(tmp_path / "a.dcm", stored, **settings))
    np.testing.assert_array_equal(image[20:-20, 20:-20], to_uint8(RAMP))
    assert image[0].max() == image[:, 0].max() == 0


@pytest.mark.parametrize("bits", [12, 16])
def test_a_table_is_scaled_by_its_largest_entry(tmp_path: Path, bits: int) -> None:
    from pydicom import DataElement, Dataset, Sequence

    table = Dataset()
    table.add_new("LUTDescriptor", "US", [4096, 0, bits])
    # Twelve bits, whatever it says.
    entries = np.arange(4096, dtype="<u2").tobytes()
    table.add(DataElement("LUTData", "OW", entries, already_converted=True))
    tables = Sequence([table])
    image = read_image_file(_write_dicom(tmp_path / "a.dcm", RAMP, VOILUTSequence=tables))
    np.testing.assert_allclose(image, RAMP / 4095 * 255, atol=1)


def _lut(entries: np.ndarray, bits: int, first: int = 0) -> object:
    from pydicom import DataElement, Dataset

    table = Dataset()
    table.add_new("LUTDescriptor", "US", [4096, first % (1 << 16), bits])
    table.add(DataElement("LUTData", "OW", entries.tobytes(), already_converted=True))
    return table


@pytest.mark.parametrize("dtype", ["u1", "<u2"])
def test_tables_of_eight_bits_have_a_byte_or_two_each(tmp_path: Path, dtype: str) -> None:
    tables = [_lut((np.arange(4096) >> 4).astype(dtype), 8)]
    image = read_image_file(_write_dicom(tmp_path / "a.dcm", RAMP, VOILUTSequence=tables))
    np.testing.assert_allclose(image, RAMP // 16 / 255 * 255, atol=1)
    image = read_image_file(_write_dicom(tmp_path / "b.dcm", RAMP, ModalityLUTSequence=tables))
    np.testing.assert_array_equal(image, to_uint8(RAMP >> 4 << 8))


@pytest.mark.parametrize("bits", [10, 12, 14, 16])
def test_modality_tables_of_any_depth(tmp_path: Path, bits: int) -> None:
    entries = (np.arange(4096)[::-1] >> max(0, 12 - bits)).astype("<u2")
    settings = {
        "ModalityLUTSequence": [_lut(entries, bits)],
        "WindowCenter": 500,
        "WindowWidth": 401,
    }
    image = read_image_file(_write_dicom(tmp_path / "a.dcm", RAMP, **settings))
    expected = np.clip((entries[RAMP] - 299.5) / 400, 0, 1)
    np.testing.assert_allclose(image, expected * 255, atol=1)


def test_a_table_of_negative_values_that_was_read_without_its_sign(tmp_path: Path) -> None:
    tables = [_lut(np.arange(4096, dtype="<u2"), 12, first=-1000)]
    settings = {"RescaleSlope": 1, "RescaleIntercept": -1000, "VOILUTSequence": tables}
    image = read_image_file(_write_dicom(tmp_path / "a.dcm", RAMP, **settings))
    np.testing.assert_allclose(image, RAMP / 4095 * 255, atol=1)


def test_tables_and_rescaling_that_are_not_valid(tmp_path: Path, caplog) -> None:
    short = [_lut(np.arange(99, dtype="<u2"), 12)]
    path = _write_dicom(tmp_path / "a.dcm", RAMP, VOILUTSequence=short)
    np.testing.assert_array_equal(read_image_file(path), to_uint8(RAMP))
    assert "a.dcm: VOI LUT 1 is not valid (it holds 99 of 4096 entries)" in caplog.text
    path = _write_dicom(tmp_path / "b.dcm", RAMP, ModalityLUTSequence=short)
    with pytest.raises(DataError, match=r"b\.dcm: the modality table is not valid"):
        read_image_file(path)
    path = _write_dicom(tmp_path / "c.dcm", RAMP, RescaleSlope=0, RescaleIntercept=5)
    assert read_image_file(path).max() == 255
    assert "c.dcm: a RescaleSlope of 0 is ignored" in caplog.text
    path = _write_dicom(tmp_path / "d.dcm", RAMP, RescaleSlope="98.5")
    path.write_bytes(path.read_bytes().replace(b"98.5", b"abc "))
    with pytest.raises(DataError, match=r"d\.dcm: RescaleSlope or"):
        read_image_file(path)


def test_bits_around_the_stored_ones(tmp_path: Path) -> None:
    settings = {"BitsStored": 12, "WindowCenter": 2000, "WindowWidth": 4001}
    plain = read_image_file(_write_dicom(tmp_path / "a.dcm", RAMP, **settings))
    for name, stored, high in (("b", RAMP << 4, 15), ("c", RAMP, 15), ("d", RAMP | 0x8000, 11)):
        path = _write_dicom(tmp_path / f"{name}.dcm", stored, HighBit=high, **settings)
        np.testing.assert_array_equal(read_image_file(path), plain)
    padded = RAMP.copy()
    padded[0], padded[1] = 65535, 4095
    settings |= {"HighBit": 11, "PixelPaddingValue": 65535}
    image = read_image_file(_write_dicom(tmp_path / "e.dcm", padded, **settings))
    assert image[0].max() == 0
    assert image[1].min() == 255
    np.testing.assert_array_equal(image[2:], plain[2:])


@pytest.mark.parametrize(
    "settings",
    [{"PixelPaddingValue": [3, 4]}, {"PixelPaddingValue": 3, "PixelPaddingRangeLimit": None}],
)
def test_odd_padding(tmp_path: Path, settings: dict[str, object]) -> None:
    image = read_image_file(_write_dicom(tmp_path / "a.dcm", RAMP, **settings))
    np.testing.assert_array_equal(image, to_uint8(RAMP))


@pytest.mark.parametrize(("bits", "factor"), [(8, 1), (16, 257), (16, 1)])
def test_palettes_of_any_depth(tmp_path: Path, bits: int, factor: int) -> None:
    settings: dict[str, object] = {"PhotometricInterpretation": "PALETTE COLOR"}
    for shift, color in enumerate(("Red", "Green", "Blue")):
        entries = np.roll(np.arange(256), shift) * factor
        settings[f"{color}PaletteColorLookupTableDescriptor"] = [256, 0, bits]
        settings[f"{color}PaletteColorLookupTableData"] = entries.astype("<u2").tobytes()
    pixels = np.arange(256).reshape(16, 16)
    image = read_image_file(_write_dicom(tmp_path / "a.dcm", pixels, **settings))
    np.testing.assert_array_equal(image[..., 0], pixels)
    np.testing.assert_array_equal(image[..., 1], np.roll(np.arange(256), 1).reshape(16, 16))


def test_big_endian_without_meta_header(tmp_path: Path) -> None:
    import pydicom

    path = _write_dicom(tmp_path / "a.dcm", RAMP)
    expected, dataset = read_image_file(path), pydicom.dcmread(path)
    dataset.PixelData = RAMP.byteswap().tobytes()
    bare = pydicom.Dataset(dict(dataset.items()))
    bare.save_as(path, implicit_vr=False, little_endian=False)
    np.testing.assert_array_equal(read_image_file(path), expected)


@pytest.mark.parametrize("kind", ["RLELossless", "JPEG2000Lossless", "JPEGBaseline8Bit"])
def test_compressed_dicom(tmp_path: Path, kind: str) -> None:
    pydicom = pytest.importorskip("pydicom")
    from pydicom.encaps import encapsulate

    stored = RAMP.repeat(8, 0).repeat(8, 1)
    path = _write_dicom(tmp_path / "a.dcm", stored)
    expected, dataset = read_image_file(path), pydicom.dcmread(path)
    syntax = getattr(pydicom.uid, kind)
    if kind == "JPEGBaseline8Bit":
        small = np.uint8(stored // 16)
        _, jpeg = cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, 100])
        dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 8, 8, 7
        dataset.file_meta.TransferSyntaxUID = syntax
        dataset.PixelData = encapsulate([jpeg.tobytes()])
        dataset["PixelData"].VR = "OB"
    else:
        if kind == "JPEG2000Lossless":
            pytest.importorskip("pylibjpeg")
            pytest.importorskip("openjpeg")
        dataset.compress(syntax)
    dataset.save_as(path)
    atol = 6 if kind == "JPEGBaseline8Bit" else 0
    np.testing.assert_allclose(read_image_file(path).astype(int), expected, atol=atol)


def test_what_no_decoder_reads_is_said_once(
    tmp_path: Path, caplog, warm_python: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    pydicom = pytest.importorskip("pydicom")
    from pydicom.encaps import encapsulate, generate_frames

    path = _write_dicom(tmp_path / "a.dcm", RAMP.repeat(8, 0).repeat(8, 1))
    dataset = pydicom.dcmread(path)
    dataset.compress(pydicom.uid.RLELossless)
    (frame,) = generate_frames(dataset.PixelData, number_of_frames=1)
    dataset.PixelData = encapsulate([frame[: len(frame) // 2]])
    dataset.save_as(path)
    with pytest.raises(DataError, match=r"a\.dcm: DICOM image cannot be read"):
        read_image_file(path)
    assert "Traceback" not in caplog.text
    done = warm_python("-m", "magsd", "inspect", path)
    assert done.returncode == 1
    assert done.stdout.count("DICOM image cannot be read") == 1
    assert "Traceback" not in done.stdout + done.stderr


def test_dicom_without_preamble_and_what_is_none(tmp_path: Path, ramp: np.ndarray) -> None:
    path = _write_dicom(tmp_path / "a.dcm", RAMP)
    expected, data = read_image_file(path), path.read_bytes()
    path.write_bytes(data[132:])
    np.testing.assert_array_equal(read_image_file(path), expected)
    cv2.imwrite(str(tmp_path / "b.png"), ramp)
    named = (tmp_path / "b.png").rename(tmp_path / "b.dcm")
    with pytest.raises(DataError, match="named as DICOM, but its content is PNG"):
        read_image_file(named)
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match=r"a\.dcm"):
        read_image_file(path)


def test_what_cannot_be_seen_or_may_be_inverted_is_said(tmp_path: Path, caplog) -> None:
    flat = np.full((4, 4), 7, np.uint16)
    assert read_image_file(_write_dicom(tmp_path / "a.dcm", flat)).max() == 0
    assert "all pixels are equal" in caplog.text
    read_image_file(_write_dicom(tmp_path / "b.dcm", RAMP, PresentationLUTShape="INVERSE"))
    assert "INVERSE" in caplog.text


@pytest.mark.parametrize("channels", [2, 4])
def test_alpha_counts_in_no_percentile(tmp_path: Path, channels: int) -> None:
    from PIL import Image

    if channels == 2:
        Image.fromarray(np.dstack([np.uint8(RAMP // 16), np.full((10, 10), 9, np.uint8)])).save(
            tmp_path / "a.png"
        )
        np.testing.assert_array_equal(read_image_file(tmp_path / "a.png"), RAMP // 16)
        return
    deep = np.dstack([RAMP, RAMP, RAMP, np.full((10, 10), 65535, np.uint16)])
    cv2.imwrite(str(tmp_path / "a.png"), deep)
    # Percentiles of three channels lie a little elsewhere between the values than those of one.
    np.testing.assert_allclose(read_image_file(tmp_path / "a.png"), to_uint8(RAMP), atol=3)


@pytest.mark.parametrize("turn", range(1, 9))
def test_exif_orientation_is_applied(tmp_path: Path, turn: int) -> None:
    from PIL import Image, ImageOps

    image = Image.fromarray(np.uint8(np.arange(48).reshape(6, 8) * 5))
    exif = Image.Exif()
    exif[0x0112] = turn
    image.save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as saved:
        expected = np.asarray(ImageOps.exif_transpose(saved))
    np.testing.assert_array_equal(read_image_file(tmp_path / "a.png"), expected)


@pytest.mark.parametrize("suffix", [".bmp", ".tif", ".webp", ".jfif", ".gif", ".png", ".jpg"])
def test_other_formats_and_bytes_after_the_end(
    tmp_path: Path, ramp: np.ndarray, suffix: str
) -> None:
    from PIL import Image

    kind = {".jfif": "JPEG", ".jpg": "JPEG", ".tif": "TIFF"}.get(suffix, suffix[1:].upper())
    options = {"lossless": True} if kind == "WEBP" else {}
    Image.fromarray(ramp).save(tmp_path / f"a{suffix}", kind, **options)
    image = read_image_file(tmp_path / f"a{suffix}")
    assert np.abs(image.astype(int) - ramp).max() < 6
    if kind in ("PNG", "JPEG"):
        with (tmp_path / f"a{suffix}").open("ab") as file:
            file.write(bytes(5000))
        np.testing.assert_array_equal(read_image_file(tmp_path / f"a{suffix}"), image)


def _white_is_zero(tiff: bytes) -> bytes:
    for order in ("little", "big"):
        words = ((262, 2), (3, 2), (1, 4))
        entry = b"".join(word.to_bytes(size, order) for word, size in words)
        at = tiff.find(entry) + len(entry)
        if at >= len(entry):
            assert int.from_bytes(tiff[at : at + 2], order) == 1
            return tiff[:at] + bytes(2) + tiff[at + 2 :]
    raise AssertionError("no such tag")


@pytest.mark.parametrize("kind", ["u1", "u2", "i2", "u4", "i4", "f4", "f8", "nan", "big endian"])
def test_white_is_zero_in_a_tiff_of_any_depth(kind: str) -> None:
    from PIL import Image

    values = RAMP // 16 if kind == "u1" else RAMP
    if kind == "big endian":
        buffer = BytesIO()
        Image.frombytes("I;16B", (10, 10), RAMP.astype(">u2").tobytes()).save(buffer, "TIFF")
        data = buffer.getvalue()
        assert data.startswith(b"MM")
    else:
        values = values.astype("f4" if kind == "nan" else kind)
        if kind == "nan":
            values[0, 0] = np.nan
        _, coded = cv2.imencode(".tif", values, [cv2.IMWRITE_TIFF_COMPRESSION, 1])
        data = coded.tobytes()
    black, white = decode_image(data, "a.tif"), decode_image(_white_is_zero(data), "a.tif")
    assert black.max() == 255 or kind == "u1"
    known = (slice(1, None), slice(None))
    np.testing.assert_allclose(white[known], 255 - black[known], atol=1)


def test_a_tiff_that_would_lose_bits_is_an_error() -> None:
    words = [(256, 10), (257, 10), (258, 16 << 16 | 16), (259, 1), (262, 1), (273, 8), (277, 2)]
    words += [(278, 10), (279, 400)]
    entries = b"".join(
        struct.pack("<HHII", tag, 3 if tag == 258 else 4, 2 if tag == 258 else 1, value)
        for tag, value in words
    )
    head = struct.pack("<2sHI", b"II", 42, 408)
    pixels = np.dstack([RAMP, RAMP]).astype("<u2").tobytes()
    data = head + pixels + struct.pack("<H", len(words)) + entries + bytes(4)
    with pytest.raises(DataError, match=r"a\.tif: TIFF of 16 bits in 2 channels"):
        decode_image(data, "a.tif")


def test_a_spot_between_the_samples_is_seen() -> None:
    image = np.zeros((4096, 1024), np.uint16)
    image[5:7, 5:7] = 9
    assert to_uint8(image).max() == 255


def test_a_large_deep_image_takes_little_memory(tmp_path: Path) -> None:
    import tracemalloc

    deep = np.arange(4280 * 3520, dtype=np.uint32).reshape(4280, 3520).astype(np.uint16)
    tracemalloc.start()
    levels = to_uint8(deep)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 60 << 20
    assert (levels.min(), levels.max()) == (0, 255)


def test_the_made_files_that_failed(shared_dir: Path) -> None:
    """Gray levels of each, in ../shared/trials."""
    trials = shared_dir / "trials"
    if not trials.is_dir():
        pytest.skip(f"no made files under {trials}")
    whole = ("no_preamble", "padding_65535", "window_outside_data", "window_width_0", "plain")
    for name in (*whole, "voilut_says16_holds12"):
        assert len(np.unique(read_image_file(trials / "dicom" / f"{name}.dcm"))) == 96, name
    for name in ("rgba16.png", "grey16_ok.png", "grey16_tRNS.png", "miniswhite8.tif"):
        assert len(np.unique(read_image_file(trials / "image" / name))) == 96, name
    ok, trailer = (read_image_file(trials / "image" / f"{n}.jpg") for n in ("ok", "trailer_5000"))
    np.testing.assert_array_equal(ok, trailer)
    assert read_image_file(trials / "image" / "exif_orientation_6.jpg").shape == (90, 60)


def test_damaged_dicom(tmp_path: Path) -> None:
    pytest.importorskip("pydicom")
    (tmp_path / "a.dcm").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"a\.dcm"):
        read_image_file(tmp_path / "a.dcm")
