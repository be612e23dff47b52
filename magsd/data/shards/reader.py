"""Images and labels out of one tar shard."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Generator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from magsd.data.cache import prepare_image
from magsd.data.images import IMAGE_SUFFIXES, decode_image
from magsd.data.shards.index import Shard, webdataset
from magsd.errors import DataError


class ShardReader:
    """Some images of a shard, in rising order, at the size that training wants.

    The shard is opened at the first call, read forwards only, and left after image `end` - 1; what
    is not asked for is not decoded.
    """

    def __init__(
        self,
        shard: Shard,
        end: int,
        classes: Sequence[str],
        image_size: int,
        channels: int,
        clahe: tuple[float, int] | None,
    ) -> None:
        self._shard = shard
        self._end = end
        self._classes = list(classes)
        self._form = (image_size, channels, clahe)
        self._stream: Generator[dict[str, Any], None, None] | None = None
        self._next = 0
        self._stopped = False

    def take(self, numbers: Sequence[int]) -> list[tuple[NDArray[np.uint8], int]]:
        """Pixels, (S, S) or (S, S, 3) uint8, and label of each; the numbers rise from call to call.

        Raises DataError where the shard cannot be read, is shorter than its index says, or holds an
        image or label that is not usable. Ends early after `stop`.
        """
        taken = []
        for number in numbers:
            if self._stopped:
                break
            taken.append(self._decode(self._advance(number)))
        if self._next >= self._end:
            self.close()
        return taken

    def stop(self) -> None:
        """Let a call in another thread end soon."""
        self._stopped = True

    def close(self) -> None:
        """Leave the shard."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _advance(self, number: int) -> dict[str, Any]:
        library, url = webdataset(), self._shard.url
        try:
            if self._stream is None:
                self._stream = iter(library.tariterators.tarfile_samples([{"url": url}]))
            while True:
                sample: dict[str, Any] = next(self._stream)
                self._next += 1
                if self._next > number:
                    return sample
        except StopIteration:
            raise DataError(
                f"{url}: ended after {self._next} images, its index says {self._shard.samples};"
                " write the shards or their index again"
            ) from None
        except (OSError, ValueError, EOFError, tarfile.TarError) as error:
            raise DataError(f"{url}: cannot be read as a tar of images ({error})") from error

    def _decode(self, sample: dict[str, Any]) -> tuple[NDArray[np.uint8], int]:
        where = f"{self._shard.url}, {sample['__key__']}"
        # KEY.png before KEY.mask.png, whichever comes first in the tar.
        for name, data in sorted(sample.items(), key=lambda item: item[0].count(".")):
            suffix = f".{name.rpartition('.')[2]}"
            if suffix in IMAGE_SUFFIXES:
                pixels = prepare_image(decode_image(data, f"{where}{suffix}"), *self._form)
                return pixels, self._label(sample, where)
        raise DataError(f"{where}: no image; it has {', '.join(k for k in sample if k[0] != '_')}")

    def _label(self, sample: dict[str, Any], where: str) -> int:
        try:
            label = sample["cls"] if "cls" in sample else json.loads(sample["json"])["label"]
            number = self._classes.index(label) if isinstance(label, str) else int(label)
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{where}: no label in .cls or .json ({error!r})") from error
        if not 0 <= number < len(self._classes):
            raise DataError(f"{where}: label {number}; there are {len(self._classes)} classes")
        return number
