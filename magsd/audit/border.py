"""The border of images, without the lungs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

from magsd.audit.measures import THUMBNAIL
from magsd.data.record import Record
from magsd.data.sources.base import Source
from magsd.errors import DataError

#: Of width and height, what a rectangle in the middle covers: a radiograph's lungs, mostly.
RECTANGLE = (0.84, 0.90)
_MOST_MASKS = 200
_RARE = 0.05


def border_pixels(
    source: Source, records: Sequence[Record], thumbnails: NDArray[np.uint8]
) -> tuple[NDArray[np.uint8], str]:
    """What is left of thumbnails (N, 64, 64) as (N, P), and in words what was blanked.

    One area is blanked in all images, or its shape alone would tell apart the classes that have
    masks: a rectangle in the middle, and whatever lies in the lungs of 5 % of the images whose
    lungs are outlined.
    """
    blank = middle()
    masks = list(_lungs(source, records))
    words = f"the middle {RECTANGLE[0]:.0%} of the width and {RECTANGLE[1]:.0%} of the height"
    if masks:
        stacked = np.stack(masks)
        blank |= (stacked >= 0.5).mean(axis=0) >= _RARE
        inside = float((stacked * blank).sum() / max(stacked.sum(), 1e-6))
        words += (
            f", and where lungs lie in {_RARE:.0%} of {len(masks)} outlined images:"
            f" {inside:.1%} of these lungs"
        )
    return thumbnails[:, ~blank], f"{words}; {1 - blank.mean():.0%} of each image is left"


def middle() -> NDArray[np.bool_]:
    """(64, 64), True in the rectangle."""
    place = np.abs(np.arange(THUMBNAIL) + 0.5 - THUMBNAIL / 2) / (THUMBNAIL / 2)
    inside: NDArray[np.bool_] = (place[:, None] <= RECTANGLE[1]) & (place[None] <= RECTANGLE[0])
    return inside


def _lungs(source: Source, records: Sequence[Record]) -> Iterator[NDArray[np.float32]]:
    """The shares (64, 64) of lungs, of some records that have them."""
    outlined = [record for record in records if record.mask_kind == "lungs"]
    for record in outlined[:: max(1, len(outlined) // _MOST_MASKS)][:_MOST_MASKS]:
        try:
            mask = source.read_mask(record)
        except DataError:
            continue
        if mask is not None:
            size = (THUMBNAIL, THUMBNAIL)
            shares = cv2.resize(mask.astype(np.float32), size, interpolation=cv2.INTER_AREA)
            yield np.asarray(shares, np.float32)
