"""What is measured of each image; none of it is meant to show the disease."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from magsd.audit.headers import Facts, read_header
from magsd.data.cache import in_order, prepare_image, worker_pool
from magsd.data.images import to_gray
from magsd.data.record import Record
from magsd.data.sources.base import Source
from magsd.errors import DataError

THUMBNAIL = 64
_LONGEST = 512  # pixels of the longer side of the image that is measured
_MARGIN_SPAN = 10  # gray levels within which a line of a margin lies, but for its ends
_FRAME = 0.15  # of a side: where markers stand
_STROKE = 32  # a stroke of a marker is thinner than this part of the shorter side
_CONTRAST = 80  # gray levels by which it is brighter than what surrounds it


@dataclass(frozen=True)
class Measured:
    """All images that can be read.

    records: N. digests: of the decoded pixels, equal for exact copies. thumbnails: (N, 64, 64)
    uint8. facts: of each image, by name. bad: key and reason of the images that cannot be read.
    """

    records: tuple[Record, ...]
    digests: list[bytes]
    thumbnails: NDArray[np.uint8]
    facts: list[Facts]
    bad: list[tuple[str, str]]


def measure_images(source: Source, progress: Callable[[int, int], None] | None = None) -> Measured:
    """Decode each image once, in threads; of each, a thumbnail of 4 KB and some numbers are kept.

    progress: called with images done and images in all.
    """

    def measure(record: Record) -> tuple[bytes, NDArray[np.uint8], Facts] | str:
        try:
            image = source.read_image(record)
            facts = {} if record.path is None else read_header(record.path)
        except (DataError, OSError) as error:
            return str(error)
        gray = to_gray(image)
        facts |= _shape_facts(image, facts) | pixel_facts(gray)
        # The further columns of the table that lists the image.
        facts |= {f"column {name}": text for name, text in record.extra.items()}
        return _digest(image), prepare_image(gray, THUMBNAIL), facts

    count = len(source.records)
    kept: list[Record] = []
    digests: list[bytes] = []
    thumbnails: list[NDArray[np.uint8]] = []
    facts: list[Facts] = []
    bad: list[tuple[str, str]] = []
    with worker_pool() as pool:
        results = in_order(pool, measure, source.records)
        for number, (record, result) in enumerate(zip(source.records, results, strict=True), 1):
            if isinstance(result, str):
                bad.append((record.key, result))
            else:
                kept.append(record)
                digests.append(result[0])
                thumbnails.append(result[1])
                facts.append(result[2])
            if progress is not None:
                progress(number, count)
    shape = (len(kept), THUMBNAIL, THUMBNAIL)
    stacked = np.array(thumbnails, np.uint8).reshape(shape)
    return Measured(tuple(kept), digests, stacked, facts, bad)


def _digest(image: NDArray[np.uint8]) -> bytes:
    digest = hashlib.blake2b(repr(image.shape).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(image).data)
    return digest.digest()


def _shape_facts(image: NDArray[np.uint8], header: Facts) -> Facts:
    height, width = image.shape[:2]
    facts: Facts = {
        "width": float(width),
        "height": float(height),
        "aspect": width / height,
        "color": "gray" if image.ndim == 2 else "color",
    }
    if "bytes" in header:
        facts["bytes per pixel"] = float(header["bytes"]) / (width * height)
    return facts


def pixel_facts(gray: NDArray[np.uint8]) -> Facts:
    """Brightness, margins and markers of an image (H, W), seen at 512 pixels a side at most.

    Margins are parts of a side whose lines have one gray level. Markers are thin, very bright
    strokes near the edges: letters, arrows, plates.
    """
    scale = _LONGEST / max(gray.shape)
    if scale < 1:
        size = [max(1, round(side * scale)) for side in gray.shape[::-1]]
        gray = np.asarray(cv2.resize(gray, size, interpolation=cv2.INTER_AREA), np.uint8)
    strokes = _strokes(gray)
    count, _, stats, _ = cv2.connectedComponentsWithStats(strokes.astype(np.uint8))
    seen = int((stats[1:count, cv2.CC_STAT_AREA] >= 3).sum())
    return {
        "mean": float(gray.mean()),
        "deviation": float(gray.std()),
        "black": float((gray <= 2).mean()),
        "white": float((gray >= 253).mean()),
        "margin left": _margin(gray.T),
        "margin right": _margin(gray.T[::-1]),
        "margin top": _margin(gray),
        "margin bottom": _margin(gray[::-1]),
        "markers": float(seen),
        "marker area": float(strokes.mean()),
    }


def _margin(rows: NDArray[np.uint8]) -> float:
    """The share of the rows, from the first on, that have one gray level but for their ends."""
    low, high = np.percentile(rows, [5, 95], axis=1)
    filled = np.flatnonzero(high - low > _MARGIN_SPAN)
    return float(filled[0] if len(filled) else len(rows)) / len(rows)


def _strokes(gray: NDArray[np.uint8]) -> NDArray[np.bool_]:
    height, width = gray.shape
    # Odd, or the edges of broad things would count.
    side = max(3, min(height, width) // _STROKE | 1)
    kernel = cv2.getStructuringElement(cv2.MORPH_RECT, (side, side))
    strokes = np.asarray(cv2.morphologyEx(gray, cv2.MORPH_TOPHAT, kernel)) >= _CONTRAST
    top, left = round(height * _FRAME), round(width * _FRAME)
    strokes[top : height - top, left : width - left] = False
    return strokes
