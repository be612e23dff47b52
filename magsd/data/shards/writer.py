"""Tar shards of any source's images."""

from __future__ import annotations

import json
import logging
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from magsd.data.dicom import is_dicom
from magsd.data.images import IMAGE_SUFFIXES, decode_image
from magsd.data.record import Record
from magsd.data.shards.index import INDEX, webdataset
from magsd.data.sources.base import FileSource, Source
from magsd.data.splits import Split
from magsd.errors import DataError
from magsd.outputs import write_atomically

_AHEAD = 16  # images read while others are written
_NAMED_BAD = 10
_log = logging.getLogger(__name__)


def write_shards(
    source: Source,
    out: str | os.PathLike[str],
    *,
    split: Split | None = None,
    shard_size: int = 1000,
    seed: int = 0,
    skip_bad: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> list[Path]:
    """Write a source's images as tar shards with index.json, and return the shards' paths.

    split: positions in `source.records` for train-NNNNNN.tar, val-NNNNNN.tar and test-NNNNNN.tar
    (see `choose_split`); None writes all to train-NNNNNN.tar. shard_size: most images of a shard.
    Files go in as they are, other images as PNG, each with ``.cls`` (the place of its class) and
    ``.json`` (label, key, patient); masks are left out. Images are dealt to shards by `seed`, so
    that each holds all classes. skip_bad: leave images out that cannot be read, with a warning that
    counts them, rather than raise. progress: called with images done and images in all.

    Raises DataError where `out` holds shards already, or naming images that cannot be read; what
    was written is removed then.
    """
    if shard_size < 1:
        raise DataError(f"shard_size must be at least 1, not {shard_size}")
    folder = Path(out)
    present = [*sorted(folder.glob("*.tar")), *folder.glob(INDEX)]
    if present:
        raise DataError(f"{folder}: holds {present[0].name} already; choose another folder")
    everything = split or Split(list(range(len(source))), [])
    parts = {"train": everything.train, "val": everything.validation, "test": everything.test}
    job = _Job(source, folder, shard_size, skip_bad, progress, sum(map(len, parts.values())))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        for number, (name, positions) in enumerate(parts.items()):
            order = np.random.default_rng([seed, number]).permutation(positions).astype(int)
            job.write_part(name, [source.records[position] for position in order])
        job.finish()
    except BaseException:
        for path in job.written:
            path.unlink(missing_ok=True)
        raise
    return job.written


class _Job:
    """Shards written so far, with what the index says of them."""

    def __init__(
        self,
        source: Source,
        folder: Path,
        shard_size: int,
        skip_bad: bool,
        progress: Callable[[int, int], None] | None,
        total: int,
    ) -> None:
        self.source = source
        self.folder = folder
        self.shard_size = shard_size
        self.skip_bad = skip_bad
        self.progress = progress
        self.total = total
        self.done = 0
        self.bad: list[str] = []
        self.written: list[Path] = []
        self.entries: dict[str, dict[str, object]] = {}

    def write_part(self, name: str, records: Sequence[Record]) -> None:
        """Write name-000000.tar and so on."""
        numbers = {label: place for place, label in enumerate(self.source.classes)}
        samples = self._samples(records)
        sample = next(samples, None)
        for shard in range(len(records)):
            if sample is None:
                break
            path = self.folder / f"{name}-{shard:06d}.tar"
            self.written.append(path)
            counts = [0] * len(numbers)
            with path.open("wb") as file, webdataset().TarWriter(file) as sink:
                while sample is not None and sum(counts) < self.shard_size:
                    record, suffix, data = sample
                    number = numbers[record.label]
                    about = {"label": record.label, "key": record.key, "patient": record.patient}
                    key = f"{name}{shard:06d}{sum(counts):06d}"
                    sink.write({"__key__": key, suffix: data, "cls": number, "json": about})
                    counts[number] += 1
                    sample = next(samples, None)
            self.entries[path.name] = {"samples": sum(counts), "counts": counts}

    def finish(self) -> None:
        """Write the index, once all shards are there; DataError where images were not readable."""
        if self.bad and (not self.skip_bad or not self.written):
            lines = [f"{len(self.bad)} of {self.total} images cannot be read:"]
            lines += [f"  {reason}" for reason in self.bad[:_NAMED_BAD]]
            raise DataError("\n".join([*lines, "Repair or remove them, or leave them out."]))
        if self.bad:
            _log.warning(
                "%d of %d images cannot be read and are left out, the first %s",
                len(self.bad), self.total, self.bad[0],
            )  # fmt: skip
        content = {"classes": list(self.source.classes), "shards": self.entries}
        text = json.dumps(content, indent=1) + "\n"
        write_atomically(self.folder / INDEX, lambda file: file.write(text.encode()))

    def _samples(self, records: Sequence[Record]) -> Iterator[tuple[Record, str, bytes]]:
        """Record, suffix without its dot, and bytes of every readable image, in order."""
        waiting: deque[tuple[Record, Future[tuple[str, bytes]]]] = deque()
        rest = iter(records)
        with ThreadPoolExecutor() as pool:
            while True:
                while len(waiting) < _AHEAD and (record := next(rest, None)) is not None:
                    waiting.append((record, pool.submit(_encoded, self.source, record)))
                if not waiting:
                    return
                record, coming = waiting.popleft()
                self.done += 1
                try:
                    yield record, *coming.result()
                except DataError as error:
                    self.bad.append(f"{record.key}: {error}")
                if self.progress is not None:
                    self.progress(self.done, self.total)


def _encoded(source: Source, record: Record) -> tuple[str, bytes]:
    """Suffix and bytes of an image, which were found readable."""
    as_it_is = type(source).read_image is FileSource.read_image and isinstance(source, FileSource)
    if not as_it_is or record.path is None:
        return "png", _png(source.read_image(record))
    try:
        data = record.path.read_bytes()
    except OSError as error:
        raise DataError(f"{record.path}: cannot be read ({error.strerror})") from error
    image = decode_image(data, str(record.path))
    suffix = record.path.suffix.lower()
    if suffix in IMAGE_SUFFIXES:
        return suffix.removeprefix("."), data
    # Of what a table may list beyond these (BMP, TIFF), readers of shards know no suffix.
    return ("dcm", data) if is_dicom(data) else ("png", _png(image))


def _png(image: NDArray[np.uint8]) -> bytes:
    """A gray or RGB image as the content of a PNG file."""
    if image.ndim == 3:
        return cv2.imencode(".png", cv2.cvtColor(image, cv2.COLOR_RGB2BGR))[1].tobytes()
    return cv2.imencode(".png", image)[1].tobytes()
