"""Columns of a CSV file, with the lines they came from for errors."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from magsd.cells import MISSING
from magsd.errors import DataError

_LONGEST_LIST = 500  # characters of the names of columns in an error


@dataclass(frozen=True, eq=False)
class Columns:
    """path: the file. lines: (N,) number of each row's last line. text: cells of each column."""

    path: Path
    lines: tuple[int, ...]
    text: dict[str, tuple[str, ...]]

    def __len__(self) -> int:
        return len(self.lines)

    def array(self, name: str) -> NDArray[np.str_]:
        """A column (N,) as text without outer spaces."""
        return np.array([cell.strip() for cell in self.text[name]], dtype=np.str_)

    def numbers(self, names: Sequence[str]) -> NDArray[np.float64]:
        """Columns (N, len(names)); DataError names the first cell that is no finite number."""
        values = np.empty((len(self), len(names)))
        for k, name in enumerate(names):
            try:
                values[:, k] = np.array(self.text[name]).astype(np.float64)
            except ValueError:
                values[:, k] = [_number(cell) for cell in self.text[name]]
            bad = ~np.isfinite(values[:, k])
            if bad.any():
                row = int(bad.argmax())
                raise DataError(
                    f"{self.where(row)}: {name} is {self.text[name][row]!r}, not a finite number"
                    f" ({int(bad.sum())} such cells in this column); correct these rows or leave"
                    " them out"
                )
        return values

    def where(self, row: int) -> str:
        """The file and line of a row."""
        return f"{self.path}, line {self.lines[row]}"

    def named(self) -> str:
        """The names of the columns, for errors."""
        names = ", ".join(self.text)
        return names if len(names) <= _LONGEST_LIST else f"{names[:_LONGEST_LIST]} ..."


def is_missing(cells: NDArray[np.str_]) -> NDArray[np.bool_]:
    """Which cells (N,), without outer spaces, hold no value."""
    return np.isin(np.char.lower(cells), list(MISSING))


def read_columns(path: Path) -> Columns:
    """Columns of a CSV in UTF-8 whose cells are separated by commas.

    Raises DataError where the file cannot be read, is no such CSV, has no rows, names a column
    twice, or has a row with another number of cells than the header.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            header = _header(path, next(reader, []))
            lines, rows = [], []
            for cells in reader:
                if not cells:
                    continue
                if len(cells) != len(header):
                    raise DataError(
                        f"{path}, line {reader.line_num}: {len(cells)} cells under"
                        f" {len(header)} columns; is a cell with a comma to be quoted?"
                    )
                lines.append(reader.line_num)
                rows.append(cells)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 ({error}); save the table as CSV (UTF-8)") from error
    except csv.Error as error:
        raise DataError(
            f"{path}, line {reader.line_num}: no CSV ({error}); is a quote stray?"
        ) from error
    if not rows:
        raise DataError(f"{path}: the table has no rows")
    return Columns(path, tuple(lines), dict(zip(header, zip(*rows, strict=True), strict=True)))


def _header(path: Path, cells: list[str]) -> list[str]:
    names = [name.strip() for name in cells]
    if len(names) == 1 and any(mark in names[0] for mark in ";\t|"):
        raise DataError(f"{path}: one column only; separate the cells by commas")
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise DataError(f"{path}: two columns are named {twice[0]!r}; rename one of them")
    return names


def _number(cell: str) -> float:
    try:
        return float(cell)
    except ValueError:
        return float("nan")
