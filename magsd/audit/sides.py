"""On which side of a split each image stands."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from magsd.data.record import SIDES, Record
from magsd.errors import DataError

if TYPE_CHECKING:
    from magsd.config import Config


@dataclasses.dataclass(frozen=True)
class Sides:
    """Side of the split by the key of an image, and in words where that is known from.

    Images that are not in `of` stand on no side.
    """

    of: dict[str, str]
    origin: str

    def names(self) -> list[str]:
        """The sides, training first."""
        found = set(self.of.values())
        return [*(side for side in SIDES if side in found), *sorted(found.difference(SIDES))]


def read_sides(path: Path) -> Sides:
    """The sides in a CSV with the columns key and split, such as a run's split.csv.

    Raises DataError where it is no such file, or names two sides of one image.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read ({error})") from error
    if not rows or not {"key", "split"} <= set(rows[0]):
        raise DataError(f"{path}: no split file; the columns key and split are expected")
    of: dict[str, str] = {}
    for line, row in enumerate(rows, 2):
        key, side = row["key"], (row["split"] or "").strip()
        if of.setdefault(key, side) != side:
            raise DataError(f"{path}, line {line}: {key} stands on two sides, {of[key]} and {side}")
    return Sides({key: side for key, side in of.items() if side}, f"as {path} says")


def default_sides(records: Sequence[Record], config: Config) -> Sides:
    """The sides that `magsd train` would choose by this configuration; none where it cannot."""
    from magsd.data.prepare import split_of  # which needs torch

    published = any(record.split for record in records) and config.data.split != "folds"
    try:
        split = split_of(config, records)
    except DataError as error:
        if published:
            of = {record.key: str(record.split) for record in records if record.split}
            return Sides(of, f"as published; magsd train would refuse it: {error}")
        return Sides({}, f"none: {error}")
    of = {records[position].key: side for side in SIDES for position in getattr(split, side)}
    return Sides(of, "as published" if published else "as magsd train would divide them")
