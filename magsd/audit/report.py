"""The audit of a set of images, and what it says."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console, ConsoleOptions, RenderableType

from magsd.audit.border import border_pixels
from magsd.audit.copies import Kind, Pair, find_copies
from magsd.audit.findings import Finding, copy_findings, patient_findings, shortcut_findings
from magsd.audit.measures import measure_images
from magsd.audit.patients import PatientReport, count_patients
from magsd.audit.shortcuts import ShortcutReport, find_shortcuts
from magsd.audit.sides import Sides, default_sides
from magsd.config import load_config
from magsd.data.record import Record
from magsd.data.sources import Source, open_source
from magsd.errors import DataError
from magsd.outputs import jsonable

if TYPE_CHECKING:
    from magsd.config import Config

#: Called with what is done, and how many of how many are done.
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class CopiedImage:
    """One image of a pair; side: empty where it stands on none."""

    key: str
    label: str
    patient: str
    side: str


@dataclass(frozen=True)
class CopyPair:
    """Two images that show one picture; see `magsd.audit.copies.Pair`."""

    kind: Kind
    distance: float
    first: CopiedImage
    second: CopiedImage

    @property
    def across_sides(self) -> bool:
        """Whether they stand on different sides."""
        sides = (self.first.side, self.second.side)
        return all(sides) and sides[0] != sides[1]

    @property
    def across_classes(self) -> bool:
        """Whether they have different labels."""
        return self.first.label != self.second.label

    @property
    def across_patients(self) -> bool:
        """Whether they are said to be of different patients."""
        return self.first.patient != self.second.patient


@dataclass(frozen=True)
class AuditReport:
    """What an audit found.

    source: its spec. images: that were read. bad: key and reason of those that cannot be read.
    classes, sides: names. sides_origin: where the sides are known from, in words. pairs: copies,
    the gravest first. patients, shortcuts: see their classes.
    """

    source: str
    images: int
    classes: tuple[str, ...]
    bad: list[tuple[str, str]]
    sides: dict[str, int]
    sides_origin: str
    pairs: list[CopyPair]
    patients: PatientReport
    shortcuts: ShortcutReport

    @property
    def findings(self) -> list[Finding]:
        """What the numbers say, in sentences; warnings first."""
        found = [*copy_findings(self.pairs), *patient_findings(self.patients)]
        found += shortcut_findings(self.shortcuts)
        if self.bad:
            found.append(Finding("note", f"images that cannot be read, left out: {len(self.bad)}"))
        return sorted(found, key=lambda finding: finding.level != "warning")

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON takes it; what is not defined is None."""
        content = dataclasses.asdict(self)
        content["bad"] = [{"key": key, "reason": reason} for key, reason in self.bad]
        for name in ("across_sides", "across_classes", "across_patients"):
            for pair, item in zip(self.pairs, content["pairs"], strict=True):
                item[name] = getattr(pair, name)
        for row, item in zip(self.shortcuts.rows, content["shortcuts"]["rows"], strict=True):
            item["verdict"] = row.verdict
            item["highest_class"] = row.highest_class
        content["findings"] = [dataclasses.asdict(finding) for finding in self.findings]
        result: dict[str, Any] = jsonable(content)
        return result

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> Iterator[RenderableType]:
        from magsd.audit.tables import audit_tables

        yield from audit_tables(self)


def audit_source(
    source: Source | str,
    sides: Sides | None = None,
    *,
    config: Config | None = None,
    seed: int = 0,
    progress: Progress = lambda what, done, total: None,
) -> AuditReport:
    """Look for copies, patients on several sides, and shortcuts in a source of images.

    sides: None takes those that `magsd train` would choose by `config` (None: its defaults). seed:
    of folds and forests; the same gives the same report. progress: called with what is done and how
    many of how many are done.

    Each image is decoded once; of each 4 KB and some numbers are kept. Images that cannot be read
    are counted and left out. Raises DataError where none can be read, or a source cannot be opened.
    """
    opened = open_source(source, skip_bad=True) if isinstance(source, str) else source
    if sides is None:
        sides = default_sides(opened.records, config or load_config())
    measured = measure_images(opened, lambda done, total: progress("reading images", done, total))
    records = measured.records
    if not records:
        raise DataError(
            f"{opened.spec}: none of the {len(opened.records)} images can be read;"
            f" {measured.bad[0][0]}: {measured.bad[0][1]}"
        )
    pairs = find_copies(
        measured.thumbnails,
        measured.digests,
        lambda done, total: progress("comparing images", done, total),
    )
    border, blanked = border_pixels(opened, records, measured.thumbnails)
    shortcuts = find_shortcuts(
        measured.facts,
        border,
        [record.label for record in records],
        [record.patient for record in records],
        blanked=blanked,
        seed=seed,
        progress=lambda done, total: progress("looking for shortcuts", done, total),
    )
    of = [sides.of.get(record.key, "") for record in records]
    counts = Counter(of)
    return AuditReport(
        source=opened.spec,
        images=len(records),
        classes=tuple(opened.classes),
        bad=measured.bad,
        sides={name: counts[name] for name in sides.names()},
        sides_origin=sides.origin,
        pairs=_gravest_first(pairs, records, of),
        patients=count_patients(records, of, opened.classes),
        shortcuts=shortcuts,
    )


def _gravest_first(
    pairs: Sequence[Pair], records: Sequence[Record], sides: Sequence[str]
) -> list[CopyPair]:
    def image(position: int) -> CopiedImage:
        record = records[position]
        return CopiedImage(record.key, record.label, record.patient, sides[position])

    found = [CopyPair(p.kind, p.distance, image(p.first), image(p.second)) for p in pairs]
    return sorted(
        found,
        key=lambda pair: (
            not pair.across_sides,
            not pair.across_classes,
            not pair.across_patients,
            pair.distance,
        ),
    )
