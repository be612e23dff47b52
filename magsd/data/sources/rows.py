"""Rows of the text files that data sets are described by."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from magsd.errors import DataError


def read_rows(
    path: Path, required: Sequence[str], *, advice: str = ""
) -> list[tuple[int, dict[str, str]]]:
    """Line number and columns of every row of a CSV.

    required: columns that must be there. Names of columns are compared, and returned, in lower
    case without outer spaces. advice: added to the error about a column that is missing. Raises
    DataError where the file is missing, is no CSV, lacks a column or has no rows.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            given = list(reader.fieldnames or [])
            columns = reader.fieldnames = [name.strip().lower() for name in given]
            lacking = [name for name in required if name not in columns]
            if lacking:
                raise DataError(
                    f"{path}: no column {' and no column '.join(lacking)}; it has"
                    f" {', '.join(given) or 'none'}{advice}"
                )
            rows = [(reader.line_num, {k: v or "" for k, v in row.items() if k}) for row in reader]
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read as CSV ({error})") from error
    if not rows:
        raise DataError(f"{path}: the table has no rows")
    return rows


def read_words(path: Path, at_least: int) -> list[list[str]]:
    """The words of every line that is not empty.

    Raises DataError where the file cannot be read or a line has fewer than `at_least` words.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from error
    rows = []
    for number, line in enumerate(lines, 1):
        if words := line.split():
            if len(words) < at_least:
                raise DataError(
                    f"{path}, line {number}: {at_least} words expected, found {line.strip()!r}"
                )
            rows.append(words)
    return rows
