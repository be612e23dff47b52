"""What must be reached, and whether it was."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.harness.comparison import LIMIT
from benchmarks.reporting.results import Key, Results, Row
from benchmarks.reporting.rivals import AHEAD, rivalries

BOTH = "forward+backward"


@dataclass(frozen=True)
class Verdict:
    """A measured figure, to be read, and whether it suffices."""

    measured: str
    met: bool


@dataclass(frozen=True)
class Target:
    """Some work and what it must reach; `judge` gives None where nothing was measured."""

    work: str
    required: str
    judge: Callable[[Results], Verdict | None]


def faster(
    key: Key, over: str, at_least: float, *, kernel: bool = False, backward: bool = False
) -> Target:
    """Ours in less time than a competitor, by wall clock or by kernel time.

    backward: both less forward, which only kernel time allows to subtract.
    """

    def judge(results: Results) -> Verdict | None:
        row = results.rows.get(key)
        if row is None or row.ours is None:
            return None
        if not kernel:
            found = row.members[row.ours].speedup(over)
            if found is None:
                return None
            low, middle, high = found
            return Verdict(f"{middle:.3g}x ({low:.3g} to {high:.3g})", middle >= at_least)
        theirs, mine = row.kernel(over), row.kernel(row.ours)
        if backward:
            forward = results.rows.get(key._replace(direction="forward"))
            theirs, mine = _less(theirs, forward, over), _less(mine, forward, row.ours)
        if not theirs or not mine:
            return None
        return Verdict(f"{theirs / mine:.3g}x", theirs / mine >= at_least)

    work = f"{key.function} {'backward' if backward else key.direction}, {key.size}"
    clock = " (kernel time)" if kernel else ""
    return Target(work, f">= {at_least:g}x {over}{clock}", judge)


def of_limit(key: Key, at_least: float) -> Target:
    """Kernel time as a share of the limit."""

    def judge(results: Results) -> Verdict | None:
        row = results.rows.get(key)
        if row is None or row.ours is None:
            return None
        limit, mine = row.kernel(LIMIT), row.kernel(row.ours)
        if not limit or not mine:
            return None
        return Verdict(f"{limit / mine:.0%}", limit / mine >= at_least)

    return Target(
        f"{key.function} {key.direction}, {key.size}", f">= {at_least:.0%} of the limit", judge
    )


def launches(key: Key, at_most: int, *, backward: bool = False) -> Target:
    """Launches of one call."""
    fact = "backward_launches" if backward else "launches"

    def judge(results: Results) -> Verdict | None:
        row = results.rows.get(key)
        if row is None or row.ours is None or fact not in row.members[row.ours].facts:
            return None
        count = row.members[row.ours].facts[fact]
        return Verdict(str(count), count <= at_most)

    work = f"{key.function} {'backward' if backward else 'forward'}, {key.size}"
    return Target(work, f"<= {at_most} launch{'es' if at_most > 1 else ''}", judge)


def ahead(at_least: float) -> Target:
    """Every row against every rival, by the lower quartile of the ratio."""

    def judge(results: Results) -> Verdict | None:
        found = list(rivalries(results))
        if not found:
            return None
        worst = min(found, key=lambda rivalry: rivalry.low)
        behind = {r.key for r in found if r.low < at_least}
        rows = len({r.key for r in found})
        text = f"{rows - len(behind)} of {rows} rows; least: {worst}"
        return Verdict(text, not behind)

    return Target("every row", f">= {at_least:g}x every rival (lower quartile)", judge)


def _less(seconds: float | None, forward: Row | None, name: str) -> float | None:
    kernel = forward.kernel(name) if forward is not None else None
    return None if seconds is None or kernel is None else seconds - kernel


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
    ahead(AHEAD),
)
GPU = (
    of_limit(_VIEWS, 0.85),
    faster(_VIEWS, "published", 1000),
    faster(_VIEWS, "compiled", 2, kernel=True),
    of_limit(_POOL, 0.6),
    faster(_POOL, "compiled", 2, kernel=True),
    faster(_POOL, "eager", 4, kernel=True),
    faster(_POOL._replace(direction=BOTH), "compiled", 2, kernel=True, backward=True),
    launches(_SCALES._replace(batch=16), 2),
    launches(_SCALES._replace(batch=16), 2, backward=True),
    faster(_SCALES, "compiled", 2, kernel=True),
    launches(_LOSS, 1),
    launches(_LOSS, 1, backward=True),
    launches(_magsd("sample_attention", "forward"), 1),
)


def targets(results: Results) -> tuple[Target, ...]:
    """Those of the machine's kind."""
    return GPU if "gpu" in results.machine else CPU
