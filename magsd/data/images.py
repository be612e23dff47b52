"""Image files of radiographs as uint8 arrays."""

from __future__ import annotations

import logging
import re
import struct
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray

from magsd.data.dicom import SUFFIXES as DICOM_SUFFIXES
from magsd.data.dicom import decode_dicom, is_dicom
from magsd.data.formats import format_of
from magsd.data.jpeg import check_jpeg
from magsd.data.levels import described, sample_of, scaled, span_of
from magsd.errors import DataError

if TYPE_CHECKING:
    from PIL.ImageFile import ImageFile

Scalar = TypeVar("Scalar", bound=np.generic)

IMAGE_SUFFIXES = DICOM_SUFFIXES | {
    *(".png", ".jpg", ".jpeg", ".jfif", ".bmp", ".tif", ".tiff", ".webp", ".gif"),
}
_log = logging.getLogger(__name__)
_ORIENTATION = 0x0112  # of EXIF
# Of TIFF.
_BITS, _COMPRESSION, _PHOTOMETRIC, _PAGES = 258, 259, 262, 1 << 16
_BIG_TIFF, _UNCOMPRESSED, _WHITE_IS_ZERO = 43, 1, 0
_PIXEL_CHUNKS = (b"IHDR", b"PLTE", b"IDAT")  # of PNG
_EXIF_OF_PNG = re.compile(b"eXIf|Raw profile type")


def read_image_file(path: Path, notes: list[str] | None = None) -> NDArray[np.uint8]:
    """Decode a PNG, JPEG, BMP, TIFF, WebP, GIF or DICOM file to (H, W) or (H, W, 3) RGB, uint8.

    Deeper images are brought to 8 bits between their 0.5th and 99.5th percentiles; an alpha channel
    is dropped, and the EXIF orientation applied. DICOM: see `decode_dicom`. notes: what was read
    and changed on the way is added to it, in words. Raises DataError where the file is missing,
    truncated, damaged or no image.
    """
    return decode_image(_content(path), str(path), notes)


def decode_image(data: bytes, name: str, notes: list[str] | None = None) -> NDArray[np.uint8]:
    """Decode the content of an image file as `read_image_file`; `name` is named in errors."""
    notes = [] if notes is None else notes
    if not data:
        raise DataError(f"{name}: the file is empty")
    # Archives often name DICOM files without a suffix.
    if PurePath(name).suffix.lower() in DICOM_SUFFIXES or is_dicom(data):
        return decode_dicom(data, name, notes)
    kind = format_of(data)
    data = _complete(name, data)
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error as error:
        raise DataError(f"{name}: cannot be decoded ({error.err})") from error
    if image is None:
        raise DataError(f"{name}: not a PNG, JPEG, BMP, TIFF, WebP, GIF or DICOM image, or damaged")
    size = "x".join(map(str, image.shape[1::-1]))
    channels = 1 if image.ndim == 2 else image.shape[2]
    notes.append(f"{kind or 'unknown format'}, {size} pixels, {channels} channel(s), {image.dtype}")
    header = _read_header(data)
    if kind == "TIFF" and header.bits > 8 and image.dtype == np.uint8:
        raise DataError(
            f"{name}: TIFF of {header.bits} bits in {header.channels} channels is not supported"
        )
    if header.pages > 1:
        notes.append(f"the first of {header.pages} pages")
    if image.ndim == 3 and channels in (2, 4):
        # Opacity is no brightness: it must not count in the percentiles.
        image = image[..., : channels - 1]
        notes.append("alpha channel dropped")
    if header.white_is_zero and image.dtype != np.uint8:  # opencv inverts 8 bits alone
        image = _inverted(image)
    if header.white_is_zero:
        notes.append("WhiteIsZero: inverted")
    if header.orientation != 1:
        if kind != "TIFF":  # which opencv turns by itself
            image = upright(image, header.orientation)
        notes.append(f"EXIF orientation {header.orientation}: turned upright")
    if image.dtype != np.uint8:
        span = span_of(sample_of(image))
        if span[0] == span[1]:
            _log.warning("%s: all pixels are equal", name)
        notes.append(described(span))
        image = scaled(image, span)
    levels = _tidy_channels(np.asarray(image, np.uint8))
    if channels > 2 and levels.ndim == 2:
        notes.append("equal channels: gray")
    return levels


def _content(path: Path) -> bytes:
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:  # a NUL byte in the name is the latter
        reason = error.strerror if isinstance(error, OSError) else error
        raise DataError(f"{path}: cannot be read ({reason})") from error


def to_uint8(image: NDArray[np.bool_ | np.number]) -> NDArray[np.uint8]:
    """Bring any real-valued image to uint8; uint8 passes unchanged.

    The range between the percentiles 0.5 and 99.5 becomes 0..255; a constant image becomes 0.
    """
    if image.dtype == np.uint8:
        return image.astype(np.uint8, copy=False)
    return scaled(image, span_of(sample_of(image)))


def to_gray(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(H, W) from (H, W) or (H, W, 3) RGB, uint8."""
    if image.ndim == 2:
        return image
    # Opencv keeps the dtype; its types do not say so.
    return np.asarray(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), np.uint8)


class _Header(NamedTuple):
    """What opencv does not say of an image file.

    pages: images in the file. bits, channels: of a TIFF.
    """

    orientation: int = 1
    white_is_zero: bool = False
    pages: int = 1
    bits: int = 8
    channels: int = 1


def _read_header(data: bytes) -> _Header:
    from PIL import (
        GifImagePlugin,
        JpegImagePlugin,
        PngImagePlugin,
        WebPImagePlugin,
    )

    # Not Image.open, which refuses or warns of images that are large.
    readers: dict[str, Callable[[BytesIO], ImageFile]] = {
        "JPEG": JpegImagePlugin.JpegImageFile,
        "PNG": PngImagePlugin.PngImageFile,
        "WebP": WebPImagePlugin.WebPImageFile,
        "GIF": GifImagePlugin.GifImageFile,
    }
    if format_of(data) == "TIFF":
        return _read_tiff_header(data)
    reader = readers.get(format_of(data) or "")
    # Pillow decodes the whole of a PNG that has none.
    if reader is None or (reader is readers["PNG"] and not _EXIF_OF_PNG.search(data)):
        return _Header()
    try:
        with reader(BytesIO(data)) as header:
            orientation = header.getexif().get(_ORIENTATION, 1)
            pages = int(getattr(header, "n_frames", 1))
    except Exception:  # Pillow's readers raise many kinds; opencv decoded it all the same
        return _Header()
    return _Header(orientation if orientation in range(1, 9) else 1, pages=pages)


def _read_tiff_header(data: bytes) -> _Header:
    from PIL.TiffImagePlugin import ImageFileDirectory_v2

    # Not Pillow's image, which is none of some depths.
    try:
        file, pages = BytesIO(data), list[ImageFileDirectory_v2]()
        place = ImageFileDirectory_v2(data[: 16 if data[2] == _BIG_TIFF else 8]).next
        while place and len(pages) < _PAGES:
            tags = ImageFileDirectory_v2(data[: 16 if data[2] == _BIG_TIFF else 8])
            file.seek(place)
            tags.load(file)
            pages.append(tags)
            place = tags.next
        first = pages[0]
        orientation, bits = first.get(_ORIENTATION, 1), first.get(_BITS, (1,))
        return _Header(
            orientation if orientation in range(1, 9) else 1,
            first.get(_PHOTOMETRIC) == _WHITE_IS_ZERO,
            len(pages),
            max(bits),
            len(bits),
        )
    except Exception:  # as above
        return _Header()


def _inverted(image: NDArray[Any]) -> NDArray[Any]:
    """The largest value less each; what is not finite becomes NaN."""
    if image.dtype.kind == "f":
        image = np.where(np.isfinite(image), image, np.nan)
    inverted: NDArray[Any] = np.fmax.reduce(image, axis=None) - image
    return inverted


def read_orientation(path: Path) -> int:
    """The EXIF orientation of an image file, 1 (upright) where it has none."""
    return _read_header(_content(path)).orientation


def upright(image: NDArray[Scalar], orientation: int) -> NDArray[Scalar]:
    """The image (H, W, ...) turned as its EXIF orientation (1 to 8) asks."""
    if orientation in (5, 6, 7, 8):
        image = image.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        image = image[:, ::-1]
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    return np.ascontiguousarray(image)


def _tidy_channels(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(H, W) or (H, W, 3) RGB from opencv's BGR; equal channels become one."""
    if image.ndim == 2:
        return image
    if image.shape[2] == 1:
        return np.ascontiguousarray(image[..., 0])
    blue, green, red = image[..., 0], image[..., 1], image[..., 2]
    if np.array_equal(blue, green) and np.array_equal(green, red):
        return np.ascontiguousarray(blue)
    return np.ascontiguousarray(image[..., 2::-1])


def _complete(name: str, data: bytes) -> bytes:
    """The file; DataError where it is damaged: opencv fills what is missing with gray, unasked."""
    if format_of(data) == "JPEG":
        return check_jpeg(data, name)
    if format_of(data) == "PNG" and (damage := _damage_of_png(data)):
        raise DataError(f"{name}: {damage}")
    if format_of(data) == "TIFF" and (damage := _damage_of_tiff(data)):
        raise DataError(f"{name}: damaged TIFF ({damage})")
    return data


def _damage_of_tiff(data: bytes) -> str:
    """What the decoder of a compressed TIFF says, of which opencv takes no notice."""
    from PIL.TiffImagePlugin import TiffImageFile

    try:
        with TiffImageFile(BytesIO(data)) as image:
            if image.tag_v2.get(_COMPRESSION, _UNCOMPRESSED) != _UNCOMPRESSED:
                image.load()
    except OSError as error:
        return str(error)
    except Exception:  # Pillow does not know all kinds
        return ""
    return ""


def _damage_of_png(data: bytes) -> str:
    """What is wrong with the chunks up to the last one, in words; anything may follow it."""
    at = 8
    while at + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        end = at + 12 + length
        if end > len(data):
            break
        if kind in _PIXEL_CHUNKS:
            content = memoryview(data)[at + 4 : end - 4]
            if zlib.crc32(content) != int.from_bytes(data[end - 4 : end], "big"):
                return f"damaged PNG (checksum of chunk {kind.decode()})"
        if kind == b"IEND":
            return ""
        at = end
    return "truncated PNG (no end chunk)"
