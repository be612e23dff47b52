"""Lines for a terminal in which names are printed as they are.

Rich takes brackets in a string for its markup and :words: for emoji; classes, files and folders may
have such names. In tables a name is a `rich.text.Text`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

_LISTED = 12


def say(console: Console, text: str, *, first: str = "", style: str = "yellow") -> None:
    """Print a line without breaks; before it, where given, `first` in a style."""
    from rich.text import Text

    line = Text.assemble((first, style), " " if first else "", text)
    console.print(line, highlight=False, soft_wrap=True)


def listed(names: Sequence[str]) -> str:
    """Names between commas, of many the first ten."""
    if len(names) <= _LISTED:
        return ", ".join(names)
    return f"{', '.join(names[:10])} and {len(names) - 10} more"
