"""The images of a run and their sides: in a cache, or streamed from shards."""

from __future__ import annotations

import csv
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from magsd.config import Config
from magsd.data import (
    BatchLoader,
    ImageCache,
    Loader,
    Source,
    Split,
    load_cache,
    open_source,
    shard_bounds,
    write_split,
)
from magsd.data.record import SIDES, Side
from magsd.data.shards import ShardIndex, ShardLoader
from magsd.data.sources.base import check_labels, rename_labels
from magsd.distributed import ALONE, Team
from magsd.errors import DataError
from magsd.models import Preprocessing
from magsd.runtime import choose_device


class RunData(ABC):
    """Images of a run: to train on, to choose the epoch by, and perhaps to measure it on."""

    classes: tuple[str, ...]

    @property
    def reported(self) -> Side:
        """The side whose results are those of the run: test where there is one."""
        return "test" if "test" in self.counts() else "validation"

    @abstractmethod
    def loaders(self, config: Config, team: Team) -> tuple[Loader, Loader]:
        """Training batches and validation images; of each, the part of this process."""

    @abstractmethod
    def side_loader(self, config: Config, side: Side) -> tuple[Loader, ImageCache | None]:
        """All images of a side in order, and the cache that holds their masks, if there is one."""

    @abstractmethod
    def overlay_images(self, config: Config, side: Side) -> tuple[ImageCache, list[int]]:
        """A cache, and the images of a side in it from which overlays are chosen."""

    @abstractmethod
    def write_split(self, path: Path) -> None:
        """Keep which image is on which side, where that is not given from without."""

    @abstractmethod
    def counts(self) -> dict[Side, int]:
        """Images of every side that there is."""


@dataclass(frozen=True)
class CachedData(RunData):
    """Images in a cache, and the side of the split of each.

    test: another source whose images are the test side, and their cache, in the process that
    leads; `split.test` are positions there then.
    """

    classes: tuple[str, ...]
    cache: ImageCache
    split: Split
    test: tuple[str, ImageCache] | None = None

    def loaders(self, config: Config, team: Team) -> tuple[Loader, Loader]:
        """Loaders of the two sides; see `RunData`."""
        validation = self.split.validation
        own = shard_bounds(len(validation), team.rank, team.size)
        return (
            training_loader(config, self.cache, self.split.train, self.classes, team),
            plain_loader(config, self.cache, validation[slice(*own)], self.classes),
        )

    def side_loader(self, config: Config, side: Side) -> tuple[Loader, ImageCache | None]:
        """The images of a side in its cache; see `RunData`."""
        cache, indices = self.overlay_images(config, side)
        return plain_loader(config, cache, indices, self.classes), cache

    def overlay_images(self, config: Config, side: Side) -> tuple[ImageCache, list[int]]:
        """The whole side; see `RunData`."""
        cache = self.test[1] if side == "test" and self.test is not None else self.cache
        return cache, getattr(self.split, side)

    def write_split(self, path: Path) -> None:
        """Write split.csv; see `RunData`."""
        if self.test is None:
            write_split(path, self.cache.records, self.split)
            return
        spec, cache = self.test
        test = spec, [cache.records[i] for i in self.split.test]
        own = Split(self.split.train, self.split.validation)
        write_split(path, self.cache.records, own, test=test)

    def counts(self) -> dict[Side, int]:
        """Images of the sides; see `RunData`."""
        return {side: n for side in SIDES if (n := len(getattr(self.split, side)))}


@dataclass(frozen=True)
class StreamedData(RunData):
    """Shards to train on, to validate on, and perhaps to test on."""

    classes: tuple[str, ...]
    train: ShardIndex
    validation: ShardIndex
    test: ShardIndex | None = None

    def loaders(self, config: Config, team: Team) -> tuple[Loader, Loader]:
        """Streams of the two lists of shards; see `RunData`."""
        train = ShardLoader(
            self.train,
            **_image_settings(config),
            **_training_settings(config, len(self.train), team),
            buffer=config.data.shuffle_buffer,
        )
        return train, shard_loader(config, self.validation, team)

    def side_loader(self, config: Config, side: Side) -> tuple[Loader, ImageCache | None]:
        """The shards of a side; see `RunData`. Shards hold no masks."""
        return shard_loader(config, self._sides()[side]), None

    def overlay_images(self, config: Config, side: Side) -> tuple[ImageCache, list[int]]:
        """The first images of a side's shards; see `RunData`."""
        loader = shard_loader(config, self._sides()[side])
        cache = loader.first(max(1, config.train.overlays))
        return cache, list(range(len(cache)))

    def write_split(self, path: Path) -> None:
        """Write the shards of the sides, by which a resumed run knows them; see `RunData`."""
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([["key", "images", "split"], *self._rows()])

    def check_split(self, path: Path) -> None:
        """Raise DataError where `write_split` wrote other shards; folders may differ."""
        with path.open(newline="", encoding="utf-8") as file:
            stored = list(csv.reader(file))[1:]
        if stored != self._rows():
            specs = " and ".join(index.spec for index in self._sides().values())
            raise DataError(
                f"{path}: the run was trained on other shards, or in another order, than"
                f" {specs}; a run resumes with the same"
            )

    def _sides(self) -> dict[Side, ShardIndex]:
        sides: dict[Side, ShardIndex] = {"train": self.train, "validation": self.validation}
        return sides if self.test is None else {**sides, "test": self.test}

    def _rows(self) -> list[list[str]]:
        return [
            [shard.url.rpartition("/")[2], str(shard.samples), side]
            for side, index in self._sides().items()
            for shard in index.shards
        ]

    def counts(self) -> dict[Side, int]:
        """Images of the lists of shards; see `RunData`."""
        return {side: len(index) for side, index in self._sides().items()}


def preprocessing_of(config: Config) -> Preprocessing:
    """What happens to an image before the z-score."""
    data = config.data
    return Preprocessing(
        data.image_size, (data.clahe_clip, data.clahe_tiles) if data.clahe else None
    )


def _image_settings(config: Config) -> dict[str, Any]:
    """Settings of a loader of shards that the cache has applied otherwise."""
    prepared = preprocessing_of(config)
    return {
        "image_size": prepared.image_size,
        "clahe": prepared.clahe,
        "channels": config.model.in_channels,
    }


def open_images(
    config: Config,
    spec: str,
    *,
    classes: tuple[str, ...] | None = None,
    names: Mapping[str, str] | None = None,
) -> tuple[tuple[str, ...], ImageCache]:
    """Class names and cached images of a source, prepared as `config` says.

    names: other names of its labels, empty for images that are left out; see `rename_labels`.
    """
    source = open_source(spec, skip_bad=config.data.skip_bad)
    if names:
        source.records = rename_labels(source.records, names, spec)
    check_labels(source.records, classes, spec)
    return classes or tuple(source.classes), cache_of(config, source, config.data.skip_bad)


def cache_of(
    config: Config,
    source: Source,
    skip_bad: bool,
    progress: Callable[[int, int], None] | None = None,
) -> ImageCache:
    """A source's images, prepared as `config` says; see `load_cache`."""
    return load_cache(
        source,
        image_size=config.data.image_size,
        channels=config.model.in_channels,
        clahe=preprocessing_of(config).clahe,
        cache_dir=config.data.cache_dir,
        skip_bad=skip_bad,
        progress=progress,
    )


def plain_loader(
    config: Config, cache: ImageCache, indices: list[int], classes: tuple[str, ...]
) -> BatchLoader:
    """Batches in order, without augmentation."""
    return BatchLoader(
        cache,
        indices,
        classes,
        batch_size=config.train.eval_batch_size,
        shuffle=False,
        seed=config.train.seed,
        augment=None,
        device=choose_device(config.train.device),
        on_device=config.train.images_on_device,
    )


def shard_loader(config: Config, index: ShardIndex, team: Team = ALONE) -> ShardLoader:
    """Images of shards in order, without augmentation; of each batch, this process's part."""
    return ShardLoader(
        index,
        **_image_settings(config),
        batch_size=config.train.eval_batch_size * team.size,
        shuffle=False,
        seed=config.train.seed,
        augment=None,
        device=choose_device(config.train.device),
        rank=team.rank,
        ranks=team.size,
        buffer=config.train.eval_batch_size,
    )


def training_loader(
    config: Config,
    cache: ImageCache,
    indices: list[int],
    classes: tuple[str, ...],
    team: Team = ALONE,
) -> BatchLoader:
    """Shuffled and augmented batches; of each, this process's part.

    Raises `DataError` where there are fewer images than the processes need.
    """
    return BatchLoader(
        cache,
        indices,
        classes,
        **_training_settings(config, len(indices), team),
        on_device=config.train.images_on_device,
    )


def _training_settings(config: Config, count: int, team: Team) -> dict[str, Any]:
    """Settings of any loader of `count` training images.

    Raises `DataError` where there are fewer images than the processes need.
    """
    size = config.train.batch_size
    fewest = 2 * team.size
    if team.size > 1 and count < fewest:
        raise DataError(
            f"{count} training images for {team.size} processes: expected at least {fewest}"
        )
    return {
        "batch_size": size,
        "shuffle": True,
        "seed": config.train.seed,
        "augment": config.data.augment,
        "device": choose_device(config.train.device),
        # Batch statistics of a single image are no statistics.
        "drop_last": count > size and 0 < count % size < fewest,
        "rank": team.rank,
        "ranks": team.size,
    }
