"""What must be reached, and whether it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from benchmarks.comparison import LIMIT
from benchmarks.harness.sizes import RESNET50
from benchmarks.reporting.results import AHEAD, Key, Results, told
from benchmarks.reporting.text import ratio

FORWARD, BACKWARD, BOTH = "forward", "backward", "forward+backward"
#: A measured figure, to be read, and whether it suffices.
Verdict = tuple[str, bool]


class Target(NamedTuple):
    """Some work and what it must reach; `judge` gives None where nothing was measured."""

    work: str
    required: str
    judge: Callable[[Any], Verdict | None]


def faster(key: Key, over: str, at_least: float) -> Target:
    """Ours in less time than a competitor."""

    def judge(results: Results) -> Verdict | None:
        found = results.rows[key].speedup(over) if key in results.rows else None
        return None if found is None else (ratio(found), found[1] >= at_least)

    return Target(str(key), f">= {at_least:g}x {over}", judge)


def kernel(key: Key, over: str, at_least: float) -> Target:
    """The same by kernel time; a share of the limit, where that is the competitor."""
    limit = over == LIMIT

    def judge(results: Results) -> Verdict | None:
        theirs, mine = _kernel_seconds(results, key, over), _kernel_seconds(results, key)
        if not theirs or not mine:
            return None
        times = theirs / mine
        return f"{times:.0%}" if limit else f"{times:.3g}x", times >= at_least

    required = f"{at_least:.0%} of the limit" if limit else f"{at_least:g}x {over} (kernel time)"
    return Target(str(key), f">= {required}", judge)


def _kernel_seconds(results: Results, key: Key, name: str | None = None) -> float | None:
    """Of a member, or of ours; a backward takes what both directions take less the forward."""
    if key.direction == BACKWARD:
        both, forward = (
            _kernel_seconds(results, key._replace(direction=d), name) for d in (BOTH, FORWARD)
        )
        return both - forward if both and forward else None
    row = results.rows.get(key)
    return None if row is None else row.kernel(name or row.ours)


def launches(key: Key, at_most: int) -> Target:
    """Launches of one direction, which are counted where both are timed."""
    fact = "backward_launches" if key.direction == BACKWARD else "launches"

    def judge(results: Results) -> Verdict | None:
        row = results.rows.get(key._replace(direction=BOTH), results.rows.get(key))
        count = None if row is None else row.fact(fact)
        return None if count is None else (str(count), count <= at_most)

    return Target(str(key), f"<= {at_most} launch{'es' if at_most > 1 else ''}", judge)


def _ahead(results: Results) -> Verdict | None:
    """Every row against every rival, by the lower quartile of the ratio."""
    found = list(results.rivalries())
    if not found:
        return None
    rows = {key for key, _, _ in found}
    behind = {key for key, _, (low, _, _) in found if low < AHEAD}
    worst = min(found, key=lambda rivalry: rivalry[2][0])
    return f"{len(rows - behind)} of {len(rows)} rows; least: {told(*worst)}", not behind


_CPU_BOTH = (16, "float32", BOTH)


def _norms(results: Results) -> Verdict | None:
    """All batch norms of ResNet-50 in float32: their times together."""
    theirs = ours = 0.0
    for after, norms in RESNET50.items():
        for network, count in norms.items():
            row = results.rows.get(Key(f"batch_norm_act {after}", network.name, *_CPU_BOTH))
            if row is None or (found := row.speedup("published")) is None:
                return None
            seconds = count * row.members[str(row.ours)].median
            ours, theirs = ours + seconds, theirs + seconds * found[1]
    return f"{theirs / ours:.3g}x", theirs >= 1.5 * ours


def _magsd(function: str, direction: str, batch: int = 16, precision: str = "float32") -> Key:
    return Key(function, "magsd", batch, precision, direction)


_POOL = _magsd("bilinear_attention_pool", FORWARD, 256, "bfloat16")

CPU = (
    faster(_magsd("attention_views", FORWARD), "published", 15),
    faster(_magsd("attention_views", FORWARD), "eager", 15),
    faster(_magsd("bilinear_attention_pool", BOTH), "eager", 2.5),
    faster(_magsd("multiscale_attention", BOTH), "eager", 2),
    faster(_magsd("soft_distance_loss", BOTH), "published", 3),
    Target(
        "batch_norm_act forward+backward, ResNet-50's, B 16 float32", ">= 1.5x published", _norms
    ),
    Target("every row", f">= {AHEAD:g}x every rival (lower quartile)", _ahead),
)
GPU = (
    kernel(_magsd("attention_views", FORWARD, 256), LIMIT, 0.85),
    faster(_magsd("attention_views", FORWARD, 256), "published", 1000),
    kernel(_magsd("attention_views", FORWARD, 256), "compiled", 2),
    kernel(_POOL, LIMIT, 0.6),
    kernel(_POOL, "compiled", 2),
    kernel(_POOL, "eager", 4),
    kernel(_POOL._replace(direction=BACKWARD), "compiled", 2),
    launches(_magsd("multiscale_attention", FORWARD), 2),
    launches(_magsd("multiscale_attention", BACKWARD), 2),
    kernel(_magsd("multiscale_attention", BOTH, 256), "compiled", 2),
    launches(_magsd("soft_distance_loss", FORWARD), 1),
    launches(_magsd("soft_distance_loss", BACKWARD), 1),
    launches(_magsd("sample_attention", FORWARD), 1),
)
