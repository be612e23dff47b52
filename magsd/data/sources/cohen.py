"""`cohen:DIR`: the COVID-19 image data collection (Cohen et al., arXiv 2003.11597)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from magsd.data.record import Cells, Record
from magsd.data.sources.base import Options
from magsd.data.sources.files import holder
from magsd.data.sources.published import PublishedSource
from magsd.data.sources.radiographs import VIEWS, shows_view
from magsd.data.sources.rows import read_table

_COLUMNS = ("patientid", "finding", "view", "filename")
# What predictions are told of an image.
_EXTRA = ("sex", "age", "view")

# The first part of a finding that stands here decides: "Pneumonia/Viral/COVID-19" is COVID-19.
# Early versions of the table name the germ alone.
CLASS_OF_PART = {
    "COVID-19": "COVID-19",
    "Viral": "Viral Pneumonia",
    "SARS": "Viral Pneumonia",
    "MERS": "Viral Pneumonia",
    "Varicella": "Viral Pneumonia",
    "Bacterial": "Bacterial Pneumonia",
    "Streptococcus": "Bacterial Pneumonia",
    "Klebsiella": "Bacterial Pneumonia",
    "Legionella": "Bacterial Pneumonia",
    "Fungal": "Fungal Pneumonia",
    "Pneumocystis": "Fungal Pneumonia",
    "Tuberculosis": "Tuberculosis",
    "No Finding": "No Finding",
}


class CohenSource(PublishedSource):
    """The frontal radiographs of metadata.csv whose finding has a class.

    Left out, with a warning that counts them: CT and lateral views, and findings without a class
    (pneumonia of no or another named cause, ARDS alone, "Unknown", "todo"). Images of one patientid
    are one patient's. There is no published split.
    """

    kind = "cohen"
    name = "the COVID-19 image data collection"
    home = "https://github.com/ieee8023/covid-chestxray-dataset"
    options: ClassVar[Options] = {"view": VIEWS}

    def _find(self) -> Iterator[Record]:
        others = unclear = nameless = 0
        self._base = holder(self.folder, "metadata.csv") or self._need("metadata.csv").parent
        rows, written = read_table(self._base / "metadata.csv", _COLUMNS)
        extra = [name for name in _EXTRA if name in written]
        names = tuple(written[name] for name in extra)
        for _, row in rows:
            name = row["filename"].strip()
            radiograph = row.get("modality", "X-ray").strip().lower() in ("x-ray", "xray", "")
            volume = name.lower().endswith((".nii", ".gz", ".zip"))
            if volume or not (radiograph and shows_view(row["view"], self.choice["view"])):
                others += 1
                continue
            label = class_of(row["finding"])
            if label is None:
                unclear += 1
                continue
            if not name:
                nameless += 1
                continue
            path = self._place(row.get("folder", "").strip() or "images", name)
            cells = Cells(names, tuple(row[name] for name in extra))
            yield self._record(path, label, patient=row["patientid"].strip(), extra=cells)
        self._left_out(others, f"that are no radiographs of the view {self.choice['view']}")
        self._left_out(unclear, "whose finding has no class")
        self._left_out(nameless, "without a file name")

    def _place(self, folder: str, name: str) -> Path:
        """The file in its folder; some copies have all of them in images/ or in DIR."""
        places = [self._base / folder, self._base / "images", self._base]
        return next((p for place in places if (p := place / name).is_file()), places[0] / name)


def class_of(finding: str) -> str | None:
    """The class of a finding, or None."""
    parts = {part.strip() for part in re.split("[/,]", finding)}
    return next((name for part, name in CLASS_OF_PART.items() if part in parts), None)
