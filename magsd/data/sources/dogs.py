"""`dogs:DIR`: Stanford Dogs (Khosla et al., 2011)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import PurePosixPath

from magsd.data.record import Record, Side
from magsd.data.sources.published import PublishedSource
from magsd.errors import DataError


class DogsSource(PublishedSource):
    """120 breeds with the published split; the class is the folder's name after its number."""

    kind = "dogs"
    name = "Stanford Dogs"
    home = "http://vision.stanford.edu/aditya86/ImageNetDogs/"

    def _find(self) -> Iterator[Record]:
        from scipy.io import loadmat
        from scipy.io.matlab import MatReadError

        images = self._need("Images", "images")
        sides: dict[str, Side] = {"train": "train", "test": "validation"}
        for part, side in sides.items():
            path = self._need(f"lists/{part}_list.mat", f"{part}_list.mat")
            try:
                names = loadmat(path, squeeze_me=True)["file_list"]
            except (OSError, ValueError, KeyError, MatReadError) as error:
                raise DataError(f"{path}: not the list of that set ({error})") from error
            for name in names.reshape(-1):
                label = re.sub(r"^n\d+-", "", PurePosixPath(str(name)).parent.name)
                yield self._record(images / str(name), label, key=str(name), split=side)
