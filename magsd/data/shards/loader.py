"""Batches out of tar shards, read as a stream: no more images are held than two buffers."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray

from magsd.data.augment import AugmentConfig, Part
from magsd.data.cache import ImageCache
from magsd.data.loader import Batch, Loader, shard_bounds
from magsd.data.record import Record
from magsd.data.shards.index import ShardIndex
from magsd.data.shards.plan import TOGETHER, Plan, make_plan
from magsd.data.shards.reader import ShardReader
from magsd.errors import DataError

_Sample = tuple[NDArray[np.uint8], int, int]  # pixels, label, number in the index


class ShardLoader(Loader):
    """Batches of a shard index's images, decoded, resized and equalized as they are read.

    In each epoch the shards stand in a row in an order of its own. A process reads its stretch of
    the row, eight shards at a time, into a buffer; when full, this is shuffled and emitted while
    the next is read. So each image is seen once an epoch, by one process, and all processes take
    the same number of steps. A batch's `indices` number the images in the index's order. buffer:
    images that it holds. The rest as in `Loader`.
    """

    def __init__(
        self,
        index: ShardIndex,
        *,
        image_size: int,
        clahe: tuple[float, int] | None,
        buffer: int,
        batch_size: int,
        shuffle: bool,
        seed: int,
        augment: AugmentConfig | None,
        device: torch.device | str,
        channels: int = 1,
        drop_last: bool = False,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        if buffer < 1:
            raise DataError(f"the shuffle buffer must hold at least 1 image, not {buffer}")
        super().__init__(
            len(index),
            index.classes,
            batch_size=batch_size,
            shuffle=shuffle,
            seed=seed,
            augment=augment,
            device=device,
            channels=channels,
            drop_last=drop_last,
            rank=rank,
            ranks=ranks,
        )
        self.index = index
        self.image_size = image_size
        self.clahe = clahe
        self.buffer = buffer
        self._starts = np.cumsum([0, *(shard.samples for shard in index.shards)])

    def class_counts(self) -> list[int]:
        """Images of each class, from the index."""
        counts = [shard.counts for shard in self.index.shards]
        if any(count is None for count in counts):
            raise DataError(
                f"{self.index.spec}: the index does not count each shard's images of each class,"
                " which loss.class_weights=balanced needs"
            )
        return [int(sum(column)) for column in zip(*(c for c in counts if c), strict=True)]

    def describe(self, positions: Sequence[int]) -> list[str]:
        """Shard and number of the images."""
        shards = np.searchsorted(self._starts, positions, "right") - 1
        return [
            f"{self.index.shards[shard].url} image {place - self._starts[shard]}"
            for shard, place in zip(shards, positions, strict=True)
        ]

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """The batches of one epoch, from `start_step` on; shards of earlier steps stay closed."""
        plan = self._plan(epoch)
        skip = sum(self._width(step, self.rank) for step in range(start_step))
        samples = self._stream(plan, skip)
        try:
            for step in range(start_step, len(self)):
                own = list(islice(samples, self._width(step, self.rank)))
                if own:  # the last batch may have fewer images than there are processes
                    yield self._batch(own, epoch, step)
        finally:
            samples.close()

    def first(self, limit: int) -> ImageCache:
        """Up to `limit` of the first epoch's first images, held in memory."""
        samples = self._stream(self._plan(0), 0)
        chosen = list(islice(samples, limit))
        samples.close()
        names = self.describe([number for _, _, number in chosen])
        records = tuple(
            Record(name, self.classes[label], name)
            for name, (_, label, _) in zip(names, chosen, strict=True)
        )
        pixels = np.stack([pixels for pixels, _, _ in chosen])
        return ImageCache(pixels, None, np.zeros(len(chosen), bool), records, [])

    def _plan(self, epoch: int) -> Plan:
        begin = sum(self._share(rank) for rank in range(self.rank))
        return make_plan(
            [shard.samples for shard in self.index.shards],
            begin,
            begin + self._share(self.rank),
            seed=self.seed,
            epoch=epoch,
            rank=self.rank,
            buffer=self.buffer,
            shuffle=self.shuffle,
        )

    def _size(self, step: int) -> int:
        """Images of a step, all processes together."""
        return min(self.batch_size, self.count - step * self.batch_size)

    def _width(self, step: int, rank: int) -> int:
        """Images of a step that a process brings."""
        first, last = shard_bounds(self._size(step), rank, self.ranks)
        return last - first

    def _share(self, rank: int) -> int:
        """Images of an epoch that a process brings; all steps but the last are alike."""
        steps = len(self)
        return (steps - 1) * self._width(0, rank) + self._width(steps - 1, rank) if steps else 0

    def _batch(self, samples: list[_Sample], epoch: int, step: int) -> Batch:
        pixels = torch.from_numpy(np.stack([sample[0] for sample in samples]))
        host_labels = torch.tensor([sample[1] for sample in samples])
        pixels, labels = (self._send(self._pin(values)) for values in (pixels, host_labels))
        numbers = [sample[2] for sample in samples]
        size = self._size(step)
        part = Part(shard_bounds(size, self.rank, self.ranks)[0], size)
        images = self._prepare(pixels, epoch, step, part)
        return Batch(images, labels, numbers, numbers, part, host_labels)

    def _stream(self, plan: Plan, skip: int) -> Generator[_Sample, None, None]:
        """The plan's images after the first `skip`, one block read while the last is emitted."""
        readers = [self._reader(*piece) for piece in plan.pieces]
        try:
            with ThreadPoolExecutor(1) as ahead, ThreadPoolExecutor(TOGETHER) as pool:
                last: tuple[NDArray[np.int64], Future[dict[int, _Sample]]] | None = None
                try:
                    for positions in plan.blocks(skip):
                        coming = ahead.submit(self._read, plan, readers, positions, pool)
                        if last is not None:
                            yield from _emit(*last)
                        last = positions, coming
                    if last is not None:
                        yield from _emit(*last)
                finally:
                    for reader in readers:
                        reader.stop()
        finally:
            for reader in readers:
                reader.close()

    def _reader(self, shard: int, end: int) -> ShardReader:
        form = (self.image_size, self.channels, self.clahe)
        return ShardReader(self.index.shards[shard], end, self.classes, *form)

    def _read(
        self,
        plan: Plan,
        readers: Sequence[ShardReader],
        positions: NDArray[np.int64],
        pool: ThreadPoolExecutor,
    ) -> dict[int, _Sample]:
        """The images at some positions, by place; each shard is read by one thread."""
        arrived = np.sort(positions)
        owners = plan.piece[arrived]
        parts = [arrived[owners == piece] for piece in np.unique(owners)]

        def take(part: NDArray[np.int64]) -> list[tuple[int, _Sample]]:
            piece = plan.piece[part[0]]
            numbers = plan.sample[part].tolist()
            taken = readers[piece].take(numbers)
            start = int(self._starts[plan.pieces[piece][0]])
            return [
                (int(place), (pixels, label, start + number))
                for place, number, (pixels, label) in zip(part, numbers, taken)  # noqa: B905 (stopped)
            ]

        return {place: sample for found in pool.map(take, parts) for place, sample in found}


def _emit(
    positions: NDArray[np.int64], coming: Future[dict[int, _Sample]]
) -> Generator[_Sample, None, None]:
    """The images of a block in its order; each is let go when it is emitted."""
    arrived = coming.result()
    for place in positions.tolist():
        yield arrived.pop(place)
