"""What the page shows of an audit.json that `magsd audit` wrote."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from magsd.errors import DataError
from magsd.reporting.page.words import UNDEFINED, number

_KEYS = ("source", "images", "findings", "pairs", "shortcuts")
_MOST_PAIRS = 10


@dataclass(frozen=True)
class AuditTable:
    """A table of text; the first column names the rows."""

    caption: str
    columns: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class AuditView:
    """warnings, notes: sentences of the audit."""

    source: str
    images: int
    warnings: list[str]
    notes: list[str]
    tables: list[AuditTable]


def read_audit(path: Path) -> dict[str, Any]:
    """The content of an audit.json. Raises DataError where the file is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read as an audit ({error})") from None
    lacking = [key for key in _KEYS if not isinstance(content, dict) or key not in content]
    if lacking:
        raise DataError(
            f"{path}: no audit, it lacks {', '.join(lacking)}; write one with: magsd audit SOURCE"
        )
    view_audit(content, str(path))
    return dict(content)


def view_audit(content: dict[str, Any], where: str = "the audit") -> AuditView:
    """Sentences and tables of an audit. Raises DataError where it is damaged."""
    try:
        tables = [_shortcuts(content["shortcuts"]["rows"]), _pairs(content["pairs"])]
        findings = [(each["level"], str(each["text"])) for each in content["findings"]]
        return AuditView(
            str(content["source"]),
            int(content["images"]),
            [text for kind, text in findings if kind == "warning"],
            [text for kind, text in findings if kind != "warning"],
            [table for table in tables if table.rows],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{where} is damaged ({type(error).__name__}: {error}); write it again with: magsd"
            " audit SOURCE"
        ) from None


def _shortcuts(rows: Sequence[dict[str, Any]]) -> AuditTable:
    """The groups of features; those within a group that are warned of, too."""
    return AuditTable(
        "How well the class can be told from what is no disease: AUROC, mean over classes and folds"
        " by patient (standard deviation over folds); 0.5 is chance. Shuffled: the same with"
        " shuffled labels. Brightness and markers may partly be the disease itself.",
        ["feature", "AUROC", "SD", "shuffled", "verdict"],
        [
            [
                str(row["name"])
                if row["name"] == row["group"]
                else f"{row['group']}: {row['name']}",
                *(_number(row[key], digits) for key, digits in _COLUMNS),
                str(row["verdict"]),
            ]
            for row in rows
            if row["name"] == row["group"] or row["verdict"] == "warning"
        ],
    )


_COLUMNS = (("auroc", 2), ("deviation", 2), ("permuted", 2))


def _pairs(pairs: Sequence[dict[str, Any]]) -> AuditTable:
    rows = []
    for pair in pairs[:_MOST_PAIRS]:
        first, second = pair["first"], pair["second"]
        apart = [word for word in ("sides", "classes", "patients") if pair[f"across_{word}"]]
        keys = f"{first['key']} and {second['key']}"
        rows.append([keys, str(pair["kind"]), ", ".join(apart) or "nothing"])
    more = f"; {_MOST_PAIRS} of {len(pairs):,}" if len(pairs) > _MOST_PAIRS else ""
    return AuditTable(
        f"Pairs of images that show the same picture, the gravest first{more}.",
        ["images", "copy", "differ in"],
        rows,
    )


def _number(value: float | None, digits: int) -> str:
    return UNDEFINED if value is None else number(float(value), digits)
