"""Masks that lie beside the images of a class."""

from __future__ import annotations

import re
from pathlib import Path, PurePath

import cv2
import numpy as np
from numpy.typing import NDArray

from magsd.data.images import read_image_file, read_orientation, to_gray, upright
from magsd.data.record import MaskKind
from magsd.data.sources.files import LeftOut
from magsd.errors import DataError

_LUNGS = frozenset({"mask", "masks", "lungmask", "lungmasks", "lungsmask", "lungsmasks"})
_LESIONS = frozenset({"infectionmask", "infectionmasks", "lesionmask", "lesionmasks"})
_IMAGES = frozenset({"image", "images", "img", "imgs"})
_ENDING = re.compile(r"[ _-]masks?([ _-]?\d+)?$", re.IGNORECASE)
_Place = tuple[tuple[str, ...], str]


def is_mask_folder(name: str) -> bool:
    """Whether a folder's name says that it holds masks."""
    return _plain(name) in _LUNGS | _LESIONS


def is_image_folder(name: str) -> bool:
    """Whether a folder's name says no more than that it holds images."""
    return _plain(name) in _IMAGES


def split_masks(
    folder: Path, paths: list[Path], left_out: LeftOut
) -> tuple[list[Path], dict[Path, tuple[MaskKind, Path]]]:
    """The images of a class, and the masks of some of them.

    Masks lie in a folder such as masks or "lung masks" beside the images or their folder, under the
    names of the images, as in the COVID-19 Radiography Database; of masks of two kinds, lungs are
    taken. Masks of no image, and those that lie among the images as NAME_mask, are left out.
    """
    masks: list[tuple[_Place, MaskKind, Path]] = []
    images: list[Path] = []
    for path in paths:
        parts = path.relative_to(folder).parent.parts
        at = next((i for i, part in enumerate(parts) if is_mask_folder(part)), None)
        if at is None:
            images.append(path)
        else:
            kind: MaskKind = "lesion" if _plain(parts[at]) in _LESIONS else "lungs"
            masks.append(((parts[:at], _stem(path)), kind, path))
    images = _without_masks_among(images, left_out)
    places: dict[_Place, Path] = {}
    for path in images:
        parts = path.relative_to(folder).parent.parts
        outer = parts[:-1] if parts and is_image_folder(parts[-1]) else parts
        places.setdefault((outer, path.stem), path)
    found: dict[Path, tuple[MaskKind, Path]] = {}
    for place, kind, path in sorted(masks, key=lambda mask: (mask[1] != "lungs", mask[2])):
        image = places.get(place)
        if image is None:
            left_out.add(path, "masks of no image there")
        elif image in found:
            left_out.add(path, "further masks of an image")
        else:
            found[image] = (kind, path)
    return images, found


def turned_mask(
    mask: NDArray[np.bool_], path: Path, height: int, width: int, orientation: int
) -> NDArray[np.bool_]:
    """A mask turned with its image, which has (height, width) once its orientation is applied.

    path: the mask's file. One that has an orientation of its own, or the proportions of the upright
    image alone, is upright already.
    """
    if orientation == 1 or read_orientation(path) != 1:
        return mask
    stored = (width, height) if orientation > 4 else (height, width)
    return upright(mask, orientation) if _same_proportions(mask, *stored) else mask


def _same_proportions(mask: NDArray[np.bool_], height: int, width: int) -> bool:
    rows, columns = mask.shape
    return bool(abs(columns * height - rows * width) <= 0.02 * rows * width)


def read_mask_file(path: Path, height: int, width: int, orientation: int = 1) -> NDArray[np.bool_]:
    """(height, width) bool, True where the mask's file is bright; resized to the nearest pixel.

    orientation: that of the image, by which the mask is turned; see `turned_mask`. Raises DataError
    where it cannot be read or has other proportions than the image.
    """
    mask = to_gray(read_image_file(path))
    # Half of what stands for "inside", be it 1 or 255.
    inside = turned_mask(mask > mask.max() / 2, path, height, width, orientation)
    if not _same_proportions(inside, height, width):
        raise DataError(
            f"{path}: mask of {inside.shape[1]}x{inside.shape[0]} pixels for an image of"
            f" {width}x{height}"
        )
    resized = cv2.resize(
        inside.astype(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST_EXACT
    )
    return np.asarray(resized).astype(bool)


def _without_masks_among(images: list[Path], left_out: LeftOut) -> list[Path]:
    stems = {path.with_suffix("") for path in images}
    kept = []
    for path in images:
        plain = path.with_name(_stem(path))
        if plain != path.with_suffix("") and plain in stems:
            left_out.add(path, "masks among the images")
        else:
            kept.append(path)
    return kept


def _stem(path: PurePath) -> str:
    """The name without its suffix and "_mask"."""
    return _ENDING.sub("", path.stem) or path.stem


def _plain(name: str) -> str:
    return "".join(filter(str.isalnum, name.lower()))
