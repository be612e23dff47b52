"""One image of a data set, as every source yields it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

MaskKind = Literal["lesion", "lungs", "object"]
Side = Literal["train", "validation", "test"]
SIDES: tuple[Side, ...] = ("train", "validation", "test")
#: Names, in lower case, by which tables and folders call the sides.
SIDE_NAMES: dict[str, Side] = {
    **dict.fromkeys(("train", "training", "trainval"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev", "eval", "evaluation"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}


class Cells(Mapping[str, str]):
    """The cells of a table's row by column; all rows share the names, for a row's memory."""

    __slots__ = ("_cells", "_names")

    def __init__(self, names: tuple[str, ...] = (), cells: tuple[str, ...] = ()) -> None:
        self._names, self._cells = names, cells

    def __getitem__(self, name: str) -> str:
        try:
            return self._cells[self._names.index(name)]
        except ValueError:
            raise KeyError(name) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __hash__(self) -> int:
        return hash((self._names, self._cells))

    def __repr__(self) -> str:
        return f"Cells({dict(self)})"


NO_CELLS = Cells()


@dataclass(frozen=True)
class Record:
    """One labeled image.

    key: unique within the source and stable across machines (a relative POSIX path, or
        ``phantom/<seed>/<number>``).
    label: class name.
    patient: group that must stay on one side of a split.
    path: the image file; None where the image is drawn.
    mask_kind: what the image's mask shows, None where it has no mask.
    split: the side of the published split; None without one.
    extra: further columns of the user's table by name, such as age and sex. They go into
        predictions and nowhere else, so that they count neither in comparisons nor in hashes.
    """

    key: str
    label: str
    patient: str
    path: Path | None = None
    mask_kind: MaskKind | None = None
    split: Side | None = None
    extra: Cells = field(default=NO_CELLS, compare=False, repr=False)
