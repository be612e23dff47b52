"""The images of a run: in a cache, divided into two sides, or streamed from shards."""

from __future__ import annotations

import csv
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from magsd.config import Config
from magsd.console import listed, say
from magsd.data import (
    BatchLoader,
    ImageCache,
    Loader,
    Record,
    Source,
    Split,
    choose_split,
    load_cache,
    open_source,
    read_split,
    shard_bounds,
    split_of_rest,
    write_split,
)
from magsd.data.shards import ShardIndex, ShardLoader, is_shards, open_shards
from magsd.data.sources.base import check_labels, rename_labels
from magsd.distributed import ALONE, Team
from magsd.errors import ConfigError, DataError
from magsd.models import Preprocessing
from magsd.paths import expand
from magsd.runtime import choose_device


class RunData(ABC):
    """Images of a run, to train and to validate on."""

    classes: tuple[str, ...]

    @abstractmethod
    def loaders(self, config: Config, team: Team) -> tuple[Loader, Loader]:
        """Training batches and validation images; of each, the part of this process."""

    @abstractmethod
    def validation_loader(self, config: Config) -> tuple[Loader, ImageCache | None]:
        """All validation images in order, and the cache that holds their masks, if there is one."""

    @abstractmethod
    def overlay_images(self, config: Config) -> tuple[ImageCache, list[int]]:
        """A cache, and the validation images in it from which overlays are chosen."""

    @abstractmethod
    def write_split(self, path: Path) -> None:
        """Keep which image is on which side, where that is not given from without."""

    @abstractmethod
    def counts(self) -> tuple[int, int]:
        """Training and validation images."""


@dataclass(frozen=True)
class CachedData(RunData):
    """Images in a cache, and the side of the split of each."""

    classes: tuple[str, ...]
    cache: ImageCache
    split: Split

    def loaders(self, config: Config, team: Team) -> tuple[Loader, Loader]:
        """Loaders of the two sides; see `RunData`."""
        validation = self.split.validation
        own = shard_bounds(len(validation), team.rank, team.size)
        return (
            training_loader(config, self.cache, self.split.train, self.classes, team),
            plain_loader(config, self.cache, validation[slice(*own)], self.classes),
        )

    def validation_loader(self, config: Config) -> tuple[Loader, ImageCache | None]:
        """The validation side; see `RunData`."""
        loader = plain_loader(config, self.cache, self.split.validation, self.classes)
        return loader, self.cache

    def overlay_images(self, config: Config) -> tuple[ImageCache, list[int]]:
        """The whole validation side; see `RunData`."""
        return self.cache, self.split.validation

    def write_split(self, path: Path) -> None:
        """Write split.csv; see `RunData`."""
        write_split(path, self.cache.records, self.split)

    def counts(self) -> tuple[int, int]:
        """Images of the two sides; see `RunData`."""
        return len(self.split.train), len(self.split.validation)


@dataclass(frozen=True)
class StreamedData(RunData):
    """Shards to train on, and shards to validate on."""

    classes: tuple[str, ...]
    train: ShardIndex
    validation: ShardIndex

    def loaders(self, config: Config, team: Team) -> tuple[Loader, Loader]:
        """Streams of the two lists of shards; see `RunData`."""
        train = ShardLoader(
            self.train,
            **_image_settings(config),
            **_training_settings(config, len(self.train), team),
            buffer=config.data.shuffle_buffer,
        )
        return train, shard_loader(config, self.validation, team)

    def validation_loader(self, config: Config) -> tuple[Loader, ImageCache | None]:
        """The validation shards; see `RunData`. Shards hold no masks."""
        return shard_loader(config, self.validation), None

    def overlay_images(self, config: Config) -> tuple[ImageCache, list[int]]:
        """The first images of the validation shards; see `RunData`."""
        loader = shard_loader(config, self.validation)
        cache = loader.first(max(1, config.train.overlays))
        return cache, list(range(len(cache)))

    def write_split(self, path: Path) -> None:
        """Write the shards of the two sides, by which a resumed run knows them; see `RunData`."""
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([["key", "images", "split"], *self._rows()])

    def check_split(self, path: Path) -> None:
        """Raise DataError where `write_split` wrote other shards; folders may differ."""
        with path.open(newline="", encoding="utf-8") as file:
            stored = list(csv.reader(file))[1:]
        if stored != self._rows():
            raise DataError(
                f"{path}: the run was trained on other shards, or in another order, than"
                f" {self.train.spec} and {self.validation.spec}; a run resumes with the same"
            )

    def _rows(self) -> list[list[str]]:
        sides = {"train": self.train, "validation": self.validation}
        return [
            [shard.url.rpartition("/")[2], str(shard.samples), side]
            for side, index in sides.items()
            for shard in index.shards
        ]

    def counts(self) -> tuple[int, int]:
        """Images of the two lists of shards; see `RunData`."""
        return len(self.train), len(self.validation)


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
    return classes or tuple(source.classes), _cache(config, source, config.data.skip_bad)


def open_validation(
    config: Config, spec: str, split: Path, classes: tuple[str, ...]
) -> tuple[ImageCache, list[int]]:
    """The cached images of a run's own source, and which of them its split validates on.

    The source may have changed since: what is not listed is left out, and what is listed but gone
    or not readable now is lacking, each with a warning that counts it. Raises DataError where
    nothing is left.
    """
    cache = _cache(config, open_source(spec, skip_bad=True), skip_bad=True)
    indices = read_split(split, cache.records, complete=False).validation
    if not indices:
        bad = f"; {len(cache.bad)} others cannot be read" if cache.bad else ""
        raise DataError(f"{spec}: none of the validation images of {split} is there{bad}")
    check_labels([cache.records[index] for index in indices], classes, spec)
    return cache, indices


def _cache(
    config: Config,
    source: Source,
    skip_bad: bool,
    progress: Callable[[int, int], None] | None = None,
) -> ImageCache:
    return load_cache(
        source,
        image_size=config.data.image_size,
        channels=config.model.in_channels,
        clahe=preprocessing_of(config).clahe,
        cache_dir=config.data.cache_dir,
        skip_bad=skip_bad,
        progress=progress,
    )


def same_source(first: str, second: str) -> bool:
    """True if two specs name the same images, however their paths are written."""
    (kind, _, place), (other_kind, _, other_place) = first.partition(":"), second.partition(":")
    if kind != other_kind or kind == "phantom":
        return first == second
    return expand(place).resolve() == expand(other_place).resolve()


def trained_on(split: Path) -> set[str]:
    """Keys of the training images in a run's split.csv; of shards, the files' names."""
    if not split.is_file():
        return set()
    with open(split, newline="", encoding="utf-8", errors="replace") as file:
        rows = list(csv.DictReader(file))
    return {row["key"] for row in rows if "key" in row and row.get("split") == "train"}


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


def prepare_data(
    config: Config,
    stored_split: Path | None,
    payload: dict[str, Any] | None,
    console: Console,
    team: Team,
) -> RunData:
    """Images of a run, and their sides: the stored split, where there is one; the leader's.

    Raises `DataError` where this process sees other images than the leader, `ConfigError` for a
    source whose settings do not fit.
    """
    _check_settings(config)
    classes = tuple(payload["classes"]) if payload is not None else None
    streams = is_shards(config.data.source)
    data = (
        _open_streams(config, stored_split, classes, team)
        if streams
        else _open_cached(config, stored_split, classes, console, team)
    )
    train, validation = data.counts()
    say(
        console,
        f"{config.data.source}: {train} training and {validation} validation "
        f"images of {len(data.classes)} classes ({listed(data.classes)})",
    )
    if isinstance(data, CachedData) and data.cache.bad:
        bad = data.cache.bad
        keys = ", ".join(key for key, _ in bad[:10])
        say(console, keys, first=f"left out {len(bad)} images that cannot be read:")
    return data


def _check_settings(config: Config) -> None:
    source, validation = config.data.source, config.data.validation
    if is_shards(source) != (validation is not None and is_shards(validation)):
        raise ConfigError(
            f"data.source={source}, data.validation={validation}: shards to train on need shards "
            "to validate on, as data.source=shards:train-{000..009}.tar "
            "data.validation=shards:val-{000..001}.tar; another source has no data.validation"
        )
    if is_shards(source) and config.data.skip_bad:
        raise ConfigError(
            "data.skip_bad=true: images in shards are read while training, too late to leave any "
            "out; leave them out when the shards are written"
        )


def _open_streams(
    config: Config, stored_split: Path | None, classes: tuple[str, ...] | None, team: Team
) -> StreamedData:
    train = open_shards(config.data.source, classes=classes)
    validation = open_shards(str(config.data.validation), classes=train.classes)
    both = {shard.url for shard in train.shards} & {shard.url for shard in validation.shards}
    if both:
        raise DataError(f"{min(both)} is both trained and validated on")
    _compare(config.data.source, train.digest() + validation.digest(), team)
    data = StreamedData(train.classes, train, validation)
    if team.is_main and stored_split is not None and stored_split.is_file():
        data.check_split(stored_split)
    return data


def _compare(source: str, digest: str, team: Team) -> None:
    """Raise DataError where this process sees other images than the leader."""
    if team.broadcast(digest) != digest:
        raise DataError(f"{source} holds other images or labels here than elsewhere")


def _open_cached(
    config: Config,
    stored_split: Path | None,
    classes: tuple[str, ...] | None,
    console: Console,
    team: Team,
) -> CachedData:
    spec = config.data.source
    with console.status(Text(f"preparing images of {spec}")) as status:
        source = open_source(spec, skip_bad=config.data.skip_bad)
        cache = _cache(
            config,
            source,
            config.data.skip_bad,
            lambda n, total: status.update(f"preparing images: {n}/{total}"),
        )
    _compare(spec, _digest(cache), team)
    if not team.is_main:
        split = Split([], [])
    elif stored_split is not None and stored_split.is_file():
        split = read_split(stored_split, cache.records)
        used = [cache.records[i] for i in (*split.train, *split.validation)]
        check_labels(used, classes, spec)
    else:
        whole = split_of(config, source.records)
        split = split_of_rest(source.records, whole, cache.records)
    return CachedData(classes or tuple(source.classes), cache, team.broadcast(split))


def split_of(config: Config, records: Sequence[Record]) -> Split:
    """The two sides into which a run divides a source, its unreadable images among them.

    Raises `DataError` as `choose_split`.
    """
    data = config.data
    return choose_split(
        records, how=data.split, folds=data.folds, fold=data.fold, seed=data.split_seed
    )


def _digest(cache: ImageCache) -> str:
    """The same for the same keys and labels in the same order."""
    text = repr([(record.key, record.label) for record in cache.records])
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
