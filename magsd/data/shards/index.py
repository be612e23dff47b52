"""What lies next to tar shards: index.json, with the classes and the images of each shard.

``{"classes": ["a", "b"], "shards": {"train-000000.tar": {"samples": 3, "counts": [1, 2]}}}``;
counts, the images of each class, may be absent.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from magsd.errors import DataError

KIND = "shards:"
INDEX = "index.json"


@dataclass(frozen=True)
class Shard:
    """A tar file: its path or URL, the number of its images, and that of each class if known."""

    url: str
    samples: int
    counts: tuple[int, ...] | None = None


@dataclass(frozen=True)
class ShardIndex:
    """The shards that a pattern names, in its order."""

    spec: str
    classes: tuple[str, ...]
    shards: tuple[Shard, ...]

    def __len__(self) -> int:
        """Images in all shards."""
        return sum(shard.samples for shard in self.shards)

    def digest(self) -> str:
        """The same for the same classes and shards in the same order."""
        text = repr((self.classes, [(shard.url, shard.samples) for shard in self.shards]))
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def is_shards(spec: str) -> bool:
    """Whether a source's spec names shards."""
    return spec.startswith(KIND)


def webdataset() -> Any:
    """The library; DataError where it is not installed."""
    try:
        import webdataset as library
    except ImportError:
        raise DataError("shards need webdataset: pip install 'magsd[shards]'") from None
    return library


def open_shards(spec: str, *, classes: Sequence[str] | None = None) -> ShardIndex:
    """The index of ``shards:PATTERN``.

    PATTERN: paths or URLs with WebDataset's braces, as in ``shards:/data/train-{000..099}.tar``;
    index.json lies next to the first. classes: those of a model, which must be the index's. Raises
    DataError where the index or an entry in it is missing or not usable.
    """
    urls = webdataset().shardlists.expand_urls(str(spec).removeprefix(KIND))
    urls = [url if ":" in url else str(Path(url).expanduser()) for url in urls]
    if any(url.startswith("pipe:") for url in urls):
        raise DataError(f"{spec}: commands (pipe:) are not run; name paths or URLs")
    folder, slash, _ = urls[0].rpartition("/")
    where = f"{folder}{slash}{INDEX}"
    content = _read_index(where)
    try:
        names = tuple(str(name) for name in content["classes"])
        shards = tuple(_entry(url, content["shards"], where, len(names)) for url in urls)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{where}: not an index of shards ({error!r}); docs/data.md says what it holds"
        ) from error
    if len(set(urls)) < len(urls):
        raise DataError(f"{spec}: a shard is named more than once")
    if classes is not None and tuple(classes) != names:
        raise DataError(
            f"{where}: its classes are {', '.join(names)}; expected {', '.join(classes)}"
        )
    return ShardIndex(spec, names, shards)


def _entry(url: str, shards: Any, where: str, classes: int) -> Shard:
    name = url.rpartition("/")[2]
    if name not in shards:
        raise DataError(f"{where}: {name} is not in the index; it has {len(shards)} shards")
    entry = shards[name]
    samples, counts = int(entry["samples"]), entry.get("counts")
    if samples < 1:
        raise ValueError(f"{name} has {samples} samples")
    if counts is None:
        return Shard(url, samples)
    counts = tuple(int(count) for count in counts)
    if len(counts) != classes or sum(counts) != samples:
        raise ValueError(f"the counts of {name} are {counts} for {samples} samples")
    return Shard(url, samples, counts)


def _read_index(where: str) -> Any:
    try:
        with webdataset().gopen(where, "rb") as file:
            return json.loads(file.read().decode("utf-8"))
    except FileNotFoundError:
        raise DataError(
            f"{where}: no such file; shards need their index next to them (docs/data.md)"
        ) from None
    except (OSError, ValueError) as error:
        raise DataError(f"{where}: cannot be read, or is no JSON ({error})") from error
