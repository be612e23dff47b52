"""`covidx:DIR`: COVIDx CXR (Wang and Wong, arXiv 2003.09871), listed images in train/ and test/."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from magsd.data.record import Record, Side
from magsd.data.sources.base import Options
from magsd.data.sources.published import PublishedSource
from magsd.data.sources.rows import read_words
from magsd.errors import DataError


class CovidxSource(PublishedSource):
    """The images of a list for training and of one for validation, each in a folder of its name.

    The lists are train*.txt, val*.txt and test*.txt in DIR or DIR/labels. Validation is the val
    list where there is one, else the test list. options: ``list``, ``test``: the end of the name
    of the list, as in ``list=9A`` for train_COVIDx9A.txt, where several are there; ``part=test``:
    the images of the test list alone, to evaluate on. A patient is one of its source.
    """

    kind = "covidx"
    name = "COVIDx"
    home = "https://github.com/lindawangg/COVID-Net (docs/COVIDx.md)"
    options: ClassVar[Options] = {"list": (), "test": (), "part": ("all", "test")}

    def _find(self) -> Iterator[Record]:
        parts = {part: self._lists(part) for part in ("train", "val", "test")}
        if not parts["train"]:
            self._need("train.txt", "labels/train_COVIDx*.txt")
        version, train = self._choose(parts["train"], "list", self.choice["list"])
        held = "test" if self.choice["part"] == "test" or not parts["val"] else "val"
        if not parts[held]:
            self._need("test.txt", f"labels/test_{version}.txt")
        wanted = self.choice["test"] or (version if version in parts[held] else "")
        _, other = self._choose(parts[held], "test", wanted)
        if self.choice["part"] == "all":
            yield from self._read(train, "train", "train")
        yield from self._read(other, held, "validation")

    def _lists(self, part: str) -> dict[str, Path]:
        """Version -> list; the version of train_COVIDx9A.txt is COVIDx9A, of train.txt nothing."""
        found = [p for f in ("", "labels") for p in sorted((self.folder / f).glob(f"{part}*.txt"))]
        return {path.stem.removeprefix(part).lstrip("_"): path for path in found}

    def _choose(self, lists: dict[str, Path], option: str, wanted: str) -> tuple[str, Path]:
        """Version and path of the list that is meant."""
        fit = {version: path for version, path in lists.items() if version.endswith(wanted)}
        if wanted in fit:
            fit = {wanted: fit[wanted]}
        if len(fit) != 1:
            names = ", ".join(path.name for path in lists.values())
            raise DataError(
                f"{self.folder}: {len(fit)} lists are meant by {option}={wanted or '(nothing)'};"
                f" name one of {names} by {option}=, the end of its name without .txt"
            )
        return next(iter(fit.items()))

    def _read(self, path: Path, folder: str, side: Side) -> Iterator[Record]:
        for words in read_words(path, 3):
            # "patient file class source", the patient perhaps of several words; the first lists
            # have no source.
            *patient, file, label, source = words if len(words) > 3 else [*words, "unnamed"]
            name = f"{source}/{' '.join(patient)}"
            yield self._record(self.folder / folder / file, label, patient=name, split=side)
