"""Gray levels of deep images, in little memory beside the image."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

_PERCENTILES = (0.5, 99.5)
_SAMPLE = 1 << 20
_BLOCK = 1 << 20

Values = NDArray[np.bool_ | np.number]


def sample_of(image: Values) -> Values:
    """At most about a million values, spread evenly over the image; all where those are equal."""
    values = image.reshape(-1)
    some = values[:: max(1, values.size // _SAMPLE)]
    return values if some.size and some.min() == some.max() else some


def span_of(values: Values) -> tuple[float, float]:
    """The percentiles 0.5 and 99.5 of what is finite, else its ends; equal where all are equal."""
    known = values[np.isfinite(values)] if values.dtype.kind == "f" else values
    if not known.size:
        return 0.0, 0.0
    low, high = (float(end) for end in np.percentile(known.astype(np.float32), _PERCENTILES))
    return (low, high) if high > low else (float(known.min()), float(known.max()))


def described(span: tuple[float, float]) -> str:
    """What `scaled` does, in words."""
    return f"levels {span[0]:g} to {span[1]:g} (percentiles 0.5 and 99.5) become 0 to 255"


def scaled(image: Values, span: tuple[float, float]) -> NDArray[np.uint8]:
    """uint8 with the span as 0..255; NaN is 0, as is an image without a span."""
    low, high = span
    if not high > low:
        return np.zeros(image.shape, np.uint8)
    return by_rows(image, lambda block: (block.astype(np.float32) - low) / (high - low))


def by_rows(image: Values, shares: Callable[[Values], NDArray[np.floating]]) -> NDArray[np.uint8]:
    """255 times `shares(rows)`, rounded and clipped, a few rows at a time."""
    levels = np.empty(image.shape, np.uint8)
    rows = max(1, _BLOCK // max(1, int(np.prod(image.shape[1:]))))
    for top in range(0, len(image), rows):
        block = np.nan_to_num(shares(image[top : top + rows]), nan=0.0)
        levels[top : top + rows] = np.rint(np.clip(block, 0, 1) * 255)
    return levels
