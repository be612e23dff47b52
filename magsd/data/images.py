"""Image files of radiographs as uint8 arrays."""

from __future__ import annotations

import struct
from io import BytesIO
from pathlib import Path, PurePath

import cv2
import numpy as np
from numpy.typing import NDArray

from magsd.data.dicom import SUFFIXES as DICOM_SUFFIXES
from magsd.data.dicom import decode_dicom, is_dicom
from magsd.data.levels import sample_of, scaled, span_of
from magsd.errors import DataError

IMAGE_SUFFIXES = DICOM_SUFFIXES | {
    *(".png", ".jpg", ".jpeg", ".jfif", ".bmp", ".tif", ".tiff", ".webp", ".gif"),
}
_ORIENTATION = 0x0112  # of EXIF
_PHOTOMETRIC, _WHITE_IS_ZERO = 262, 0  # of TIFF


def read_image_file(path: Path) -> NDArray[np.uint8]:
    """Decode a PNG, JPEG, BMP, TIFF, WebP, GIF or DICOM file to (H, W) or (H, W, 3) RGB, uint8.

    Deeper images are brought to 8 bits between their 0.5th and 99.5th percentiles; an alpha channel
    is dropped, and the EXIF orientation applied. DICOM: see `decode_dicom`. Raises DataError where
    the file is missing, truncated or no image.
    """
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    return decode_image(data, str(path))


def decode_image(data: bytes, name: str) -> NDArray[np.uint8]:
    """Decode the content of an image file as `read_image_file`; `name` is named in errors."""
    if not data:
        raise DataError(f"{name}: the file is empty")
    # Archives often name DICOM files without a suffix.
    if PurePath(name).suffix.lower() in DICOM_SUFFIXES or is_dicom(data):
        return decode_dicom(data, name)
    _check_complete(name, data)
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error as error:
        raise DataError(f"{name}: cannot be decoded ({error.err})") from error
    if image is None:
        raise DataError(f"{name}: not a PNG, JPEG, BMP, TIFF, WebP, GIF or DICOM image, or damaged")
    return _tidy_channels(to_uint8(_upright(_without_alpha(image), data)))


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


def _without_alpha(image: NDArray[np.number]) -> NDArray[np.number]:
    """Opacity is no brightness: it must not count in the percentiles."""
    if image.ndim == 3 and image.shape[2] in (2, 4):
        return image[..., : image.shape[2] - 1]
    return image


def _upright(image: NDArray[np.number], data: bytes) -> NDArray[np.number]:
    """The image as its header says that it is to be shown."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(BytesIO(data)) as header:
            turn = header.getexif().get(_ORIENTATION, 1)
            white = getattr(header, "tag_v2", {}).get(_PHOTOMETRIC) == _WHITE_IS_ZERO
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, struct.error):
        return image  # decoded without it
    if white and image.dtype != np.uint8:  # opencv inverts 8 bits alone
        image = image.max() - image
    if turn in (5, 6, 7, 8):
        image = image.swapaxes(0, 1)
    if turn in (2, 3, 6, 7):
        image = image[:, ::-1]
    if turn in (3, 4, 7, 8):
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


def _check_complete(name: str, data: bytes) -> None:
    """Raise DataError on a truncated file: opencv fills what is missing with gray, unasked."""
    if data.startswith(b"\xff\xd8") and not _jpeg_ends(data):
        raise DataError(f"{name}: truncated JPEG (no end marker)")
    if data.startswith(b"\x89PNG\r\n\x1a\n") and not _png_ends(data):
        raise DataError(f"{name}: truncated PNG (no end chunk)")


def _png_ends(data: bytes) -> bool:
    """Whether the chunks lead to the last one; anything may follow."""
    at = 8
    while at + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        at += 12 + length
        if kind == b"IEND":
            return bool(at <= len(data))
    return False


def _jpeg_ends(data: bytes) -> bool:
    """Whether the segments lead to the end marker; anything may follow."""
    at = 2
    while (at := data.find(b"\xff", at)) >= 0 and at + 1 < len(data):
        marker = data[at + 1]
        if marker == 0xD9:
            return True
        # Fill bytes, a 0xff of coded pixels, restarts, and a thumbnail's begin have no length.
        if marker in (0x00, 0x01, 0xD8) or 0xD0 <= marker <= 0xD7:
            at += 2
        elif marker == 0xFF:
            at += 1
        elif at + 4 > len(data):
            return False
        else:
            at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return False
