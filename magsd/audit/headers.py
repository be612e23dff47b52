"""What the header of an image file says, without its pixels."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from magsd.data.dicom import SUFFIXES as DICOM_SUFFIXES
from magsd.data.formats import format_of

if TYPE_CHECKING:
    from PIL.ImageFile import ImageFile

_PNG_COLORS = {0: "gray", 2: "RGB", 3: "palette", 4: "gray and alpha", 6: "RGB and alpha"}
_BITS, _PHOTOMETRIC = 258, 262  # tags of TIFF
_TIFF_PHOTOMETRIC = {0: "WhiteIsZero", 1: "BlackIsZero", 2: "RGB", 3: "palette", 6: "YCbCr"}
_JPEG_COLORS = {1: "gray", 3: "YCbCr", 4: "CMYK"}
#: Mean of the luminance table of ITU-T T.81, annex K, which libjpeg calls quality 50.
_MEAN_OF_QUALITY_50 = 57.625

Facts = dict[str, float | str]


def read_header(path: Path) -> Facts:
    """Format, bits of a sample, colors as stored, JPEG quality and size in bytes of a file.

    "bits" is NaN, and "colors" "unknown", where they are not found; "quality" is NaN for all but
    JPEG. Never raises for a file that is there.
    """
    facts: Facts = {
        "format": "unknown",
        "bits": math.nan,
        "colors": "unknown",
        "quality": math.nan,
        "bytes": float(path.stat().st_size),
    }
    with path.open("rb") as file:
        head = file.read(132)
    kind = format_of(head)
    if kind is None and path.suffix.lower() in DICOM_SUFFIXES:
        kind = "DICOM"
    if kind is not None:
        facts["format"] = kind
    readers = {"PNG": _png, "JPEG": _jpeg, "TIFF": _tiff, "DICOM": _dicom}
    if kind in readers:
        try:
            facts |= readers[kind](path, head)
        except Exception:  # of many kinds; the pixels were decoded all the same
            return facts
    return facts


def _png(path: Path, head: bytes) -> Facts:
    return {"bits": float(head[24]), "colors": _PNG_COLORS.get(head[25], "unknown")}


def _jpeg(path: Path, head: bytes) -> Facts:
    from PIL.JpegImagePlugin import JpegImageFile

    # Not Image.open, which refuses or warns of images that are large.
    with JpegImageFile(path) as image:
        return {
            "bits": float(image.bits),
            "colors": _JPEG_COLORS.get(image.layers, "unknown"),
            "quality": _quality(image),
        }


def _quality(image: ImageFile) -> float:
    """The quality by which libjpeg would scale the luminance table to this mean."""
    tables: dict[int, list[int]] = getattr(image, "quantization", {})
    if not tables:
        return math.nan
    table = tables[min(tables)]
    scale = 100 * sum(table) / len(table) / _MEAN_OF_QUALITY_50
    return round(100 - scale / 2 if scale <= 100 else 5000 / scale)


def _tiff(path: Path, head: bytes) -> Facts:
    from PIL.TiffImagePlugin import TiffImageFile

    with TiffImageFile(path) as image:
        bits = image.tag_v2.get(_BITS, (1,))
        colors = _TIFF_PHOTOMETRIC.get(image.tag_v2.get(_PHOTOMETRIC, -1), "unknown")
    return {"bits": float(max(bits)), "colors": colors}


def _dicom(path: Path, head: bytes) -> Facts:
    import pydicom

    header = pydicom.dcmread(path, stop_before_pixels=True, force=True)
    return {
        "bits": float(header.get("BitsStored") or math.nan),
        "colors": str(header.get("PhotometricInterpretation") or "unknown"),
    }
