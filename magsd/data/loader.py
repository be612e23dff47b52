"""Batches on the device, the same ones again after a resume."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from magsd.data.augment import AugmentConfig, augment_images, z_score
from magsd.data.cache import ImageCache
from magsd.data.random import step_generator, step_seed
from magsd.errors import DataError


class Batch(NamedTuple):
    """images (B, C, S, S) float32 z-scored; labels (B,) int64; indices into the cache."""

    images: Tensor
    labels: Tensor
    indices: list[int]


class BatchLoader:
    """Batches of some of a cache's images.

    indices: positions in the cache. classes: label names in the order of the model's outputs.
    augment: None leaves the images as they are. channels: 3 repeats a grey image; None takes
    the cache's. Order and every random number depend on seed, epoch and step alone.
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
    ) -> None:
        if batch_size < 1:
            raise DataError(f"batch_size must be at least 1, not {batch_size}")
        if channels not in (None, cache.channels) and cache.channels != 1:
            raise DataError(f"{channels} channels cannot be made of {cache.channels}")
        self.cache = cache
        self.indices = [int(i) for i in indices]
        self.classes = tuple(classes)
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.augment = augment if augment is not None and augment.enabled else None
        self.device = torch.device(device)
        self.drop_last = drop_last
        self.channels = channels or cache.channels
        self.labels = self._number_labels()

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

    def __len__(self) -> int:
        """Batches in an epoch."""
        count = len(self.indices)
        return count // self.batch_size if self.drop_last else -(-count // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        return self.epoch(0)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """The batches of one epoch, from `start_step` on."""
        order = self._order(epoch)
        for step in range(start_step, len(self)):
            chosen = order[step * self.batch_size : (step + 1) * self.batch_size]
            yield self._batch(chosen, epoch, step)

    def _order(self, epoch: int) -> list[int]:
        if not self.shuffle:
            return list(range(len(self.indices)))
        random = np.random.default_rng(step_seed(self.seed, epoch, 0, "order"))
        return random.permutation(len(self.indices)).tolist()

    def _batch(self, chosen: list[int], epoch: int, step: int) -> Batch:
        indices = [self.indices[place] for place in chosen]
        pixels = self._to_device(torch.from_numpy(self.cache.images[indices]))
        labels = self._to_device(torch.tensor([self.labels[place] for place in chosen]))
        pixels = pixels[:, None] if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)
        images = pixels.to(torch.float32).div_(255).contiguous()
        if self.augment is not None:
            generator = step_generator(self.seed, epoch, step, "augment", self.device)
            images = augment_images(images, self.augment, generator)
        images = z_score(images)
        if images.shape[1] != self.channels:
            images = images.expand(-1, self.channels, -1, -1).contiguous()
        return Batch(images, labels, indices)

    def _to_device(self, tensor: Tensor) -> Tensor:
        if self.device.type != "cuda":
            return tensor.to(self.device)
        # Only a copy from pinned memory leaves the host free to go on.
        return tensor.pin_memory().to(self.device, non_blocking=True)
