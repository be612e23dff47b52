"""Rows of the text files that data sets are described by."""

from __future__ import annotations

import csv
import io
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from magsd.errors import DataError

_DELIMITERS = (",", ";", "\t", "|")
_NO_TEXT = {
    b"PK\x03\x04": "a workbook of Excel (xlsx) or another zip file",
    b"\xd0\xcf\x11\xe0": "a workbook of Excel (xls)",
    b"\x1f\x8b": "a file compressed by gzip",
    b"PAR1": "Parquet",
}
_SEPARATOR = re.compile(r"\"?sep=(.)\"?[,;\t|]*\s*", re.IGNORECASE)
_LONGEST_LIST = 500  # characters of the names of columns in an error
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")
_log = logging.getLogger(__name__)


Rows = list[tuple[int, dict[str, str]]]


def read_rows(
    path: Path,
    required: Sequence[str],
    *,
    advice: Callable[[Sequence[str]], str] = lambda columns: "",
) -> Rows:
    """Line number and columns of every row of a CSV; see `read_table`."""
    return read_table(path, required, advice=advice)[0]


def read_table(
    path: Path,
    required: Sequence[str],
    *,
    advice: Callable[[Sequence[str]], str] = lambda columns: "",
) -> tuple[Rows, dict[str, str]]:
    """Line number and columns of every row of a CSV, and each column's name as it is written.

    Cells are separated by commas, semicolons, tabs or bars, whichever the header has, or as a first
    line such as sep=; says; the text is UTF-8, UTF-16, or else Latin-1, with a warning. required:
    columns that must be there. Names of columns are compared, and returned, in lower case without
    outer spaces. advice: what it makes of the columns is added to the error about a missing one.

    Raises DataError where the file is missing, is no CSV, lacks a column, has two of one name or no
    rows, or where a row has more cells than the header or a cell that no line ends. Rows of fewer
    cells are warned of.
    """
    lines = list(io.StringIO(_text(path), newline=""))
    first, delimiter = 0, ""
    if lines and (said := _SEPARATOR.fullmatch(lines[0])):
        first, delimiter = 1, said[1]
    while first < len(lines) and not lines[first].strip():
        first += 1
    head = lines[first] if len(lines) > first else ""
    delimiter = delimiter or _delimiter(head, required)
    reader = csv.reader(lines[first:], delimiter=delimiter, strict=True, skipinitialspace=True)
    given = _next(path, reader, first) or []
    columns = _columns(path, given, required, advice)
    rows = list(_cells(path, reader, columns, first))
    if not rows:
        raise DataError(f"{path}: the table has no rows")
    return rows, dict(zip(columns, map(str.strip, given), strict=True))


def _delimiter(head: str, required: Sequence[str]) -> str:
    """The one under which the header has most of the required columns, else most columns."""

    def columns(delimiter: str) -> tuple[int, int]:
        reader = csv.reader([head], delimiter=delimiter, skipinitialspace=True)
        try:
            names = [name.strip().lower() for name in next(reader, [])]
        except csv.Error:  # told of when the header is read
            return 0, 0
        return sum(name in names for name in required), len(names)

    return max(_DELIMITERS, key=columns)


def _text(path: Path) -> str:
    """The content of a text file."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    for start, what in _NO_TEXT.items():
        if data.startswith(start):
            raise DataError(f"{path}: {what}, not a CSV; save the table as CSV (UTF-8)")
    try:
        text = data.decode("utf-16" if data.startswith(_UTF_16) else "utf-8-sig")
    except UnicodeDecodeError:
        text = data.decode("latin-1")
        _log.warning("%s: not UTF-8; read as Latin-1", path)
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise DataError(f"{path}, line {line}: a NUL byte; save the table as UTF-8 text")
    return text


def _columns(
    path: Path, given: list[str], required: Sequence[str], advice: Callable[[Sequence[str]], str]
) -> list[str]:
    """The names of the columns, empty where a column has none."""
    columns = [name.strip().lower() for name in given]
    lacking = [name for name in required if name not in columns]
    if lacking:
        names = ", ".join(given) or "none"
        if len(names) > _LONGEST_LIST:
            names = f"{names[:_LONGEST_LIST]} ..."
        quoted = len(given) == 1 and any(mark in given[0] for mark in _DELIMITERS)
        hint = "; it is quoted as a whole: save the table again" if quoted else advice(given)
        raise DataError(
            f"{path}: no column {' and no column '.join(lacking)}; it has {names}{hint}"
        )
    twice = [name for name, count in Counter(columns).items() if count > 1 and name]
    if twice:
        raise DataError(f"{path}: two columns are named {twice[0]!r}; rename one of them")
    return columns


def _next(path: Path, reader: Any, first: int) -> list[str] | None:
    """The next row, or None at the end."""
    line = first + reader.line_num + 1
    try:
        return next(reader, None)
    except csv.Error as error:
        raise DataError(f"{path}, line {line}: no CSV ({error}); is a quote stray?") from error


def _cells(
    path: Path, reader: Any, columns: list[str], first: int
) -> Iterator[tuple[int, dict[str, str]]]:
    """Line number and cells by column, of rows that are not empty."""
    short = []
    while (cells := _next(path, reader, first)) is not None:
        line = first + reader.line_num
        if any(cells[len(columns) :]):
            raise DataError(
                f"{path}, line {line}: {len(cells)} cells under {len(columns)} columns; is one of"
                " them to be quoted?"
            )
        if any(map(str.strip, cells)):
            if any(columns[len(cells) :]):
                short.append(line)
            padded = [*cells, *[""] * (len(columns) - len(cells))]
            yield line, {name: cell for name, cell in zip(columns, padded, strict=False) if name}
    if short:
        _log.warning(
            "%s: %d rows have fewer cells than the header, the first on line %d; the last ones are"
            " taken as empty",
            path, len(short), short[0],
        )  # fmt: skip


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
