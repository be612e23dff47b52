"""Cells of tables."""

from __future__ import annotations

#: Spellings of a cell without a value, in lower case and without outer spaces.
MISSING = frozenset(
    {"", "nan", "-nan", "na", "n/a", "n.a.", "#n/a", "#na", "<na>", "none", "null", "-"}
)
