"""`aircraft:DIR` and `cars:DIR`, whose layouts torchvision reads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from magsd.data.record import Record, Side
from magsd.data.sources.base import Options
from magsd.data.sources.published import PublishedSource

# Pixels of the strip with the photographer's name that the authors ask to cut off.
_BANNER = 20


class _TorchvisionSource(PublishedSource):
    """A set of which torchvision finds files and classes.

    root_name: the folder that torchvision looks for in its root; DIR is that folder or the one
    that holds it.
    """

    root_name: str

    def _root(self) -> Path:
        """The folder that holds `root_name`."""
        if self.folder.absolute().name == self.root_name:
            return self.folder.absolute().parent
        self._need(self.root_name)
        return self.folder

    def _base(self) -> Path:
        """`root_name` itself."""
        return self._root() / self.root_name

    def _need_in_base(self, *names: str) -> None:
        inside = "" if self._root() != self.folder else f"{self.root_name}/"
        for name in names:
            self._need(f"{inside}{name}")

    def _records_of(self, dataset: Any, side: Side) -> Iterator[Record]:
        """Records of a torchvision data set whose loader hands out paths."""
        for index in range(len(dataset)):
            path, label = dataset[index]
            key = Path(path).relative_to(self._base()).as_posix()
            yield self._record(Path(path), str(dataset.classes[label]), key=key, split=side)


class AircraftSource(_TorchvisionSource):
    """FGVC-Aircraft (Maji et al., arXiv 1306.5151): trained on trainval, validated on test.

    option ``level``: classes are variants (100), families (70) or manufacturers (30). The strip
    under each image is cut off.
    """

    kind = "aircraft"
    name = "FGVC-Aircraft"
    home = "https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/"
    options: ClassVar[Options] = {"level": ("variant", "family", "manufacturer")}
    root_name = "fgvc-aircraft-2013b"

    def _find(self) -> Iterator[Record]:
        from torchvision.datasets import FGVCAircraft

        level = self.choice["level"]
        lists = [f"data/images_{level}_{part}.txt" for part in ("trainval", "test")]
        plural = {"variant": "variants", "family": "families", "manufacturer": "manufacturers"}
        self._need_in_base("data/images", f"data/{plural[level]}.txt", *lists)
        sides: dict[str, Side] = {"trainval": "train", "test": "validation"}
        for part, side in sides.items():
            dataset = FGVCAircraft(self._root(), part, level, loader=str)
            yield from self._records_of(dataset, side)

    def read_image(self, record: Record) -> NDArray[np.uint8]:
        """The image without the strip under it; see `Source.read_image`."""
        return super().read_image(record)[:-_BANNER]

    def fingerprint(self, record: Record) -> str:
        """That of the file; cut images are other images."""
        return f"{super().fingerprint(record)}:without {_BANNER}"


class CarsSource(_TorchvisionSource):
    """Stanford Cars (Krause et al., 2013) with the published split."""

    kind = "cars"
    name = "Stanford Cars"
    home = "https://ai.stanford.edu/~jkrause/cars/car_dataset.html (no longer served there)"
    root_name = "stanford_cars"

    def _find(self) -> Iterator[Record]:
        from torchvision.datasets import StanfordCars

        self._need_in_base(
            "devkit/cars_meta.mat",
            "devkit/cars_train_annos.mat",
            "cars_test_annos_withlabels.mat",
            "cars_train",
            "cars_test",
        )
        sides: dict[str, Side] = {"train": "train", "test": "validation"}
        for part, side in sides.items():
            yield from self._records_of(StanfordCars(self._root(), part, loader=str), side)
