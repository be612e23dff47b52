"""Image files of radiographs as uint8 arrays."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path, PurePath
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from magsd.errors import DataError

DICOM_SUFFIXES = frozenset({".dcm", ".dicom", ".dic"})
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg"}) | DICOM_SUFFIXES
_PERCENTILES = (0.5, 99.5)


def read_image_file(path: Path) -> NDArray[np.uint8]:
    """Decode a PNG, JPEG or DICOM file to (H, W) or (H, W, 3) RGB, uint8.

    Deeper images are brought to 8 bits between their 0.5th and 99.5th percentiles. Raises
    DataError where the file is missing, truncated or no image.
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
        return _read_dicom(name, data)
    _check_complete(name, data)
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error as error:
        raise DataError(f"{name}: cannot be decoded ({error.err})") from error
    if image is None:
        raise DataError(f"{name}: not a PNG, JPEG or DICOM image, or damaged")
    return _tidy_channels(to_uint8(image))


def is_dicom(data: bytes) -> bool:
    """Whether the content of a file says that it is DICOM."""
    return data[128:132] == b"DICM"


def to_uint8(image: NDArray[np.bool_ | np.number]) -> NDArray[np.uint8]:
    """Bring any real-valued image to uint8; uint8 passes unchanged.

    The range between the percentiles 0.5 and 99.5 becomes 0..255; a constant image becomes 0.
    """
    if image.dtype == np.uint8:
        return image.astype(np.uint8, copy=False)
    values = image.astype(np.float32)
    low, high = np.percentile(values, _PERCENTILES)
    if high <= low:
        low, high = float(values.min()), float(values.max())
    if high <= low:
        return np.zeros(image.shape, np.uint8)
    scaled = (values - low) * (255.0 / (high - low))
    levels: NDArray[np.uint8] = np.clip(np.rint(scaled), 0, 255).astype(np.uint8)
    return levels


def to_gray(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(H, W) from (H, W) or (H, W, 3) RGB, uint8."""
    if image.ndim == 2:
        return image
    # Opencv keeps the dtype; its types do not say so.
    return np.asarray(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), np.uint8)


def _tidy_channels(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(H, W) or (H, W, 3) RGB from opencv's channel orders; equal channels become one."""
    if image.ndim == 2:
        return image
    channels = image.shape[2]
    if channels in (1, 2):
        return np.ascontiguousarray(image[..., 0])
    blue, green, red = image[..., 0], image[..., 1], image[..., 2]
    if np.array_equal(blue, green) and np.array_equal(green, red):
        return np.ascontiguousarray(blue)
    return np.ascontiguousarray(image[..., 2::-1])


def _check_complete(name: str, data: bytes) -> None:
    """Raise DataError on a truncated file: opencv fills what is missing with gray, unasked."""
    if data.startswith(b"\xff\xd8") and b"\xff\xd9" not in data[-4096:]:
        raise DataError(f"{name}: truncated JPEG (no end marker)")
    if data.startswith(b"\x89PNG\r\n\x1a\n") and b"IEND" not in data[-4096:]:
        raise DataError(f"{name}: truncated PNG (no end chunk)")


def _read_dicom(name: str, data: bytes) -> NDArray[np.uint8]:
    try:
        import pydicom
    except ImportError:
        raise DataError(f"{name}: reading DICOM needs pydicom (pip install pydicom)") from None
    try:
        dataset = pydicom.dcmread(BytesIO(data))
        return _dicom_to_uint8(name, dataset, np.asarray(dataset.pixel_array))
    except DataError:
        raise
    except Exception as error:  # pydicom and its decoders raise many kinds of their own
        raise DataError(f"{name}: DICOM image cannot be read ({error})") from error


def _dicom_to_uint8(name: str, dataset: Any, pixels: NDArray[np.number]) -> NDArray[np.uint8]:
    """Rescaled, windowed and, for MONOCHROME1, inverted, so that bone comes out bright."""
    if int(dataset.get("NumberOfFrames", 1) or 1) > 1:
        raise DataError(f"{name}: DICOM with several frames is not a radiograph")
    photometric = str(dataset.get("PhotometricInterpretation", "MONOCHROME2"))
    if not photometric.startswith("MONOCHROME"):
        if pixels.ndim != 3:
            raise DataError(f"{name}: DICOM with {photometric} pixels is not supported")
        return _tidy_channels(to_uint8(pixels)[..., ::-1])
    from pydicom.pixels.processing import apply_modality_lut, apply_voi_lut

    values = np.asarray(apply_modality_lut(pixels, dataset))
    table, window = dataset.get("VOILUTSequence"), _dicom_window(dataset)
    if table:
        values = np.asarray(apply_voi_lut(values, dataset))
        low, high = 0.0, float((1 << int(table[0].LUTDescriptor[2])) - 1)
    elif window is not None:
        low, high = window[0] - window[1] / 2, window[0] + window[1] / 2
    else:
        low, high = (float(v) for v in np.percentile(values, _PERCENTILES))
    if high <= low:
        return np.zeros(values.shape, np.uint8)
    gray = np.clip((values.astype(np.float32) - low) / (high - low), 0, 1)
    if photometric == "MONOCHROME1":
        gray = 1 - gray
    levels: NDArray[np.uint8] = np.rint(gray * 255).astype(np.uint8)
    return levels


def _dicom_window(dataset: Any) -> tuple[float, float] | None:
    """(center, width) of the first window, or None."""
    values = [dataset.get(name) for name in ("WindowCenter", "WindowWidth")]
    if any(value is None or value == "" for value in values):
        return None
    center, width = (np.atleast_1d(np.asarray(value, np.float64))[0] for value in values)
    return float(center), float(width)
