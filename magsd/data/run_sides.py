"""The images that a run is measured on once it is trained: its own by side, or others."""

from __future__ import annotations

import csv
from pathlib import Path

from magsd.config import Config
from magsd.data import ImageCache, open_source, read_split
from magsd.data.record import Side
from magsd.data.run_data import cache_of
from magsd.data.sources.base import check_labels
from magsd.errors import DataError
from magsd.paths import expand


def meant_images(config: Config, split: Path, data: str | None) -> tuple[str, Side | None]:
    """The source that `data` means for a run, and the side of the run that it is, if any.

    split: the run's split.csv. Without `data`, and for the run's own source, that is the test side,
    or the validation side of a run without one.
    """
    apart = config.data.test if config.data.test not in ("folds", "none") else None
    chosen_by = config.data.validation or config.data.source
    tested = "test" in sides_of(split).values()
    if tested and (data is None or (apart is not None and same_source(data, apart))):
        return data or apart or chosen_by, "test"
    if data is None or same_source(data, chosen_by):
        return data or chosen_by, "test" if tested and apart is None else "validation"
    return data, None


def open_side(
    config: Config, spec: str, split: Path, classes: tuple[str, ...], side: Side
) -> tuple[ImageCache, list[int]]:
    """The cached images of a run's own source, and which of them stand on a side of its split.

    spec: the source, as `meant_images` names it. It may have changed since: what is not listed is
    left out, and what is listed but gone or not readable now is lacking, each with a warning that
    counts it. Raises DataError where nothing is left.
    """
    cache = cache_of(config, open_source(spec, skip_bad=True), skip_bad=True)
    other = side == "test" and config.data.test not in ("folds", "none")
    indices: list[int] = getattr(
        read_split(split, cache.records, complete=False, other=other), side
    )
    if not indices:
        bad = f"; {len(cache.bad)} others cannot be read" if cache.bad else ""
        raise DataError(f"{spec}: none of the {side} images of {split} is there{bad}")
    check_labels([cache.records[index] for index in indices], classes, spec)
    return cache, indices


def same_source(first: str, second: str) -> bool:
    """True if two specs name the same images, however their paths are written."""
    (kind, _, place), (other_kind, _, other_place) = first.partition(":"), second.partition(":")
    if kind != other_kind or kind == "phantom":
        return first == second
    return expand(place).resolve() == expand(other_place).resolve()


def developed_on(split: Path) -> set[str]:
    """Keys of the training and validation images in a run's split.csv; of shards, their names."""
    return {key for key, side in sides_of(split).items() if side in ("train", "validation")}


def sides_of(split: Path) -> dict[str, str]:
    """Key -> side, as a run's split.csv says, whatever else is in it; of shards, by their names.

    Empty where there is no such file.
    """
    if not split.is_file():
        return {}
    with open(split, newline="", encoding="utf-8", errors="replace") as file:
        rows = list(csv.DictReader(file))
    return {row["key"]: row["split"] for row in rows if row.get("key") and row.get("split")}
