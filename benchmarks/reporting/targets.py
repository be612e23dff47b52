"""What must be reached, and whether it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from benchmarks.harness.comparison import LIMIT
from benchmarks.reporting.results import AHEAD, Key, Results, Row, told
from benchmarks.reporting.text import ratio

BOTH = "forward+backward"
#: A measured figure, to be read, and whether it suffices.
Verdict = tuple[str, bool]


class Target(NamedTuple):
    """Some work and what it must reach; `judge` gives None where nothing was measured."""

    work: str
    required: str
    judge: Callable[[Any], Verdict | None]


def of_row(
    key: Key, required: str, judge: Callable[[Row], Verdict | None], direction: str = ""
) -> Target:
    """A target of one row."""

    def find(results: Results) -> Verdict | None:
        return judge(results.rows[key]) if key in results.rows else None

    return Target(f"{key.function} {direction or key.direction}, {key.size}", required, find)


def faster(key: Key, over: str, at_least: float) -> Target:
    """Ours in less time than a competitor."""

    def judge(row: Row) -> Verdict | None:
        found = row.speedup(over)
        return None if found is None else (ratio(found), found[1] >= at_least)

    return of_row(key, f">= {at_least:g}x {over}", judge)


def kernel(key: Key, over: str, at_least: float) -> Target:
    """The same by kernel time; a share of the limit, where that is the competitor."""

    def judge(row: Row) -> Verdict | None:
        theirs, mine = row.kernel(over), row.kernel(row.ours)
        if not theirs or not mine:
            return None
        text = f"{theirs / mine:.0%}" if over == LIMIT else f"{theirs / mine:.3g}x"
        return text, theirs / mine >= at_least

    limit = f">= {at_least:.0%} of the limit"
    return of_row(key, limit if over == LIMIT else f">= {at_least:g}x {over} (kernel time)", judge)


def backward(key: Key, over: str, at_least: float) -> Target:
    """Kernel time of both directions less that of the forward."""

    def judge(results: Results) -> Verdict | None:
        both, forward = (results.rows.get(key._replace(direction=d)) for d in (BOTH, "forward"))
        if both is None or forward is None:
            return None
        spent = []
        for name in (over, both.ours):
            together, first = both.kernel(name), forward.kernel(name)
            if together is None or first is None or together == first:
                return None
            spent.append(together - first)
        found = spent[0] / spent[1]
        return f"{found:.3g}x", found >= at_least

    work = f"{key.function} backward, {key.size}"
    return Target(work, f">= {at_least:g}x {over} (kernel time)", judge)


def launches(key: Key, at_most: int, direction: str = "forward") -> Target:
    """Launches of one call."""
    fact = "launches" if direction == "forward" else "backward_launches"

    def judge(row: Row) -> Verdict | None:
        count = row.fact(fact)
        return None if count is None else (str(count), count <= at_most)

    required = f"<= {at_most} launch{'es' if at_most > 1 else ''}"
    return of_row(key, required, judge, direction)


def _ahead(results: Results) -> Verdict | None:
    """Every row against every rival, by the lower quartile of the ratio."""
    found = list(results.rivalries())
    if not found:
        return None
    rows = {key for key, _, _ in found}
    behind = {key for key, _, (low, _, _) in found if low < AHEAD}
    worst = min(found, key=lambda rivalry: rivalry[2][0])
    return f"{len(rows - behind)} of {len(rows)} rows; least: {told(*worst)}", not behind


def _magsd(function: str, direction: str, batch: int = 16, precision: str = "float32") -> Key:
    return Key(function, "magsd", batch, precision, direction)


_VIEWS = _magsd("attention_views", "forward", 256)
_POOL = _magsd("bilinear_attention_pool", "forward", 256, "bfloat16")
_SCALES = _magsd("multiscale_attention", BOTH, 256)
_LOSS = _magsd("soft_distance_loss", BOTH)

CPU = (
    faster(_magsd("attention_views", "forward"), "published", 15),
    faster(_magsd("attention_views", "forward"), "eager", 15),
    faster(_magsd("bilinear_attention_pool", BOTH), "eager", 2.5),
    faster(_magsd("multiscale_attention", BOTH), "eager", 2),
    faster(_LOSS, "published", 3),
    Target("every row", f">= {AHEAD:g}x every rival (lower quartile)", _ahead),
)
GPU = (
    kernel(_VIEWS, LIMIT, 0.85),
    faster(_VIEWS, "published", 1000),
    kernel(_VIEWS, "compiled", 2),
    kernel(_POOL, LIMIT, 0.6),
    kernel(_POOL, "compiled", 2),
    kernel(_POOL, "eager", 4),
    backward(_POOL, "compiled", 2),
    launches(_SCALES._replace(batch=16), 2),
    launches(_SCALES._replace(batch=16), 2, "backward"),
    kernel(_SCALES, "compiled", 2),
    launches(_LOSS, 1),
    launches(_LOSS, 1, "backward"),
    launches(_magsd("sample_attention", "forward"), 1),
)
