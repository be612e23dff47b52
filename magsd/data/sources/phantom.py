"""`phantom`: radiograph-like images drawn from a seed."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from magsd.data.phantom import CLASSES, VERSION, draw_phantom
from magsd.data.record import Record
from magsd.data.sources.base import Source
from magsd.errors import DataError

_DEFAULTS = {"n": 480, "seed": 0, "size": 224}
# Images come in blocks of two patients of one class, who have one and two images.
_BLOCK = 3


class PhantomSource(Source):
    """n drawn images of the four classes, each with the mask of its lesion.

    options: ``key=value,...`` with n (images), seed and size (pixels a side). An image depends
    on seed, number and size alone.
    """

    def __init__(
        self,
        options: str = "",
        *,
        classes: Sequence[str] | None = None,
        limit: int | None = None,
    ) -> None:
        values = _parse(options)
        self.count, self.seed, self.size = values["n"], values["seed"], values["size"]
        self.spec = f"phantom:n={self.count},seed={self.seed},size={self.size}"
        # An image's mask is mostly asked for right after the image, perhaps by many threads.
        self._drawn = lru_cache(maxsize=64)(self._draw)
        records = [self._record(number) for number in range(self.count)]
        self._number = {record.key: number for number, record in enumerate(records)}
        names = classes if classes is not None else tuple(sorted(CLASSES))
        self._set_records(records, origin=self.spec, classes=names, limit=limit)

    def _record(self, number: int) -> Record:
        block, place = divmod(number, _BLOCK)
        patient = 2 * block + min(place, 1)
        label = CLASSES[block % len(CLASSES)]
        return Record(
            key=f"phantom/{self.seed}/{number:06d}",
            label=label,
            patient=f"phantom-{self.seed}-{patient:06d}",
            mask_kind=None if label == "normal" else "lesion",
        )

    def _draw(self, number: int) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        record = self._record(number)
        patient = int(record.patient.rpartition("-")[2])
        image, mask = draw_phantom(
            record.label, size=self.size, seed=self.seed, patient=patient, number=number
        )
        image.flags.writeable = mask.flags.writeable = False  # they are shared by callers
        return image, mask

    def read_image(self, record: Record) -> NDArray[np.uint8]:
        """(size, size) uint8, read-only."""
        return self._drawn(self._number[record.key])[0]

    def read_mask(self, record: Record) -> NDArray[np.bool_] | None:
        """(size, size) bool of the lesion, read-only; None for a normal image."""
        return None if record.mask_kind is None else self._drawn(self._number[record.key])[1]

    def fingerprint(self, record: Record) -> str:
        """Version of the drawing, and size; seed and number stand in the key."""
        return f"phantom-{VERSION}-{self.size}"


def _parse(options: str) -> dict[str, int]:
    values = dict(_DEFAULTS)
    for option in filter(None, (part.strip() for part in options.split(","))):
        name, _, text = option.partition("=")
        if name not in values:
            raise DataError(f"phantom option {name!r} is not known; use {', '.join(_DEFAULTS)}")
        try:
            values[name] = int(text)
        except ValueError:
            raise DataError(f"phantom option {name} must be a whole number: {text!r}") from None
    if values["n"] < 1 or values["size"] < 32 or values["seed"] < 0:
        raise DataError("phantom needs n >= 1, size >= 32 and seed >= 0")
    return values
