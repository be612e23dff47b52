"""One image of a data set, as every source yields it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

MaskKind = Literal["lesion", "lungs", "object"]
Side = Literal["train", "validation"]


@dataclass(frozen=True)
class Record:
    """One labeled image.

    key: unique within the source and stable across machines (a relative POSIX path, or
        ``phantom/<seed>/<number>``).
    label: class name.
    patient: group that must stay on one side of a split.
    path: the image file; None where the image is drawn.
    mask_kind: what the image's mask shows, None where it has no mask.
    split: the side of the published split, whose test images are validated on; None without one.
    """

    key: str
    label: str
    patient: str
    path: Path | None = None
    mask_kind: MaskKind | None = None
    split: Side | None = None
