"""`covidx:DIR`: COVIDx CXR (Wang and Wong, arXiv 2003.09871), listed images in train/ and test/."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import ClassVar

from magsd.data.images import IMAGE_SUFFIXES
from magsd.data.record import Record, Side
from magsd.data.sources.base import Options
from magsd.data.sources.files import subfolders
from magsd.data.sources.published import PublishedSource
from magsd.data.sources.rows import read_words
from magsd.errors import DataError


class CovidxSource(PublishedSource):
    """The images of the lists for training, validation and test, each in a folder of its name.

    The lists are train*.txt, val*.txt and test*.txt in DIR or DIR/labels, or in a folder of DIR;
    one of the last two may lack. The images are in train/, val/ and test/ there, or in data/train/
    and so on. A patient is one of its source.

    options: ``list``, ``test``: the end of the name of the list, as in ``list=9A`` for
    train_COVIDx9A.txt, where several are there; ``part=test``: the images of the test list alone,
    to evaluate on.
    """

    kind = "covidx"
    name = "COVIDx"
    home = "https://github.com/lindawangg/COVID-Net (docs/COVIDx.md)"
    options: ClassVar[Options] = {"list": (), "test": (), "part": ("all", "test")}

    def _find(self) -> Iterator[Record]:
        there = (place for place in (self.folder, *subfolders(self.folder)) if _has_lists(place))
        self._base = next(there, self.folder)
        parts = {part: self._lists(part) for part in ("train", "val", "test")}
        if not parts["train"]:
            self._need("train.txt", "labels/train_COVIDx*.txt")
        version, train = self._choose(parts["train"], "list", self.choice["list"])
        only_test = self.choice["part"] == "test"
        if not parts["test"] and (only_test or not parts["val"]):
            self._need("test.txt", f"labels/test_{version}.txt")
        rows = [] if only_test else list(self._read(train, "train", "train"))
        held: dict[str, Side] = {"val": "validation", "test": "test"}
        for part, side in held.items():
            if parts[part] and not (only_test and part == "val"):
                own, named = version if version in parts[part] else "", self.choice["test"]
                wanted = named or own if part == "test" else own or named
                _, path = self._choose(parts[part], "test", wanted)
                rows += self._read(path, part, side)
        # A row without a source may be of a patient whom another row names with one.
        anywhere = {patient for _, patient, source in rows if not source}
        for record, patient, source in rows:
            name = f"unnamed/{patient}" if patient in anywhere else f"{source}/{patient}"
            yield dataclasses.replace(record, patient=name)

    def _lists(self, part: str) -> dict[str, Path]:
        """Version -> list; the version of train_COVIDx9A.txt is COVIDx9A, of train.txt nothing."""
        places = [self._base, self._base / "labels"]
        found = [path for place in places for path in sorted(place.glob(f"{part}*.txt"))]
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

    def _read(self, path: Path, part: str, side: Side) -> Iterator[tuple[Record, str, str | None]]:
        """Records, patients and their sources, where a row has one.

        A row is "patient file class source"; the patient may be of several words, and in some lists
        some rows, or all, have no source.
        """
        folders = [self._base / name for name in (f"{part}/{part}", part, f"data/{part}")]
        folder = next((place for place in folders if place.is_dir()), folders[1])
        for words in read_words(path, 3):
            sourced = len(words) > 3 and (_is_image(words[-3]) or not _is_image(words[-2]))
            label, source = words[-2:] if sourced else (words[-1], None)
            *patient, file = words[: -2 if sourced else -1]
            if not sourced and _is_image(patient[-1]) and not _is_image(file):
                raise DataError(f"{path}: {' '.join(words)!r} names no image before its class")
            patient, file = _whole_name(folder, patient, file)
            yield self._record(folder / file, label, split=side), " ".join(patient), source


def _has_lists(folder: Path) -> bool:
    return any(any(place.glob("train*.txt")) for place in (folder, folder / "labels"))


def _is_image(word: str) -> bool:
    return PurePath(word).suffix.lower() in IMAGE_SUFFIXES


def _whole_name(folder: Path, patient: list[str], file: str) -> tuple[list[str], str]:
    """The patient's words and the file, of whose name the last of them may be part."""
    if len(patient) > 1 and not (folder / file).is_file():
        for at in range(1, len(patient)):
            name = " ".join([*patient[at:], file])
            if (folder / name).is_file():
                return patient[:at], name
    return patient, file
