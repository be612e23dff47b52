"""What a field of a configuration says of itself: its range, and when it is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Check:
    """Whether a value lies in its range, and the range in words. None always does."""

    holds: Callable[[Any], bool]
    expected: str


def at_least(low: float) -> Check:
    """From `low` on."""
    return Check(lambda v: v >= low, f"at least {low}")


def more_than(low: float) -> Check:
    """Above `low`."""
    return Check(lambda v: v > low, f"more than {low}")


def between(low: float, high: float) -> Check:
    """From `low` to `high`, both included."""
    return Check(lambda v: low <= v <= high, f"{low} to {high}")


INTERVAL = Check(lambda v: 0 <= v[0] <= v[1] <= 1, "0 <= low <= high <= 1")


def setting(
    default: Any,
    check: Check | None = None,
    *,
    when: tuple[str, ...] | None = None,
    needs: str | None = None,
) -> Any:
    """A field of a section.

    check: the range of its values. when: (field, value, ...): it is read only where that field of
    the same section has one of the values. needs: it is read only where the method's section of
    that name has any field.
    """
    return field(default=default, metadata={"check": check, "when": when, "needs": needs})
