"""`dogs:DIR`: Stanford Dogs (Khosla et al., 2011)."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import numpy as np

from magsd.data.record import Record, Side
from magsd.data.sources.files import find_images, holder, readable_subfolders
from magsd.data.sources.published import PublishedSource, read_mat

_NUMBER = re.compile(r"^n\d+-")
_log = logging.getLogger(__name__)


class DogsSource(PublishedSource):
    """120 breeds with the published split; the class is the folder's name after its number.

    DIR holds Images/ at some depth, and train_list.mat and test_list.mat beside it or in
    lists/. Without both lists there is no published split, with a warning. DIR may be Images/, too.
    """

    kind = "dogs"
    name = "Stanford Dogs"
    home = "http://vision.stanford.edu/aditya86/ImageNetDogs/"

    def _find(self) -> Iterator[Record]:
        images = self._images()
        sides: tuple[Side, ...] = ("train", "test")
        lists = {side: self._list(side) for side in sides}
        if not any(lists.values()):
            _log.warning(
                "%s: no train_list.mat and no test_list.mat, which name the published split: all"
                " images are taken and divided into folds; %s", self.folder, self._where(),
            )  # fmt: skip
            for path in find_images(images):
                yield self._one(images, path.relative_to(images).as_posix(), None)
            return
        for side in sides:
            path = lists[side] or self._need(f"lists/{side}_list.mat", f"{side}_list.mat")
            for name in np.atleast_1d(read_mat(path, "file_list")).reshape(-1):
                yield self._one(images, str(name), side)

    def _one(self, images: Path, name: str, side: Side | None) -> Record:
        label = _NUMBER.sub("", PurePosixPath(name).parent.name)
        return self._record(images / name, label, key=name, split=side)

    def _images(self) -> Path:
        """The folder that holds a folder for each breed."""
        level = [self.folder]
        for _ in range(4):
            for place in level:
                breeds = [p for p in readable_subfolders(place) if _NUMBER.match(p.name)]
                # The boxes lie in folders of the same names.
                if any(find_images(breed) for breed in breeds[:3]):
                    return place
            level = [
                path
                for place in level
                for path in readable_subfolders(place)
                if not _NUMBER.match(path.name)
            ]
        return self._need("Images", "images")

    def _list(self, part: str) -> Path | None:
        name = f"{part}_list.mat"
        places = [self.folder, *([self.folder.parent] if self._is_images() else [])]
        found = (holder(place, name, deep=2 if place == self.folder else 0) for place in places)
        beside = next((place / name for place in found if place), None)
        if beside is None and self._is_images():
            lists = self.folder.parent / "lists" / name
            beside = lists if lists.is_file() else None
        return beside

    def _is_images(self) -> bool:
        return self.folder.name.lower() == "images"
