"""Annotations in Darwin JSON, the format of V7's data sets."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from magsd.data.images import upright
from magsd.errors import DataError

LUNG = "Lung"
_PATIENT = "PatientID:"
_SUBPIXEL_BITS = 4


@dataclass(frozen=True)
class DarwinAnnotation:
    """One image's annotation.

    width, height: pixels of the annotated image, the unit of the polygons. names: the image's
    file name, then its original one, where given. folder: where the image lies within the data set,
    "" where that is not said. tags: names without a region. lungs: polygons (P, 2) as (x, y).
    """

    path: Path
    width: int
    height: int
    names: tuple[str, ...]
    tags: frozenset[str]
    lungs: tuple[NDArray[np.float64], ...]
    folder: str = ""

    @property
    def patients(self) -> tuple[str, ...]:
        """The numbers of the PatientID tags."""
        return tuple(sorted(t.removeprefix(_PATIENT) for t in self.tags if t.startswith(_PATIENT)))

    def same_shape(self, height: int, width: int) -> bool:
        """Whether an image of that size has the annotated image's proportions, to a pixel.

        Where it has not, it was cropped after annotation, and the polygons fit nowhere on it.
        """
        scale = min(height / self.height, width / self.width)
        return abs(self.height * scale - height) <= 1 and abs(self.width * scale - width) <= 1

    def lung_mask(self, height: int, width: int, orientation: int = 1) -> NDArray[np.bool_] | None:
        """(height, width) bool of the lungs on the image scaled to that size, or None.

        orientation: EXIF's of the image, which has that size once it is applied. Polygons of the
        image as it is stored are turned with it.
        """
        stored = (width, height) if orientation > 4 else (height, width)
        if orientation != 1 and self.same_shape(*stored):
            mask = self._draw(*stored)
            return None if mask is None else upright(mask, orientation)
        return self._draw(height, width) if self.same_shape(height, width) else None

    def _draw(self, height: int, width: int) -> NDArray[np.bool_] | None:
        if not self.lungs:
            return None
        scale = np.array([width / self.width, height / self.height])
        mask = np.zeros((height, width), np.uint8)
        for polygon in self.lungs:
            # Pixel centers lie at whole numbers for opencv, at halves in the annotation.
            points = (polygon * scale - 0.5) * (1 << _SUBPIXEL_BITS)
            cv2.fillPoly(mask, [np.rint(points).astype(np.int32)], 1, shift=_SUBPIXEL_BITS)
        return mask.astype(bool)


def read_darwin(path: Path) -> DarwinAnnotation:
    """Read Darwin JSON of version 1 or 2; DataError where it is not that."""
    try:
        content = json.loads(path.read_bytes().decode("utf-8", errors="replace"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (OSError, json.JSONDecodeError) as error:
        raise DataError(f"{path}: not readable as JSON ({error})") from error
    try:
        image, names = _image_entry(content)
        annotations = content["annotations"]
        width, height = int(image["width"]), int(image["height"])
        tags = frozenset(str(a["name"]) for a in annotations if "tag" in a)
        lungs = tuple(points for a in annotations if a["name"] == LUNG for points in _polygons(a))
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise DataError(f"{path}: not a Darwin annotation ({error!r})") from error
    if width < 1 or height < 1:
        raise DataError(f"{path}: the annotated image has no size")
    folder = str((content.get("item") or content["image"]).get("path") or "").strip("/")
    return DarwinAnnotation(path, width, height, names, tags, lungs, folder)


def _image_entry(content: dict[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The part that holds width and height, and the image's file names."""
    if "item" in content:
        slot = content["item"]["slots"][0]
        files = slot.get("source_files") or []
        names = [content["item"].get("name"), *(f.get("file_name") for f in files)]
        return slot, tuple(str(name) for name in names if name)
    image = content["image"]
    found = (image.get("filename"), image.get("original_filename"))
    return image, tuple(str(name) for name in found if name)


def _polygons(annotation: dict[str, Any]) -> list[NDArray[np.float64]]:
    polygon = annotation.get("polygon") or annotation.get("complex_polygon")
    if not polygon:
        return []
    paths = polygon.get("paths") or polygon["path"]
    if paths and isinstance(paths[0], dict):
        paths = [paths]
    return [
        np.array([[point["x"], point["y"]] for point in path], np.float64)
        for path in paths
        if len(path) >= 3
    ]
