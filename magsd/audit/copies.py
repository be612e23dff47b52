"""Exact and near copies among images.

Radiographs are all alike: a hash of 64 bits takes hundreds of different patients for copies before
it finds an equalized one. Compared are thumbnails whose local mean and contrast are set to 0 and 1,
which CLAHE, windows and compression change little (docs/data.md has the measured figures).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from magsd.audit.measures import THUMBNAIL

Kind = Literal["exact", "near", "aligned"]
#: 1 - correlation of two thumbnails up to which they show one picture as it lies ...
NEAR = 0.2
#: ... and after the one is moved, turned and stretched over the other.
ALIGNED = 0.1
_COARSE, _COARSE_NEAR, _COARSE_FAR = 24, 0.25, 0.6
_NEIGHBORS = 2
_BLOCK = 1 << 25  # numbers of a block of the matrix of all pairs
_MOST_PAIRS = 20_000
_LARGEST_SHIFT, _LARGEST_STRETCH = THUMBNAIL / 4, 1.5
_STEPS = (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, 30, 1e-4)
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pair:
    """Two images, as positions, the first the lower one.

    kind: exact: the same pixels. near: the same picture, as it lies. aligned: the same after the
    one is moved, turned and stretched over the other: a cropped copy, or another image of the
    patient taken alike. distance: 1 - correlation, 0 for equal pictures.
    """

    first: int
    second: int
    kind: Kind
    distance: float


def find_copies(
    thumbnails: NDArray[np.uint8],
    digests: Sequence[bytes],
    progress: Callable[[int, int], None] | None = None,
) -> list[Pair]:
    """The pairs of images (N, 64, 64) that show one picture, sorted by distance.

    digests: equal where pixels are equal. Exact copies are paired with the first of their group,
    which alone is compared with other images. Mirrored and inverted copies are not found, and
    images of one gray level are compared by their digests alone.
    """
    groups: dict[bytes, list[int]] = {}
    for position, digest in enumerate(digests):
        groups.setdefault(digest, []).append(position)
    pairs = [
        Pair(members[0], other, "exact", 0.0)
        for members in groups.values()
        for other in members[1:]
    ]
    flat = thumbnails.reshape(len(thumbnails), THUMBNAIL**2)
    varied = [m[0] for m in groups.values() if np.ptp(flat[m[0]]) > 0]
    if len(varied) > 1:
        found = _near_copies(thumbnails[varied], progress)
        pairs += [Pair(varied[i], varied[j], kind, distance) for i, j, kind, distance in found]
    return sorted(pairs, key=lambda pair: (pair.distance, pair.first, pair.second))


_Found = tuple[int, int, Kind, float]


def _near_copies(
    thumbnails: NDArray[np.uint8], progress: Callable[[int, int], None] | None
) -> list[_Found]:
    coarse = np.stack([_descriptor(thumbnail, _COARSE, 2) for thumbnail in thumbnails])
    close, neighbors = _candidates(coarse.reshape(len(coarse), -1))
    found: list[_Found] = []
    for i, j in close:
        distance = _distance(_fine(thumbnails[i]), _fine(thumbnails[j]))
        if distance <= NEAR:
            found.append((i, j, "near", distance))
    waiting = sorted(neighbors - {(i, j) for i, j, _, _ in found})

    def align(pair: tuple[int, int]) -> float:
        return _aligned_distance(*(_fine(thumbnails[k]) for k in pair))

    with ThreadPoolExecutor() as pool:  # opencv frees the interpreter
        distances = zip(waiting, pool.map(align, waiting), strict=True)
        for number, (pair, distance) in enumerate(distances, 1):
            if distance <= ALIGNED:
                found.append((*pair, "aligned", distance))
            if progress is not None:
                progress(number, len(waiting))
    return found


def _candidates(
    descriptors: NDArray[np.float32],
) -> tuple[list[tuple[int, int]], set[tuple[int, int]]]:
    """Pairs that are close, and each image with its nearest ones, of normalized rows (N, D)."""
    close: list[tuple[int, int]] = []
    neighbors: set[tuple[int, int]] = set()
    for start, scores in _blocks(descriptors):
        first, second = np.nonzero(scores >= 1 - _COARSE_NEAR)
        first += start
        once = first < second
        close += zip(first[once].tolist(), second[once].tolist(), strict=True)
        rows = np.arange(len(scores))
        for _ in range(_NEIGHBORS):
            best = scores.argmax(axis=1)
            for i in np.flatnonzero(scores[rows, best] >= 1 - _COARSE_FAR):
                neighbors.add((min(start + i, best[i]), max(start + i, best[i])))
            scores[rows, best] = -2
    if len(close) > _MOST_PAIRS:
        _log.warning(
            "%d pairs of images are much alike; the first %d are looked at", len(close), _MOST_PAIRS
        )
    return close[:_MOST_PAIRS], {(int(i), int(j)) for i, j in neighbors}


def _blocks(descriptors: NDArray[np.float32]) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Correlations of some rows with all, and the first of these rows; none with itself."""
    step = max(1, _BLOCK // len(descriptors))
    for start in range(0, len(descriptors), step):
        scores = descriptors[start : start + step] @ descriptors.T
        rows = np.arange(len(scores))
        scores[rows, start + rows] = -2
        yield start, scores


def _descriptor(thumbnail: NDArray[np.uint8], size: int, sigma: float) -> NDArray[np.float32]:
    """(size, size): local mean and contrast removed; mean 0, norm 1."""
    image: NDArray[Any] = thumbnail.astype(np.float32)
    if size != THUMBNAIL:
        image = np.asarray(cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA))
    image = image - cv2.GaussianBlur(image, (0, 0), sigma)
    image = image / np.sqrt(cv2.GaussianBlur(image * image, (0, 0), sigma) + 4)
    image -= image.mean()
    return np.asarray(image / max(float(np.linalg.norm(image)), 1e-6), np.float32)


def _fine(thumbnail: NDArray[np.uint8]) -> NDArray[np.float32]:
    return _descriptor(thumbnail, THUMBNAIL, 4)


def _distance(first: NDArray[np.float32], second: NDArray[np.float32]) -> float:
    return max(0.0, 1 - float((first * second).sum()))


def _aligned_distance(first: NDArray[np.float32], second: NDArray[np.float32]) -> float:
    """1 - correlation after the best affine map; 2 where none is found.

    Source: Evangelidis and Psarakis, Parametric image alignment using enhanced correlation
    coefficient maximization, IEEE TPAMI 30 (10), 2008.
    """
    start: NDArray[Any] = np.eye(2, 3, dtype=np.float32)
    everywhere = np.full(first.shape, 255, np.uint8)
    try:
        reached, affine = cv2.findTransformECC(
            first, second, start, cv2.MOTION_AFFINE, _STEPS, everywhere, 3
        )
    except cv2.error:  # the two have nothing in common
        return 2.0
    # A map onto a small part of the other image would fit many.
    center = affine @ np.array([THUMBNAIL / 2, THUMBNAIL / 2, 1]) - THUMBNAIL / 2
    stretch = np.linalg.svd(affine[:, :2], compute_uv=False)
    if np.abs(center).max() > _LARGEST_SHIFT or not (
        1 / _LARGEST_STRETCH <= stretch.min() <= stretch.max() <= _LARGEST_STRETCH
    ):
        return 2.0
    return max(0.0, 1 - float(reached))
