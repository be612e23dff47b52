"""Times of several competitors, taken in turn so that their ratios hold on a machine with noise."""

from __future__ import annotations

import gc
import itertools
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

Call = Callable[[], object]
Quartiles = tuple[float, float, float]

#: A sample lasts at least this long, so that the clock and the synchronization do not count.
_SAMPLE_SECONDS = 0.01
_WARM_UP_SECONDS = 0.2
#: A call that lasts this long leaves no trace of the caches that it found.
_LONG_SECONDS = 1.0
_FEWEST_ROUNDS, _MOST_ROUNDS = 5, 60


@dataclass(frozen=True)
class Samples:
    """Seconds per call, one entry per round, each the mean over `iterations` calls."""

    seconds: list[float]
    iterations: int


def interleave(
    competitors: Mapping[str, Sequence[Call]],
    synchronize: Callable[[], None],
    seconds: float,
    sample_seconds: float = _SAMPLE_SECONDS,
    *,
    fewest_rounds: int = _FEWEST_ROUNDS,
    expected: Mapping[str, float] | None = None,
) -> dict[str, Samples]:
    """Time competitors round by round, in another order each round.

    Whatever slows the machine for a while slows all competitors of these rounds, and the ratio
    within a round stays. Each sample follows one untimed call, so that nobody pays for the caches
    that the one before left behind; calls of a second and more need none.

    Args:
        competitors: calls of each, which take turns: one per input set.
        synchronize: waits for the device.
        seconds: about how long all of it may take; at least `fewest_rounds` are run.
        sample_seconds: least length of a sample.
        fewest_rounds: below which quartiles would say little.
        expected: seconds per call of competitors that are warm already; None: warm them up.
    """
    if not competitors:
        return {}
    turns = {name: itertools.cycle(calls) for name, calls in competitors.items()}

    def timed(name: str, count: int = 1) -> float:
        """Seconds per call."""
        calls = list(itertools.islice(turns[name], count))
        synchronize()
        start = time.perf_counter()
        for call in calls:
            call()
        synchronize()
        return (time.perf_counter() - start) / count

    per_call = dict(expected or {})
    for name in competitors if expected is None else ():
        timed(name)
        end = time.perf_counter() + _WARM_UP_SECONDS
        fastest = timed(name)
        for _ in competitors[name][2:]:  # until every input set was used
            if time.perf_counter() < end:
                fastest = min(fastest, timed(name))
        per_call[name] = max(fastest, 1e-9)
    counts = {name: max(1, math.ceil(sample_seconds / per_call[name])) for name in competitors}
    untimed = {name: per_call[name] < _LONG_SECONDS for name in competitors}
    round_seconds = sum((counts[name] + untimed[name]) * per_call[name] for name in competitors)
    rounds = min(max(int(seconds / round_seconds), fewest_rounds), _MOST_ROUNDS)
    shuffle = random.Random(0).shuffle
    order = list(competitors)
    found: dict[str, list[float]] = {name: [] for name in order}
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            shuffle(order)
            for name in order:
                if untimed[name]:
                    timed(name)
                found[name].append(timed(name, counts[name]))
    finally:
        if collecting:
            gc.enable()
    return {name: Samples(times, counts[name]) for name, times in found.items()}


class Replay:
    """A clock that stands still but for the samples put into it.

    pytest-benchmark takes its timer from outside; with this one it counts, reports and saves
    samples that were taken in turn with those of other tests.
    """

    def __init__(self) -> None:
        self._now = 0.0

    def read(self) -> float:
        """Seconds."""
        return self._now

    def advance(self, seconds: float) -> None:
        """Let one sample pass."""
        self._now += seconds


def quartiles(values: Sequence[float]) -> Quartiles:
    """First quartile, median, third quartile, by linear interpolation."""
    low, middle, high = np.percentile(values, (25, 50, 75)).tolist()
    return low, middle, high


def ratios(above: Samples, below: Samples) -> Quartiles:
    """Quartiles of the ratios within rounds."""
    return quartiles([a / b for a, b in zip(above.seconds, below.seconds, strict=True)])
