"""Names that differ in spelling alone, which often mean one thing."""

from __future__ import annotations

import logging
import re
import unicodedata
from collections.abc import Iterable

_NUMBER = re.compile(r"0*(\d+)(?:\.0+)?")
_NAMED = 5
_log = logging.getLogger(__name__)


def warn_of_spellings(what: str, names: Iterable[str], origin: str) -> None:
    """Warn where names differ in case, spaces, Unicode form, or as the numbers 1, 1.0 and 001."""
    found: dict[str, set[str]] = {}
    for name in names:
        found.setdefault(_plain(name), set()).add(name)
    alike = [sorted(spellings) for spellings in found.values() if len(spellings) > 1]
    if alike:
        shown = "; ".join(", ".join(map(repr, spellings)) for spellings in sorted(alike)[:_NAMED])
        more = f"; and {len(alike) - _NAMED} more" if len(alike) > _NAMED else ""
        _log.warning(
            "%s: %s that differ only in spelling are treated as different: %s%s",
            origin, what, shown, more,
        )  # fmt: skip


def _plain(name: str) -> str:
    """The same for spellings of one name."""
    text = re.sub(r"[\s_-]+", " ", unicodedata.normalize("NFKC", name)).strip().casefold()
    number = _NUMBER.fullmatch(text)
    return number[1] if number else text
