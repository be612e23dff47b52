"""Stratified splits that keep a patient's images together, and splits that a set publishes."""

from __future__ import annotations

import csv
import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from magsd.data.record import Record
from magsd.errors import DataError

_COLUMNS = ["key", "label", "patient", "split"]
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Split:
    """Positions in the records: those to train on, and those to validate on; both rising."""

    train: list[int]
    validation: list[int]


def choose_split(
    records: Sequence[Record],
    *,
    how: Literal["auto", "published", "folds"] = "auto",
    folds: int = 5,
    fold: int = 0,
    seed: int = 0,
) -> Split:
    """The published split, or a fold by patient.

    how: "auto" takes the published split where the records name one, "published" insists on it,
    "folds" leaves it aside. Raises DataError as `published_split` and `split_by_patient`, and where
    "auto" finds a published split but another fold than the first is asked for.
    """
    published = any(record.split for record in records)
    if how == "auto" and published and fold:
        raise DataError(
            f"fold {fold} is asked for, but the data set publishes a split; say data.split=folds,"
            " or leave out data.fold"
        )
    if how == "published" or (how == "auto" and published):
        return published_split(records)
    return split_by_patient(records, folds=folds, fold=fold, seed=seed)


def published_split(records: Sequence[Record]) -> Split:
    """The sides that the records name.

    Raises DataError where one names none, where a side is empty, or where training lacks a class.
    Patients who stand on both sides are left there, as published, with a warning.
    """
    advice = "choose folds by patient with data.split=folds"
    lacking = [record.key for record in records if record.split is None]
    if lacking:
        raise DataError(
            f"{len(lacking)} of {len(records)} images stand on no side of a published split, the"
            f" first {lacking[0]}; {advice}"
        )
    _check_classes({record.label for record in records})
    train = [i for i, record in enumerate(records) if record.split == "train"]
    validation = [i for i, record in enumerate(records) if record.split == "validation"]
    if not train or not validation:
        empty = "validation" if train else "training"
        raise DataError(f"the published split has no {empty} image here; {advice}")
    strange = {r.label for r in records} - {records[i].label for i in train}
    if strange:
        raise DataError(
            f"the published split has no training image of class {', '.join(sorted(strange))};"
            f" {advice}"
        )
    both = {records[i].patient for i in train} & {records[i].patient for i in validation}
    if both:
        _log.warning(
            "%d patients stand on both sides of the published split, e.g. %s; data.split=folds"
            " keeps them apart",
            len(both), min(both),
        )  # fmt: skip
    return Split(train, validation)


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
    left to validate on, or training lacks a class.
    """
    place = {record.key: position for position, record in enumerate(rest)}
    train, validation = (
        [place[key] for key in (records[i].key for i in side) if key in place]
        for side in (split.train, split.validation)
    )
    lacking = {record.label for record in records} - {rest[i].label for i in train}
    if lacking or not validation:
        of_classes = f"training image of class {', '.join(sorted(lacking))}"
        side = of_classes if lacking else "validation image"
        raise DataError(
            f"{len(records) - len(rest)} of {len(records)} images cannot be read, and no {side} is"
            " left; repair them, or choose another fold"
        )
    return Split(train, validation)


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
            )


def write_split(path: str | os.PathLike[str], records: Sequence[Record], split: Split) -> None:
    """Write a CSV with the columns key, label, patient, split (train or validation)."""
    side = dict.fromkeys(split.train, "train") | dict.fromkeys(split.validation, "validation")
    path = Path(path)
    temporary = path.with_name(f"{path.name}.tmp{os.getpid()}")
    with temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(_COLUMNS)
        for index, record in enumerate(records):
            if index in side:
                writer.writerow([record.key, record.label, record.patient, side[index]])
    os.replace(temporary, path)


def read_split(
    path: str | os.PathLike[str], records: Sequence[Record], *, complete: bool = True
) -> Split:
    """The split that `write_split` wrote, as positions in the records of today.

    Images that the split does not list are left out, with a warning that counts them. complete:
    raise where listed images are gone or have other labels; else warn of them.

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
    sides: dict[str, list[int]] = {"train": [], "validation": []}
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
    return Split(sorted(sides["train"]), sorted(sides["validation"]))


def _report(path: Path, keys: Sequence[str], what: str, advice: str | None = None) -> None:
    """Warn of images, or raise DataError with an advice."""
    if keys:
        text = f"{path}: {len(keys)} {what}, the first {keys[0]}"
        if advice is not None:
            raise DataError(text + advice)
        _log.warning("%s", text)
