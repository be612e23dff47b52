"""Tables of predictions: one row an image, from `predictions.csv` or other people's files."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import softmax

from magsd.errors import DataError
from magsd.outputs import has_columns, write_text
from magsd.reporting.columns import Columns, is_missing, read_columns

Kind = Literal["raw", "refined"]
#: Logits of the image alone, and those averaged with the logits of its refined view.
KINDS: tuple[Kind, ...] = ("raw", "refined")
#: "external": images of a source that the run did not split.
SPLITS = ("train", "validation", "test", "external")
_OWN = ("key", "patient", "split", "label", "prediction")
_PREFIXES = ("logit_", "probability_", "refined_logit_", "refined_probability_")
# Files round their probabilities, some to three digits.
_SUM_TOLERANCE = 1e-3
# As scikit-learn's log_loss clips.
SMALLEST = float(np.finfo(np.float64).eps)

Text = NDArray[np.str_]
Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class PredictionTable:
    """Predictions of N images over K classes.

    name: what reports call it. keys, patients, splits: (N,) text; split is one of SPLITS.
    labels: (N,) int64, index of the class. probabilities: (N, K) float64, rows sum to 1.
    logits: (N, K) float64 or None. refined_*: the same of the refined logits, or None.
    extra: further columns of the file, (N,) text each. warnings: what a reader must be told.
    split_known: False where the file does not say which images the model was developed on.

    Raises ValueError where an array has another length.
    """

    name: str
    classes: tuple[str, ...]
    keys: Text
    patients: Text
    splits: Text
    labels: NDArray[np.int64]
    probabilities: Floats
    logits: Floats | None = None
    refined_probabilities: Floats | None = None
    refined_logits: Floats | None = None
    extra: dict[str, Text] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    split_known: bool = True

    def __post_init__(self) -> None:
        rows, shape = (len(self.keys),), (len(self.keys), len(self.classes))
        columns = {name: getattr(self, name) for name in ("patients", "splits", "labels")}
        for name, values in {**columns, **self.extra}.items():
            if np.shape(values) != rows:
                raise ValueError(f"{name}: expected shape {rows}, got {np.shape(values)}")
        for name in ("probabilities", "logits", "refined_probabilities", "refined_logits"):
            values = getattr(self, name)
            if values is not None and np.shape(values) != shape:
                raise ValueError(f"{name}: expected shape {shape}, got {np.shape(values)}")

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """Kinds of predictions that the table has."""
        return KINDS if self.refined_probabilities is not None else ("raw",)

    @property
    def best(self) -> Kind:
        """Refined predictions where the table has them."""
        return self.kinds[-1]

    @property
    def num_patients(self) -> int:
        """Number of different patients."""
        return len(np.unique(self.patients))

    @property
    def unnamed(self) -> int:
        """Number of images that are a patient of their own, since no patient is named."""
        alone = (self.patients == self.keys) | (self.patients == _own_patient(self.keys))
        return int(alone.sum())

    def side(self, name: str) -> PredictionTable:
        """The rows of one of SPLITS, which may be none."""
        return self.rows(self.splits == name)

    def rows(self, mask: ArrayLike) -> PredictionTable:
        """The rows where a mask (N,) is true, or those of an array of indices, in its order."""
        chosen = np.asarray(mask)

        def of(values: Floats | None) -> Floats | None:
            return None if values is None else values[chosen]

        return replace(
            self,
            keys=self.keys[chosen],
            patients=self.patients[chosen],
            splits=self.splits[chosen],
            labels=self.labels[chosen],
            probabilities=self.probabilities[chosen],
            logits=of(self.logits),
            refined_probabilities=of(self.refined_probabilities),
            refined_logits=of(self.refined_logits),
            extra={name: values[chosen] for name, values in self.extra.items()},
        )

    def of(self, kind: Kind) -> Floats:
        """Probabilities (N, K) of a kind; ValueError for refined ones that the table lacks."""
        if kind == "raw":
            return self.probabilities
        if self.refined_probabilities is None:
            raise ValueError(f"{self.name}: no refined predictions")
        return self.refined_probabilities

    def logits_of(self, kind: Kind) -> Floats:
        """Logits (N, K) of a kind; without any, logarithms of its probabilities, zeros clipped."""
        logits = self.logits if kind == "raw" else self.refined_logits
        if logits is not None:
            return logits
        return np.log(np.clip(self.of(kind), SMALLEST, None))

    def predicted(self, kind: Kind) -> NDArray[np.int64]:
        """Index (N,) of the likeliest class; the first of equals."""
        return np.asarray(self.of(kind).argmax(axis=1))


def read_predictions(path: str | os.PathLike[str], *, name: str | None = None) -> PredictionTable:
    """Read a CSV (UTF-8, commas, one row an image) into a table.

    Columns: `label`, and for every class `probability_CLASS`, `logit_CLASS` or both; optional are
    `key` (else the number of the row), `patient` (else, and where a cell is empty or spelled as one
    of `magsd.cells.MISSING`, each image is its own), `split` (one of SPLITS, else test),
    `refined_logit_CLASS` and `refined_probability_CLASS`. `prediction` is not read: it is the
    likeliest class. All others are kept as text under `extra`. Missing probabilities are the
    softmax of the logits. Classes are in the order of the columns.
    name: of the table; else that of the file, of a `predictions.csv` that of its folder.

    A patient on two sides is a warning of the table, since published splits have such patients.
    Raises DataError, with file, line and columns, for a file without labels or classes, an unknown
    label or split, a key that is there twice, and values that are no finite logits or are no
    probabilities (within 0..1, with a sum that is 1 to 0.001).
    """
    path = Path(path)
    columns = read_columns(path)
    classes = _classes(columns)
    keys = columns.array("key") if "key" in columns.text else _numbers(len(columns))
    raw, warnings = _kind(columns, classes, "")
    refined, more = _kind(columns, classes, "refined_")
    assert raw is not None
    table = PredictionTable(
        name=_name(path) if name is None else name,
        classes=classes,
        keys=keys,
        patients=_patients(columns, keys),
        splits=_splits(columns),
        labels=_labels(columns, classes),
        probabilities=raw[0],
        logits=raw[1],
        refined_probabilities=None if refined is None else refined[0],
        refined_logits=None if refined is None else refined[1],
        extra={
            name: np.array(cells, dtype=np.str_)
            for name, cells in columns.text.items()
            if not _is_own(name)
        },
        split_known="split" in columns.text,
    )
    _check_keys(columns, keys)
    return replace(table, warnings=(*warnings, *more, *_shared_patients(table)))


def write_predictions(path: str | os.PathLike[str], table: PredictionTable) -> None:
    """Write a table so that `read_predictions` returns the same, bit for bit.

    An extra column whose name the format uses is written as `csv_NAME`. `prediction` is the
    likeliest class by the refined predictions where the table has them.
    """
    path = Path(path)
    columns: dict[str, Sequence[str]] = {
        "key": table.keys.tolist(),
        "patient": table.patients.tolist(),
        "split": table.splits.tolist(),
        "label": [table.classes[k] for k in table.labels],
        "prediction": [table.classes[k] for k in table.predicted(table.best)],
    }
    numbers = (
        ("logit_", table.logits),
        ("probability_", table.probabilities),
        ("refined_logit_", table.refined_logits),
        ("refined_probability_", table.refined_probabilities),
    )
    for prefix, values in numbers:
        if values is not None:
            for k, name in enumerate(table.classes):
                # The shortest text that reads back the same float64.
                columns[prefix + name] = list(map(repr, values[:, k].tolist()))
    for name, cells in table.extra.items():
        while _is_own(name) or name in columns:
            name = f"csv_{name}"
        columns[name] = cells.tolist()
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    write_text(path, text.getvalue())


def is_predictions(path: Path) -> bool:
    """Whether `write_predictions` wrote a file."""
    return has_columns(path, *_OWN)


def _is_own(name: str) -> bool:
    return name in _OWN or name.startswith(_PREFIXES)


def _name(path: Path) -> str:
    return path.absolute().parent.name if path.stem == "predictions" else path.stem


def _classes(columns: Columns) -> tuple[str, ...]:
    """Names after the prefixes; all prefixes that are there must have the same."""
    found = {
        prefix: [name[len(prefix) :] for name in columns.text if name.startswith(prefix)]
        for prefix in _PREFIXES
    }
    classes = max(found.values(), key=len)
    if not classes:
        raise DataError(
            f"{columns.path}: no column probability_CLASS or logit_CLASS; it has"
            f" {columns.named()}; add one such column for every class"
        )
    if "label" not in columns.text:
        raise DataError(
            f"{columns.path}: no column label; it has {columns.named()}; name the column of the"
            " true classes so"
        )
    if len(classes) == 1:
        raise DataError(
            f"{columns.path}: {classes[0]!r} is the only class; add a column for the other one"
            " (1 - probability)"
        )
    for prefix, names in found.items():
        for name in classes:
            if names and name not in names:
                raise DataError(f"{columns.path}: no column {prefix}{name}; add it")
    return tuple(classes)


def _kind(
    columns: Columns, classes: Sequence[str], prefix: str
) -> tuple[tuple[Floats, Floats | None] | None, list[str]]:
    """Probabilities and logits of a kind, if there are any, and warnings."""
    logits = probabilities = None
    names = [f"{prefix}logit_{name}" for name in classes]
    if names[0] in columns.text:
        logits = columns.numbers(names)
    names = [f"{prefix}probability_{name}" for name in classes]
    if names[0] in columns.text:
        probabilities = columns.numbers(names)
        _check_probabilities(columns, names, probabilities)
    if probabilities is None:
        return (None if logits is None else (softmax(logits, axis=1), logits)), []
    if logits is None:
        return (probabilities, None), []
    apart = float(np.abs(softmax(logits, axis=1) - probabilities).max())
    warnings = []
    if apart > _SUM_TOLERANCE:
        warnings = [
            f"{columns.path}: columns {prefix}probability_* differ by up to {apart:.3g} from the"
            f" softmax of {prefix}logit_*; measures use the former, calibration the latter"
        ]
    return (probabilities, logits), warnings


def _check_probabilities(columns: Columns, names: Sequence[str], values: Floats) -> None:
    bad = (values < 0) | (values > 1)
    if bad.any():
        row, k = (int(i) for i in np.argwhere(bad)[0])
        raise DataError(
            f"{columns.where(row)}: {names[k]} is {values[row, k]:g}, not within 0..1"
            f" ({int(bad.any(axis=1).sum())} such rows); are these logits? Then name the columns"
            " logit_CLASS"
        )
    sums = values.sum(axis=1)
    bad = np.abs(sums - 1) > _SUM_TOLERANCE
    if bad.any():
        row = int(bad.argmax())
        raise DataError(
            f"{columns.where(row)}: {names[0]} to {names[-1]} sum to {sums[row]:.6g}, not to 1"
            f" ({int(bad.sum())} such rows); classes must exclude each other, and every class needs"
            " its column"
        )


def _labels(columns: Columns, classes: Sequence[str]) -> NDArray[np.int64]:
    index = {name: k for k, name in enumerate(classes)}
    labels = [index.get(cell.strip(), -1) for cell in columns.text["label"]]
    if -1 in labels:
        row = labels.index(-1)
        label = columns.text["label"][row]
        raise DataError(
            f"{columns.where(row)}: the label {label!r} has no column probability_{label}"
            f" ({labels.count(-1)} such rows); the classes are {', '.join(classes)}"
        )
    return np.array(labels, dtype=np.int64)


def _splits(columns: Columns) -> Text:
    if "split" not in columns.text:
        return np.full(len(columns), "test")
    splits = columns.array("split")
    unknown = ~np.isin(splits, SPLITS)
    if unknown.any():
        row = int(unknown.argmax())
        raise DataError(
            f"{columns.where(row)}: unknown split {str(splits[row])!r}; expected one of"
            f" {', '.join(SPLITS)}"
        )
    return splits


def _numbers(rows: int) -> Text:
    return np.arange(1, rows + 1).astype(np.str_)


def _patients(columns: Columns, keys: Text) -> Text:
    if "patient" not in columns.text:
        return keys
    patients = columns.array("patient")
    return np.where(is_missing(patients), _own_patient(keys), patients)


def _own_patient(keys: Text) -> Text:
    """Patients of images without one: not the keys alone, which another row's patient may have."""
    return np.char.add("image ", keys)


def _check_keys(columns: Columns, keys: Text) -> None:
    first: dict[str, int] = {}
    for row, key in enumerate(keys.tolist()):
        if not key:
            raise DataError(f"{columns.where(row)}: the key is empty; name every image")
        if first.setdefault(key, row) != row:
            raise DataError(
                f"{columns.where(row)}: the key {key!r} is on line {columns.lines[first[key]]},"
                " too; keep one of the rows or rename one"
            )


def _shared_patients(table: PredictionTable) -> list[str]:
    """Warnings of patients that stand on more than one side."""
    pairs = np.unique(np.stack([table.patients, table.splits]), axis=1)
    names, counts = np.unique(pairs[0], return_counts=True)
    shared = names[counts > 1]
    if not len(shared):
        return []
    sides = sorted(set(pairs[1][np.isin(pairs[0], shared)].tolist()), key=SPLITS.index)
    return [
        f"{len(shared)} patients have images in more than one of {', '.join(sides)}, the first"
        f" {shared[0]}: results of these sides depend on each other"
    ]
