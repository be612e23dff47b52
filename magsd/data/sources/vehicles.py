"""`aircraft:DIR` and `cars:DIR`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from magsd.data.record import Record, Side
from magsd.data.sources.base import Options
from magsd.data.sources.files import holder
from magsd.data.sources.published import PublishedSource, read_mat
from magsd.data.sources.rows import read_rows, read_words
from magsd.errors import DataError

# Pixels of the strip with the photographer's name that the authors ask to cut off.
_BANNER = 20
#: Folders above the data in the archives that people pass on.
_DEEP = 4


class AircraftSource(PublishedSource):
    """FGVC-Aircraft (Maji et al., arXiv 1306.5151): trained on trainval, tested on test.

    DIR is the folder data of the archive, or holds it at some depth. Without the authors' lists,
    train.csv, val.csv and test.csv are read, with the columns filename and Classes. option
    ``level``: classes are variants (100), families (70) or manufacturers (30). The strip under each
    image is cut off.
    """

    kind = "aircraft"
    name = "FGVC-Aircraft"
    home = "https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/"
    options: ClassVar[Options] = {"level": ("variant", "family", "manufacturer")}

    def _find(self) -> Iterator[Record]:
        level = self.choice["level"]
        lists = f"images_{level}_test.txt"
        tables = holder(self.folder, "train.csv", deep=_DEEP)
        data = holder(self.folder, lists, deep=_DEEP)
        if data is not None:
            rows = self._listed(data, f"images_{level}_")
            images = data / "images"
        elif tables is not None and level == "variant":
            rows = self._tabled(tables)
            images = (holder(self.folder, "images", deep=_DEEP + 1) or tables) / "images"
        else:
            self._need(f"data/images_{level}_trainval.txt")
            return
        if not images.is_dir():
            self._need(images.relative_to(self.folder).as_posix())
        for file, label, side in rows:
            yield self._record(images / file, label, key=f"data/images/{file}", split=side)

    def _listed(self, data: Path, start: str) -> Iterator[tuple[str, str, Side]]:
        """File, class and side of each image by the authors' lists."""
        whole = data / f"{start}trainval.txt"
        trained = (
            [whole] if whole.is_file() else [data / f"{start}{p}.txt" for p in ("train", "val")]
        )
        for path in (*trained, data / f"{start}test.txt"):
            self._need(path.relative_to(self.folder).as_posix())
            side: Side = "train" if path in trained else "test"
            for number, *label in read_words(path, 2):
                yield f"{number}.jpg", " ".join(label), side

    def _tabled(self, folder: Path) -> Iterator[tuple[str, str, Side]]:
        """File, class and side of each image by tables."""
        sides: dict[str, Side] = {"train": "train", "val": "train", "test": "test"}
        for part, side in sides.items():
            path = folder / f"{part}.csv"
            if part == "test" or path.is_file():
                for _, row in read_rows(path, ("filename", "classes")):
                    yield row["filename"].strip(), row["classes"].strip(), side

    def read_image(self, record: Record) -> NDArray[np.uint8]:
        """The image without the strip under it; see `Source.read_image`."""
        return super().read_image(record)[:-_BANNER]

    def fingerprint(self, record: Record) -> str:
        """That of the file; cut images are other images."""
        return f"{super().fingerprint(record)}:without {_BANNER}"


class CarsSource(PublishedSource):
    """Stanford Cars (Krause et al., 2013) with the published split.

    Either cars_train/ and cars_test/ with cars_meta.mat, cars_train_annos.mat and
    cars_test_annos_withlabels.mat, wherever they lie in DIR; or car_ims/ with cars_annos.mat.
    """

    kind = "cars"
    name = "Stanford Cars"
    home = "https://ai.stanford.edu/~jkrause/cars/car_dataset.html (no longer served there)"

    def _find(self) -> Iterator[Record]:
        whole, images = self._mat("cars_annos.mat"), self._images("car_ims")
        if whole and images and not self._images("cars_train"):
            yield from self._find_whole(whole, images)
            return
        meta, annotations = self._mat("cars_meta.mat"), self._mat("cars_train_annos.mat")
        names = [f"cars_test_annos_withlabels{end}.mat" for end in ("", " (1)", "_1")]
        tested = self._mat(*names)
        folders = {part: self._images(f"cars_{part}") for part in ("train", "test")}
        if whole and (folders["train"] or folders["test"]) and not (meta and annotations):
            raise DataError(
                f"{whole}: it numbers the images of car_ims/, not those of cars_train/ and"
                " cars_test/, which need cars_meta.mat, cars_train_annos.mat and"
                f" {names[0]}; {self._where()}"
            )
        found = {
            "devkit/cars_meta.mat": meta,
            "devkit/cars_train_annos.mat": annotations,
            names[0]: tested,
            "cars_train": folders["train"],
            "cars_test": folders["test"],
        }
        outer = "stanford_cars/" if (self.folder / "stanford_cars").is_dir() else ""
        for name, path in found.items():
            if path is None:
                self._need(f"{outer}{name}")
        classes = _names(found["devkit/cars_meta.mat"])
        sides: dict[Side, Path | None] = {"train": annotations, "test": tested}
        for side, path in sides.items():
            for row in np.atleast_1d(read_mat(path, "annotations", ("fname", "class"))):
                file = PurePosixPath(str(row["fname"])).name
                yield self._record(
                    (folders[side] or self.folder) / file,
                    _class_of(classes, row["class"], path),
                    key=f"cars_{side}/{file}",
                    split=side,
                )

    def _find_whole(self, path: Path, images: Path) -> Iterator[Record]:
        """Images of car_ims/; cars_annos.mat marks those of the test side."""
        classes = _names(path)
        fields = ("relative_im_path", "class", "test")
        for row in np.atleast_1d(read_mat(path, "annotations", fields)):
            file = PurePosixPath(str(row["relative_im_path"])).name
            yield self._record(
                images / file,
                _class_of(classes, row["class"], path),
                key=f"car_ims/{file}",
                split="test" if int(row["test"]) else "train",
            )

    def _mat(self, *names: str) -> Path | None:
        """The file of one of the names, wherever it lies."""
        place = holder(self.folder, *names, deep=_DEEP)
        return next((p for n in names if place and (p := place / n).is_file()), None)

    def _images(self, name: str) -> Path | None:
        """The folder of a name, or the one of that name in it, as archives are often unpacked."""
        if self.folder.absolute().name == name:
            return self.folder
        place = holder(self.folder, name, deep=_DEEP)
        if place is None:
            return None
        inner = place / name / name
        return inner if inner.is_dir() else place / name


def _names(path: Path | None) -> list[str]:
    return [str(name) for name in np.atleast_1d(read_mat(path, "class_names"))]


def _class_of(classes: list[str], number: int, path: Path | None) -> str:
    try:
        return classes[range(1, len(classes) + 1).index(int(number))]
    except ValueError:
        raise DataError(f"{path}: there is no class {number}") from None
