"""Batches on the device, the same ones again after a resume."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from magsd.data.augment import AugmentConfig, Part, augment_images, z_score
from magsd.data.cache import ImageCache
from magsd.data.random import step_generator, step_seed
from magsd.errors import DataError


class Batch(NamedTuple):
    """images (B, C, S, S) float32 z-scored; labels (B,) int64; indices into the cache, or
    numbers in the shards; host_labels: the labels where the host can read them without a wait.

    positions: of the whole batch, in the loader's `indices` and `labels`; of shards, whose labels
    are not known before they are read, those that are here. part: which of the batch are here, all
    where one process takes every batch.
    """

    images: Tensor
    labels: Tensor
    indices: list[int]
    positions: list[int]
    part: Part
    host_labels: Tensor


#: Device types to which pages of the host are pinned before a copy: only then can the host go on.
PINNED_FOR = frozenset(("cuda",))


def shard_bounds(count: int, rank: int, ranks: int) -> tuple[int, int]:
    """Begin and end of part `rank` of `ranks` of `count` things in a row."""
    return rank * count // ranks, (rank + 1) * count // ranks


class Loader(ABC):
    """Batches of labeled images on a device, the same ones again after a resume.

    count: images in an epoch. classes: label names in the order of the model's outputs. augment:
    None leaves the images as they are. channels: 1, or 3, which repeats a gray image. Order and
    every random number depend on seed, epoch and step alone. rank, ranks: of every batch this
    loader brings part `rank` of `ranks`, which differ by one image at most.
    """

    def __init__(
        self,
        count: int,
        classes: Sequence[str],
        *,
        batch_size: int,
        shuffle: bool,
        seed: int,
        augment: AugmentConfig | None,
        device: torch.device | str,
        channels: int,
        drop_last: bool = False,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        if batch_size < 1:
            raise DataError(f"batch_size must be at least 1, not {batch_size}")
        self.count = count
        self.classes = tuple(classes)
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.augment = augment if augment is not None and augment.enabled else None
        self.device = torch.device(device)
        self.channels = channels
        self.drop_last = drop_last
        self.rank, self.ranks = rank, ranks

    def __len__(self) -> int:
        """Batches in an epoch, whatever part of them is brought."""
        size = self.batch_size
        return self.count // size if self.drop_last else -(-self.count // size)

    def __iter__(self) -> Iterator[Batch]:
        return self.epoch(0)

    @abstractmethod
    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """The batches of one epoch, from `start_step` on."""

    @abstractmethod
    def class_counts(self) -> list[int]:
        """Images of each class. Raises DataError where that is not known."""

    @abstractmethod
    def describe(self, positions: Sequence[int]) -> list[str]:
        """Names for a person of the images at a batch's `positions`."""

    def whole_labels(self, batch: Batch) -> list[int] | None:
        """Labels of the whole batch, of which this loader brought a part; None: not known here."""
        return None

    def _pin(self, values: Tensor) -> Tensor:
        """The same of the host's, in memory from which the device reads by itself."""
        return values.pin_memory() if self.device.type in PINNED_FOR else values

    def _send(self, pinned: Tensor) -> Tensor:
        """A copy on the device, for which the host does not wait where `_pin` made its source."""
        return pinned.to(self.device, non_blocking=self.device.type in PINNED_FOR)

    def _prepare(self, pixels: Tensor, epoch: int, step: int, part: Part) -> Tensor:
        """Augmented and z-scored images (B, C, S, S) of uint8 pixels."""
        pixels = pixels[:, None] if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)
        images = pixels.to(torch.float32).div_(255).contiguous()
        if self.augment is not None:
            generator = step_generator(self.seed, epoch, step, "augment", self.device)
            images = augment_images(images, self.augment, generator, part)
        images = z_score(images)
        if images.shape[1] != self.channels:
            images = images.expand(-1, self.channels, -1, -1).contiguous()
        return images


class BatchLoader(Loader):
    """Batches of some of a cache's images.

    indices: positions in the cache. channels: None takes the cache's. on_device: "on" keeps all
    images of the cache on a GPU, as uint8, "auto" does where they take less than half of its free
    memory, "off" brings each batch from pinned memory, one batch ahead. The rest as in `Loader`.
    """

    def __init__(
        self,
        cache: ImageCache,
        indices: Sequence[int],
        classes: Sequence[str],
        *,
        batch_size: int,
        shuffle: bool,
        seed: int,
        augment: AugmentConfig | None,
        device: torch.device | str,
        drop_last: bool = False,
        channels: int | None = None,
        on_device: Literal["auto", "on", "off"] = "auto",
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        if channels not in (None, cache.channels) and cache.channels != 1:
            raise DataError(f"{channels} channels cannot be made of {cache.channels}")
        super().__init__(
            len(indices),
            classes,
            batch_size=batch_size,
            shuffle=shuffle,
            seed=seed,
            augment=augment,
            device=device,
            channels=channels or cache.channels,
            drop_last=drop_last,
            rank=rank,
            ranks=ranks,
        )
        self.cache = cache
        self.indices = [int(i) for i in indices]
        self.on_device = on_device
        self.labels = self._number_labels()
        self._host_labels = torch.tensor(self.labels, dtype=torch.int64)
        self._numbers = np.array(self.indices, dtype=np.int64)
        self._placed: tuple[Tensor, Tensor] | None = None

    def _number_labels(self) -> list[int]:
        number = {name: place for place, name in enumerate(self.classes)}
        labels = []
        for index in self.indices:
            record = self.cache.records[index]
            if record.label not in number:
                raise DataError(
                    f"label {record.label!r} of {record.key} is not among the classes"
                    f" {', '.join(self.classes)}"
                )
            labels.append(number[record.label])
        return labels

    def class_counts(self) -> list[int]:
        """Images of each class."""
        counts = torch.bincount(torch.tensor(self.labels), minlength=len(self.classes))
        return [int(count) for count in counts]

    def describe(self, positions: Sequence[int]) -> list[str]:
        """The images' keys."""
        return [self.cache.records[self.indices[place]].key for place in positions]

    def whole_labels(self, batch: Batch) -> list[int]:
        """Labels of the whole batch."""
        return [self.labels[place] for place in batch.positions]

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """The batches of one epoch, from `start_step` on."""
        order = self._order(epoch)
        steps = range(start_step, len(self))
        whole = [order[step * self.batch_size : (step + 1) * self.batch_size] for step in steps]
        bounds = [shard_bounds(len(positions), self.rank, self.ranks) for positions in whole]
        chosen = [positions[slice(*ends)] for positions, ends in zip(whole, bounds, strict=True)]
        for step, positions, here, (first, _), (pixels, labels) in zip(
            steps, whole, chosen, bounds, self._fetch(chosen), strict=True
        ):
            part = Part(first, len(positions))
            indices = [self.indices[place] for place in here]
            images = self._prepare(pixels, epoch, step, part)
            yield Batch(images, labels, indices, positions, part, self._host_labels[here])

    def _order(self, epoch: int) -> list[int]:
        if not self.shuffle:
            return list(range(len(self.indices)))
        random = np.random.default_rng(step_seed(self.seed, epoch, 0, "order"))
        order: list[int] = random.permutation(len(self.indices)).tolist()
        return order

    def _fetch(self, chosen: list[list[int]]) -> Iterator[tuple[Tensor, Tensor]]:
        """uint8 pixels and labels of each batch, on the device."""
        if self.device.type not in PINNED_FOR:
            for positions in chosen:
                images, labels = self._gather(positions)
                yield self._send(images), self._send(labels)
            return
        held = self._images_on_device()
        if held is None:
            yield from self._fetch_ahead(chosen)
            return
        all_labels, rows = self._on_device()
        order = self._send(self._pin(torch.tensor(list(chain(*chosen)), dtype=torch.int64)))
        for here in order.split([len(positions) for positions in chosen]):
            yield held[rows[here]], all_labels[here]

    def _gather(self, positions: list[int]) -> tuple[Tensor, Tensor]:
        """uint8 pixels and labels of one batch, on the host."""
        pixels = torch.from_numpy(self.cache.images[self._numbers[positions]])
        return self._pin(pixels), self._pin(self._host_labels[positions])

    def _fetch_ahead(self, chosen: list[list[int]]) -> Iterator[tuple[Tensor, Tensor]]:
        """The same as `_fetch`, each batch gathered while the one before is trained on."""
        with ThreadPoolExecutor(1) as pool:
            ahead = [pool.submit(self._gather, positions) for positions in chosen[:1]]
            for place in range(len(chosen)):
                ahead += [
                    pool.submit(self._gather, positions)
                    for positions in chosen[place + 1 : place + 2]
                ]
                images, labels = ahead.pop(0).result()
                yield self._send(images), self._send(labels)

    def _on_device(self) -> tuple[Tensor, Tensor]:
        """Label and row in the cache of each of the loader's images, copied at the first call."""
        if self._placed is None:
            rows = torch.from_numpy(self._numbers)
            self._placed = self._send(self._pin(self._host_labels)), self._send(self._pin(rows))
        return self._placed

    def _images_on_device(self) -> Tensor | None:
        """All images of the cache on the GPU, copied at the first call, or None."""
        if self.on_device == "off":
            return None
        copies = self.cache.copies
        if self.device not in copies:
            free, _ = torch.cuda.mem_get_info(self.device)
            if self.on_device == "auto" and 2 * self.cache.images.nbytes > free:
                return None
            copies[self.device] = torch.from_numpy(np.array(self.cache.images)).to(self.device)
        return copies[self.device]
