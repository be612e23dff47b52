"""What every source of images offers."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from magsd.data.images import read_image_file, read_orientation
from magsd.data.record import Record
from magsd.data.sources.spelling import warn_of_spellings
from magsd.errors import DataError, UnknownLabelError

_FINGERPRINT_CHUNK = 64 * 1024

Options = Mapping[str, tuple[str, ...]]


class Source(ABC):
    """Records with their images and masks.

    spec: the string that opens the source again.
    classes: class names; sorted, or in the order that the caller of `open_source` gave.
    records: one `Record` an image, in a stable order.
    """

    spec: str
    classes: tuple[str, ...]
    records: tuple[Record, ...]

    @abstractmethod
    def read_image(self, record: Record) -> NDArray[np.uint8]:
        """The image, (H, W) or (H, W, 3) RGB, uint8. Raises DataError when it cannot be read."""

    @abstractmethod
    def read_mask(self, record: Record) -> NDArray[np.bool_] | None:
        """The mask, (H, W) bool of the image's size, or None."""

    @abstractmethod
    def fingerprint(self, record: Record) -> str:
        """Identity of the content of image and mask; never raises."""

    def __len__(self) -> int:
        return len(self.records)

    def _set_records(
        self,
        records: Iterable[Record],
        *,
        origin: str,
        classes: Sequence[str] | None,
        limit: int | None,
    ) -> None:
        """Check and keep the records; `origin` names the file or folder in errors."""
        kept = tuple(records)
        if not kept:
            raise DataError(f"{origin}: no images found")
        check_labels(kept, classes, origin)
        check_keys(kept, origin)
        warn_of_spellings("classes", {r.label for r in kept}, origin)
        # An image that is its own patient has its file's name.
        warn_of_spellings("patients", {r.patient for r in kept if r.patient != r.key}, origin)
        self.classes = tuple(classes) if classes else tuple(sorted({r.label for r in kept}))
        self.records = limit_records(kept, limit)


class FileSource(Source):
    """A source whose images are files, and whose masks may be.

    options: name -> values of what may follow the path as ``,name=value``; the first value is the
    default, and where none stands there any text is taken. takes_skip_bad: whether the constructor
    takes `skip_bad`, see `open_source`.
    """

    options: ClassVar[Options] = {}
    takes_skip_bad: ClassVar[bool] = False

    def mask_path(self, record: Record) -> Path | None:
        """The file that holds the record's mask."""
        return None

    def read_image(self, record: Record) -> NDArray[np.uint8]:
        """The decoded image file; see `Source.read_image`."""
        if record.path is None:
            raise DataError(f"{record.key}: the record has no image file")
        return read_image_file(record.path)

    def read_mask(self, record: Record) -> NDArray[np.bool_] | None:
        """None: images without masks; see `Source.read_mask`."""
        return None

    def _upright_size(self, record: Record) -> tuple[int, int, int]:
        """Height and width of the image, and the EXIF orientation by which it was turned."""
        height, width = self.read_image(record).shape[:2]
        return height, width, read_orientation(record.path) if record.path else 1

    def fingerprint(self, record: Record) -> str:
        """Identity from size, modification time, first and last bytes of image and mask."""
        parts = [file_fingerprint(record.path) if record.path else "none"]
        if (mask := self.mask_path(record)) is not None:
            parts.append(file_fingerprint(mask))
        return ":".join(parts)


def file_fingerprint(path: Path) -> str:
    """Identity of a file's content, "missing" where it cannot be read.

    Size, modification time and the two ends stand for the content: hashing every byte would
    make each start of a large data set wait for its whole size to be read.
    """
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            digest = hashlib.blake2b(digest_size=16)
            digest.update(f"{status.st_size}:{status.st_mtime_ns}".encode())
            digest.update(file.read(_FINGERPRINT_CHUNK))
            file.seek(max(0, status.st_size - _FINGERPRINT_CHUNK))
            digest.update(file.read(_FINGERPRINT_CHUNK))
    except OSError:
        return "missing"
    return digest.hexdigest()


def check_labels(records: Sequence[Record], classes: Sequence[str] | None, origin: str) -> None:
    """Raise UnknownLabelError where a label is not one of `classes` (None: any label)."""
    if classes is None:
        return
    known = set(classes)
    unknown = [record for record in records if record.label not in known]
    if unknown:
        first = unknown[0]
        others = f" ({len(unknown)} images have unknown labels)" if len(unknown) > 1 else ""
        theirs = ", ".join(sorted({record.label for record in records}))
        raise UnknownLabelError(
            f"{origin}: label {first.label!r} of {first.key} is not among the classes"
            f" {', '.join(classes)}{others}; the labels are {theirs}; rename them or leave these"
            " images out"
        )


def rename_labels(
    records: Sequence[Record], names: Mapping[str, str], origin: str
) -> tuple[Record, ...]:
    """The records with other labels; those whose new label is empty are left out.

    Raises DataError where a name is no label of any record, or nothing is left.
    """
    labels = {record.label for record in records}
    strange = sorted(names.keys() - labels)
    if strange:
        raise DataError(
            f"{origin}: no label {', '.join(map(repr, strange))}; there are"
            f" {', '.join(sorted(labels))}"
        )
    renamed = (dataclasses.replace(r, label=names.get(r.label, r.label)) for r in records)
    kept = tuple(record for record in renamed if record.label)
    if not kept:
        raise DataError(f"{origin}: no images are left")
    return kept


def check_keys(records: Sequence[Record], origin: str) -> None:
    """Raise DataError where two records share a key."""
    seen: set[str] = set()
    for record in records:
        if record.key in seen:
            raise DataError(f"{origin}: {record.key} is listed more than once")
        seen.add(record.key)


def limit_records(records: Sequence[Record], limit: int | None) -> tuple[Record, ...]:
    """The first `limit` records, taken in turn from every class, in their old order."""
    if limit is None or limit >= len(records):
        return tuple(records)
    if limit < 1:
        raise DataError(f"limit must be at least 1, not {limit}")
    by_class: dict[str, list[int]] = {}
    for position, record in enumerate(records):
        by_class.setdefault(record.label, []).append(position)
    turns = sorted(
        (turn, place, position)
        for place, positions in enumerate(by_class[label] for label in sorted(by_class))
        for turn, position in enumerate(positions)
    )
    return tuple(records[position] for position in sorted(turn[2] for turn in turns[:limit]))


def merge_patients(
    records: Sequence[Record], identities: Sequence[Iterable[str]]
) -> tuple[Record, ...]:
    """Give one patient name to records that share a patient or any of their identities.

    identities: for each record, further names of its patient (an annotation's patient tag).
    The joined group keeps the name that comes first in sorted order.
    """
    parent: dict[str, str] = {}

    def find(name: str) -> str:
        root = parent.setdefault(name, name)
        while root != parent[root]:
            root = parent[root]
        while parent[name] != root:
            parent[name], name = root, parent[name]
        return root

    for record, names in zip(records, identities, strict=True):
        for name in names:
            parent[find(f"identity {name}")] = find(f"patient {record.patient}")
    named: dict[str, str] = {}
    for record in records:
        root = find(f"patient {record.patient}")
        named[root] = min(named.get(root, record.patient), record.patient)
    return tuple(
        dataclasses.replace(record, patient=named[find(f"patient {record.patient}")])
        for record in records
    )
