"""Times of several competitors, taken in turn so that their ratios hold on a machine with noise."""

from __future__ import annotations

import gc
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

Call = Callable[[], object]

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
    timers = {name: _Timer(calls, synchronize) for name, calls in competitors.items()}
    round_seconds = 0.0
    for name, timer in timers.items():
        per_call = timer.warm_up() if expected is None else expected[name]
        timer.iterations = max(1, math.ceil(sample_seconds / per_call))
        timer.long = per_call >= _LONG_SECONDS
        round_seconds += (timer.iterations + (not timer.long)) * per_call
    rounds = min(max(int(seconds / round_seconds), fewest_rounds), _MOST_ROUNDS)
    shuffle = random.Random(0).shuffle
    order = list(timers.values())
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            shuffle(order)
            for timer in order:
                timer.sample()
    finally:
        if collecting:
            gc.enable()
    return {name: Samples(timer.seconds, timer.iterations) for name, timer in timers.items()}


class _Timer:
    def __init__(self, calls: Sequence[Call], synchronize: Callable[[], None]) -> None:
        self._calls = calls
        self._next = 0
        self._synchronize = synchronize
        self.iterations = 1
        self.long = False
        self.seconds: list[float] = []

    def warm_up(self) -> float:
        """Call until every input set was used or enough time has passed; seconds per call."""
        self._time(1)
        end = time.perf_counter() + _WARM_UP_SECONDS
        fastest = self._time(1)
        for _ in self._calls[2:]:
            if time.perf_counter() > end:
                break
            fastest = min(fastest, self._time(1))
        return max(fastest, 1e-9)

    def sample(self) -> None:
        if not self.long:
            self._time(1)
        self.seconds.append(self._time(self.iterations))

    def _time(self, count: int) -> float:
        calls = [self._calls[(self._next + i) % len(self._calls)] for i in range(count)]
        self._next += count
        self._synchronize()
        start = time.perf_counter()
        for call in calls:
            call()
        self._synchronize()
        return (time.perf_counter() - start) / count


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


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile, by linear interpolation."""
    ordered = sorted(values)
    found = []
    for share in (0.25, 0.5, 0.75):
        position = share * (len(ordered) - 1)
        low = math.floor(position)
        high = min(low + 1, len(ordered) - 1)
        found.append(ordered[low] + (position - low) * (ordered[high] - ordered[low]))
    return found[0], found[1], found[2]
