"""Train, validation and test sides: by patient and stratified, or as a set publishes them."""

from __future__ import annotations

import csv
import io
import logging
import os
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from magsd.data.record import SIDES, Record
from magsd.errors import DataError
from magsd.outputs import write_atomically

_COLUMNS = ["key", "label", "patient", "split"]
#: Of a test side that is a source of its own: which, as a further column.
_SOURCE = "source"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Split:
    """Positions in the records, rising: to train on, to choose by, and to measure on.

    test: empty where there is no such side: results are those of the validation images then.
    """

    train: list[int]
    validation: list[int]
    test: list[int] = field(default_factory=list)


def choose_split(
    records: Sequence[Record],
    *,
    how: Literal["auto", "published", "folds"] = "auto",
    folds: int = 5,
    fold: int = 0,
    seed: int = 0,
    test: bool = False,
) -> Split:
    """The published split, or a fold by patient; with `test` in three sides, else in two.

    how: "auto" takes the published split where the records name one, "published" insists on it,
    "folds" leaves it aside. Raises DataError as `published_split`, `split_by_patient` and
    `hold_out`, and where "auto" finds a published split but another fold than the first is asked
    for.
    """
    published = any(record.split for record in records)
    if how == "auto" and published and fold:
        raise DataError(
            f"fold {fold} is asked for, but the data set publishes a split; say data.split=folds,"
            " or leave out data.fold"
        )
    if how == "published" or (how == "auto" and published):
        split = published_split(records, test=test)
        return split if split.validation else hold_out(records, split, parts=folds, seed=seed)
    split = split_by_patient(records, folds=folds, fold=fold, seed=seed)
    if not test:
        return split
    whole = Split(split.train, [], split.validation)
    return hold_out(records, whole, parts=folds - 1, seed=seed)


def published_split(records: Sequence[Record], *, test: bool = False) -> Split:
    """The sides that the records name; with `test` validation is empty where none is published.

    Without `test`, the published validation images are validated on, or where there are none the
    published test images.

    Raises DataError where one names none, where a side is empty, or where training lacks a class.
    Patients who stand on several sides are left there, as published, with a warning.
    """
    advice = "choose folds by patient with data.split=folds"
    lacking = [record.key for record in records if record.split is None]
    if lacking:
        raise DataError(
            f"{len(lacking)} of {len(records)} images stand on no side of a published split, the"
            f" first {lacking[0]}; {advice}"
        )
    _check_classes({record.label for record in records})
    named = {s: [i for i, r in enumerate(records) if r.split == s] for s in SIDES}
    train, validation, held = named.values()
    if not test:
        validation, held = validation or held, []
    if not train or not (validation or held):
        empty = "validation" if train else "training"
        raise DataError(f"the published split has no {empty} image here; {advice}")
    strange = {r.label for r in records} - {records[i].label for i in train}
    if strange:
        raise DataError(
            f"the published split has no training image of class {', '.join(sorted(strange))};"
            f" {advice}"
        )
    split = Split(train, validation, held)
    if both := _on_several_sides(records, split):
        _log.warning(
            "%d patients stand on several sides of the published split, e.g. %s; data.split=folds"
            " keeps them apart",
            len(both), min(both),
        )  # fmt: skip
    return split


def _on_several_sides(records: Sequence[Record], split: Split) -> set[str]:
    sides = [{records[i].patient for i in s} for s in (split.train, split.validation, split.test)]
    return sides[0] & sides[1] | sides[0] & sides[2] | sides[1] & sides[2]


def hold_out(records: Sequence[Record], split: Split, *, parts: int, seed: int = 0) -> Split:
    """The split with one of about `parts` parts of its training images as validation side.

    No patient stands on both; classes keep their shares. The part is larger only where no smaller
    one has every class. Raises DataError where a class has one patient only to train on, or where
    no part leaves every class on both sides.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    labels = np.array([records[i].label for i in split.train])
    patients = np.array([records[i].patient for i in split.train])
    counts = {label: len(set(patients[labels == label])) for label in sorted(set(labels.tolist()))}
    fewest = min(counts, key=lambda label: counts[label])
    if counts[fewest] < 2:
        raise DataError(
            f"class {fewest!r} has one patient beside the test side: it cannot be both trained and"
            " validated on; use data.test=none, which measures on the validation images"
        )
    whole = set(labels)
    # scikit-learn divides into no more parts than there are patients, or images of a class.
    most = min(parts, len(set(patients)), max(Counter(labels.tolist()).values()))
    for count in range(max(2, most), 1, -1):  # fewer and larger parts, where none has every class
        splitter = StratifiedGroupKFold(n_splits=count, shuffle=True, random_state=seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of classes with fewer patients
            divided = list(splitter.split(np.zeros(len(labels)), labels, patients))
        for sides in divided:
            if all(set(labels[side]) == whole for side in sides):
                train, validation = (sorted(split.train[i] for i in side) for side in sides)
                return Split(train, validation, split.test)
    raise DataError(
        "no part of the training images holds every class and leaves every class to train on;"
        " use another data.split_seed, fewer folds, or data.test=none"
    )


def split_by_patient(
    records: Sequence[Record], *, folds: int = 5, fold: int = 0, seed: int = 0
) -> Split:
    """Validation is part `fold` of `folds`, train the rest; classes keep their shares.

    No patient stands on both sides. Raises DataError where a class has fewer patients than
    folds, or where a side would lack a class.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    if folds < 2:
        raise DataError(f"folds must be at least 2, not {folds}")
    if not 0 <= fold < folds:
        raise DataError(f"fold must lie in 0..{folds - 1}, not {fold}")
    _check_patients(records, folds)
    labels = np.array([record.label for record in records])
    patients = np.array([record.patient for record in records])
    splitter = StratifiedGroupKFold(n_splits=folds, shuffle=True, random_state=seed)
    sides = list(splitter.split(np.zeros(len(records)), labels, patients))[fold]
    split = Split(*(sorted(int(i) for i in side) for side in sides))
    for name, side in (("train", split.train), ("validation", split.validation)):
        lacking = sorted(set(labels) - {records[i].label for i in side})
        if lacking:
            raise DataError(
                f"fold {fold} of {folds} has no {name} image of class {', '.join(lacking)};"
                " use fewer folds or another seed"
            )
    return split


def split_of_rest(records: Sequence[Record], split: Split, rest: Sequence[Record]) -> Split:
    """The sides on which those records stand that are left, as positions in these.

    No image changes sides because another cannot be read. Raises DataError where there is nothing
    left to validate or to test on, or training lacks a class.
    """
    place = {record.key: position for position, record in enumerate(rest)}
    train, validation, test = (
        [place[key] for key in (records[i].key for i in side) if key in place]
        for side in (split.train, split.validation, split.test)
    )
    lacking = {records[i].label for i in split.train} - {rest[i].label for i in train}
    if lacking or not validation or (split.test and not test):
        of_classes = f"training image of class {', '.join(sorted(lacking))}"
        empty = "test image" if validation else "validation image"
        side = of_classes if lacking else empty
        raise DataError(
            f"{len(records) - len(rest)} of {len(records)} images cannot be read, and no {side} is"
            " left; repair them, or choose another fold"
        )
    return Split(train, validation, test)


def _check_classes(found: Iterable[str]) -> None:
    names = sorted(found)
    if len(names) < 2:
        raise DataError(f"training needs at least two classes, found {', '.join(names)}")


def _check_patients(records: Sequence[Record], folds: int) -> None:
    patients: dict[str, set[str]] = {}
    for record in records:
        patients.setdefault(record.label, set()).add(record.patient)
    _check_classes(patients)
    for label, names in sorted(patients.items()):
        if len(names) == 1:
            raise DataError(
                f"class {label!r} has one patient only: it cannot stand on both sides of a split"
            )
        if len(names) < folds:
            raise DataError(
                f"class {label!r} has {len(names)} patients, fewer than the {folds} folds;"
                f" use folds={len(names)} or fewer"
                + (
                    ", with data.test=none: three sides need three patients"
                    if len(names) < 3
                    else ""
                )
            )


def write_split(
    path: str | os.PathLike[str],
    records: Sequence[Record],
    split: Split,
    *,
    test: tuple[str, Sequence[Record]] | None = None,
) -> None:
    """Write a CSV with the columns key, label, patient, split (train, validation or test).

    test: another source whose records are the test side, which a further column source names.
    """
    sides = (split.train, split.validation, split.test)
    side = {index: name for name, part in zip(SIDES, sides, strict=True) for index in part}
    rows = [
        [record.key, record.label, record.patient, side[index]]
        for index, record in enumerate(records)
        if index in side
    ]
    columns = _COLUMNS
    if test is not None:
        columns = [*_COLUMNS, _SOURCE]
        rows = [[*row, ""] for row in rows]
        rows += [[r.key, r.label, r.patient, "test", test[0]] for r in test[1]]
    text = io.StringIO(newline="")
    csv.writer(text).writerows([columns, *rows])
    write_atomically(Path(path), lambda file: file.write(text.getvalue().encode()))


def read_split(
    path: str | os.PathLike[str],
    records: Sequence[Record],
    *,
    complete: bool = True,
    other: bool = False,
) -> Split:
    """The split that `write_split` wrote, as positions in the records of today.

    Images that the split does not list are left out, with a warning that counts them. complete:
    raise where listed images are gone or have other labels; else warn of them. other: the records
    are those of the other source that is the test side.

    Raises DataError where the file is none, and where an image has no side or two.
    """
    path = Path(path)
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read ({error})") from error
    if not rows or not set(_COLUMNS) <= set(rows[0]):
        raise DataError(f"{path}: not a split file (columns {', '.join(_COLUMNS)} expected)")
    position = {record.key: index for index, record in enumerate(records)}
    rows = [row for row in rows if bool(row.get(_SOURCE)) == other]
    sides: dict[str, list[int]] = {side: [] for side in SIDES}
    gone, relabeled, others = [], [], []
    seen: set[str] = set()
    for row in rows:
        key = row["key"]
        if row["split"] not in sides:
            raise DataError(f"{path}: {key} has the unknown split {row['split']!r}")
        if key in seen:
            raise DataError(f"{path}: {key} is there twice")
        seen.add(key)
        index = position.get(key)
        if index is None:
            gone.append(key)
            continue
        if row["label"] != records[index].label:
            relabeled.append(key)
        elif row["patient"] != records[index].patient:
            others.append(key)
        sides[row["split"]].append(index)
    added = [record.key for record in records if record.key not in seen]
    need = "; a run resumes with the images that it began with: put them back, or start another"
    _report(path, gone, "listed images are not among the data", need if complete else None)
    _report(path, relabeled, "images have another label in the data", need if complete else None)
    _report(path, others, "images have another patient in the data")
    _report(path, added, "images of the data are not listed, and left out")
    return Split(*(sorted(sides[side]) for side in SIDES))


def _report(path: Path, keys: Sequence[str], what: str, advice: str | None = None) -> None:
    """Warn of images, or raise DataError with an advice."""
    if keys:
        text = f"{path}: {len(keys)} {what}, the first {keys[0]}"
        if advice is not None:
            raise DataError(text + advice)
        _log.warning("%s", text)
