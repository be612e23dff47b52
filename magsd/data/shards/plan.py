"""Which images of which shards a process reads in an epoch, and in what order.

All of it follows from the numbers of images in the index, so that every process knows its part, and
a resumed run its place, without reading an image.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from magsd.data.random import step_seed

# Read at once, image by image in turn: neighbors in a shard part, and decoding keeps cores busy.
# Part of the order, so that it may not depend on the machine.
TOGETHER = 8


@dataclass(frozen=True)
class Plan:
    """A process's images of one epoch, by place of arrival; `blocks` says in what order they go on.

    pieces: shard, and end within it, of each run of images that follow one another in it. piece
    (N,) int32: which of them an image is in. sample (N,) int64: its number within the shard.
    """

    pieces: tuple[tuple[int, int], ...]
    piece: NDArray[np.int32]
    sample: NDArray[np.int64]
    seed: int
    epoch: int
    rank: int
    buffer: int
    shuffle: bool

    def blocks(self, skip: int) -> Iterator[NDArray[np.int64]]:
        """Places in the order of emission, a buffer at a time; the first `skip` are gone."""
        for number in range(skip // self.buffer, -(-len(self.piece) // self.buffer)):
            first = number * self.buffer
            positions: NDArray[np.int64] = np.arange(
                first, min(first + self.buffer, len(self.piece))
            )
            if self.shuffle:
                stream = f"shuffle {self.rank}"
                random = np.random.default_rng(step_seed(self.seed, self.epoch, number, stream))
                positions = random.permutation(positions)
            yield positions[max(0, skip - first) :]


def make_plan(
    samples: Sequence[int],
    begin: int,
    end: int,
    *,
    seed: int,
    epoch: int,
    rank: int,
    buffer: int,
    shuffle: bool,
) -> Plan:
    """The plan for the images `begin` to `end` of the epoch's row of shards.

    samples: images of each shard. The row is the same for all processes; each takes its stretch of
    it, and cuts at most its first and last shard.
    """
    row = list(range(len(samples)))
    if shuffle:
        random = np.random.default_rng(step_seed(seed, epoch, 0, "shards"))
        row = random.permutation(len(samples)).tolist()
    runs, start = [], 0
    for shard in row:
        count = samples[shard]
        first, last = max(0, begin - start), min(count, end - start)
        if first < last:
            runs.append((shard, first, last))
        start += count
    piece, sample = _take_in_turn(runs)
    pieces = tuple((shard, last) for shard, _, last in runs)
    return Plan(pieces, piece, sample, seed, epoch, rank, buffer, shuffle)


def _take_in_turn(
    runs: Sequence[tuple[int, int, int]],
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Piece and sample of each image, the runs of `TOGETHER` pieces taken in turn."""
    pieces, samples = [np.zeros(0, np.int32)], [np.zeros(0, np.int64)]
    for begin in range(0, len(runs), TOGETHER):
        group = runs[begin : begin + TOGETHER]
        sample = np.concatenate([np.arange(first, last) for _, first, last in group])
        turn = np.concatenate([np.arange(last - first) for _, first, last in group])
        piece = np.repeat(np.arange(len(group)), [last - first for _, first, last in group])
        order = np.lexsort((piece, turn))
        pieces.append((piece[order] + begin).astype(np.int32))
        samples.append(sample[order])
    return np.concatenate(pieces), np.concatenate(samples)
