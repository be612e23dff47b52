"""Opening a run's images before training, and dividing them into sides."""

from __future__ import annotations

import hashlib
import logging
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from magsd.config import Config
from magsd.console import listed, say
from magsd.data import (
    ImageCache,
    Record,
    Source,
    Split,
    choose_split,
    open_source,
    read_split,
    split_of_rest,
)
from magsd.data.run_data import CachedData, RunData, StreamedData, cache_of
from magsd.data.shards import is_shards, open_shards
from magsd.data.sources.base import check_labels
from magsd.distributed import Team
from magsd.errors import ConfigError, DataError
from magsd.paths import file_identity

_log = logging.getLogger(__name__)
_ADJECTIVES = {"train": "training", "validation": "validation", "test": "test"}
_WITHOUT_FOLDS = {
    False: "the set publishes no test images (data.split=folds divides it by patient)",
    True: "shards are not divided into folds (data.test=shards:PATTERN names test shards)",
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
    counts = [f"{count} {_ADJECTIVES[side]}" for side, count in data.counts().items()]
    say(
        console,
        f"{config.data.source}: {' and '.join([', '.join(counts[:-1]), counts[-1]])} images of "
        f"{len(data.classes)} classes ({listed(data.classes)})",
    )
    if config.data.test == "folds" and data.reported != "test":
        say(console, f"no test side: {_WITHOUT_FOLDS[streams]}; results are of the validation side")
    if isinstance(data, CachedData):
        caches = [data.cache, *([data.test[1]] if data.test else [])]
        bad = [key for cache in caches for key, _ in cache.bad]
        if bad:
            keys = ", ".join(bad[:10])
            say(console, keys, first=f"left out {len(bad)} images that cannot be read:")
    return data


def _check_settings(config: Config) -> None:
    source, validation, test = config.data.source, config.data.validation, config.data.test
    if is_shards(source) != (validation is not None and is_shards(validation)):
        raise ConfigError(
            f"data.source={source}, data.validation={validation}: shards to train on need shards "
            "to validate on, as data.source=shards:train-{000..009}.tar "
            "data.validation=shards:val-{000..001}.tar; another source has no data.validation"
        )
    if test not in ("folds", "none") and is_shards(source) != is_shards(test):
        raise ConfigError(
            f"data.source={source}, data.test={test}: shards are tested on shards alone, and other "
            "sources on others; name such a source, or say data.test=none"
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
    held = [str(config.data.validation)]
    held += [config.data.test] if is_shards(config.data.test) else []
    others = [open_shards(spec, classes=train.classes) for spec in held]
    urls = Counter(shard.url for index in (train, *others) for shard in index.shards)
    if twice := [url for url, count in urls.items() if count > 1]:
        raise DataError(f"{min(twice)} is on two sides; each shard belongs on one of them")
    _compare(config.data.source, "".join(index.digest() for index in (train, *others)), team)
    data = StreamedData(train.classes, train, *others)
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
    test = None
    with console.status(Text(f"preparing images of {spec}")) as status:

        def progress(done: int, total: int) -> None:
            status.update(f"preparing images: {done}/{total}")

        source = open_source(spec, skip_bad=config.data.skip_bad)
        if config.data.test not in ("folds", "none") and team.is_main:
            other = _open_test(config, source, classes)
            test = other.spec, cache_of(config, other, config.data.skip_bad, progress)
        cache = cache_of(config, source, config.data.skip_bad, progress)
    _compare(spec, _digest(cache), team)
    split = Split([], [])
    if team.is_main and stored_split is not None and stored_split.is_file():
        split = read_split(stored_split, cache.records)
        used = [cache.records[i] for i in (*split.train, *split.validation, *split.test)]
        check_labels(used, classes, spec)
        if test is not None:
            held = read_split(stored_split, test[1].records, other=True).test
            split = Split(split.train, split.validation, held)
    elif team.is_main:
        whole = split_of(config, source.records)
        split = split_of_rest(source.records, whole, cache.records)
        if test is not None:
            split = Split(split.train, split.validation, list(range(len(test[1]))))
    return CachedData(classes or tuple(source.classes), cache, team.broadcast(split), test)


def _open_test(config: Config, source: Source, classes: tuple[str, ...] | None) -> Source:
    """The source of the test side, which shares no image with that of the others.

    Raises `DataError` for shared images, and labels that are not among the classes.
    """
    test = open_source(config.data.test, skip_bad=config.data.skip_bad)
    check_labels(test.records, classes or source.classes, config.data.test)
    trained = {_place(record) for record in source.records}
    both = [record.key for record in test.records if _place(record) in trained]
    if both:
        raise DataError(
            f"data.test={config.data.test}: {len(both)} of its images are among those of"
            f" {config.data.source}, too, the first {both[0]}; leave them out of one of the two"
        )
    patients = _named_patients(source) & _named_patients(test)
    if patients:
        _log.warning(
            "data.test=%s: %d patients are among those of %s, too, e.g. %s: the test images are"
            " not independent of the others",
            config.data.test, len(patients), config.data.source, min(patients),
        )  # fmt: skip
    return test


def _place(record: Record) -> object:
    """What two records of the same image have in common."""
    if record.path is None:
        return record.key
    return file_identity(record.path) or os.path.abspath(record.path)


def _named_patients(source: Source) -> set[str]:
    """Patients but for images that are their own, whose names say nothing in another source."""
    return {record.patient for record in source.records if record.patient != record.key}


def split_of(config: Config, records: Sequence[Record]) -> Split:
    """The sides into which a run divides a source, its unreadable images among them.

    Raises `DataError` as `choose_split`.
    """
    data = config.data
    return choose_split(
        records,
        how=data.split,
        folds=data.folds,
        fold=data.fold,
        seed=data.split_seed,
        test=data.test == "folds",
    )


def _digest(cache: ImageCache) -> str:
    """The same for the same keys and labels in the same order."""
    text = repr([(record.key, record.label) for record in cache.records])
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
