"""`cub:DIR`: Caltech-UCSD Birds-200-2011 (Wah et al., 2011)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from magsd.data.record import Record
from magsd.data.sources.files import holder
from magsd.data.sources.published import Box, PublishedSource, read_box
from magsd.data.sources.rows import read_words
from magsd.errors import DataError


class CubSource(PublishedSource):
    """200 species with the published split; the box around the bird is its mask.

    DIR is CUB_200_2011 or holds it, perhaps within another folder.
    """

    kind = "cub"
    name = "CUB-200-2011"
    home = "https://www.vision.caltech.edu/datasets/cub_200_2011"

    def _find(self) -> Iterator[Record]:
        place = holder(self.folder, "images.txt")
        images = place / "images.txt" if place else self._need("CUB_200_2011/images.txt")
        classes = self._table(images.with_name("classes.txt"))
        labels = self._table(images.with_name("image_class_labels.txt"))
        trains = self._table(images.with_name("train_test_split.txt"))
        boxes = self._boxes_of(images.with_name("bounding_boxes.txt"))
        for number, name in self._table(images).items():
            try:
                label, train = classes[labels[number]], trains[number] == "1"
            except KeyError as error:
                raise DataError(f"{images.parent}: image {number} lacks an entry {error}") from None
            yield self._record(
                images.with_name("images") / name,
                label,
                split="train" if train else "test",
                boxes=boxes.get(number, ()),
            )

    def _table(self, path: Path) -> dict[str, str]:
        """Number -> value of a file of two columns."""
        self._need(path.relative_to(self.folder).as_posix())
        return {words[0]: words[1] for words in read_words(path, 2)}

    @staticmethod
    def _boxes_of(path: Path) -> dict[str, tuple[Box, ...]]:
        if not path.is_file():
            return {}
        return {w[0]: (read_box(w[1:], f"{path}, image {w[0]}"),) for w in read_words(path, 5)}
