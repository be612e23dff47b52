"""What a training step costs on W processes: the model of docs/scaling.md, and its tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.reporting.tables import seconds, table

#: Processes, and images of each, for which the model is asked.
PROCESSES, IMAGES = (8, 64, 1024), (16, 64, 256)
#: Processes of one machine; more are on several.
MACHINE = 8
#: Assumed, where nothing was measured: bytes a second each way of a network adapter.
BETWEEN_MACHINES = 50e9


@dataclass(frozen=True)
class Constants:
    """What the model knows of a machine and a network.

    gradient: bytes. buckets: parts in which it is exchanged. rate: images a second of a process,
    one forward and backward each. bandwidth: bytes a second of a process each way. latency: seconds
    a hop.
    """

    gradient: float
    buckets: int
    rate: float
    bandwidth: float
    latency: float
    passes: int = 4


@dataclass(frozen=True)
class Cost:
    """Seconds of a step and of what it is made of."""

    compute: float
    exchange: float
    exposed: float

    @property
    def step(self) -> float:
        """The whole step."""
        return self.compute + self.exposed


def predict(constants: Constants, processes: int, images: int) -> Cost:
    """What a step with so many images in each of so many processes costs."""
    compute = constants.passes * images / constants.rate
    if processes == 1:
        return Cost(compute, 0.0, 0.0)
    moved = 2 * (processes - 1) / processes * constants.gradient
    waiting = constants.buckets * hops(processes) * constants.latency
    exchange = moved / constants.bandwidth + waiting
    # Only the raw image's backward, the last of all, is left to hide behind.
    exposed = max(exchange - compute / 6, exchange / constants.buckets)
    return Cost(compute, exchange, exposed)


def hops(processes: int) -> float:
    """Messages after one another in the exchange of a bucket."""
    return 2 * math.log2(processes)


def bandwidth_of(
    exchange: float, processes: int, gradient: float, buckets: int, latency: float
) -> float:
    """The bandwidth with which the model explains a measured exchange."""
    waiting = buckets * hops(processes) * latency
    return 2 * (processes - 1) / processes * gradient / max(exchange - waiting, 1e-9)


def render(saved: dict[str, Any]) -> str:
    """Markdown from the saved JSON."""
    known = Constants(**saved["constants"])
    here = predict(known, saved["processes"], saved["images"])
    measured = saved["measured"]
    facts = [*((name, str(value)) for name, value in saved["machine_info"].items())]
    constants = [
        ("gradient", f"{known.gradient / 1e6:.0f} MB"),
        ("buckets", str(known.buckets)),
        ("rate", f"{known.rate:.4g} images/s, one forward and backward each"),
        ("bandwidth", f"{known.bandwidth / 1e9:.3g} GB/s each way"),
        ("latency", f"{known.latency * 1e6:.3g} us a hop"),
    ]
    step = [
        ("step without exchange", seconds(measured["alone"]), seconds(here.compute)),
        ("exchange by itself", seconds(measured["exchange"]), seconds(here.exchange)),
        ("step with exchange", seconds(measured["joined"]), seconds(here.step)),
    ]
    parts = [
        "# Several processes: " + saved["machine_info"]["machine"],
        table(("", ""), facts),
        f"Measured with {saved['processes']} processes of {saved['images']} images each,"
        f" {saved['backbone']}, {saved['side']}², {saved['arithmetic']}, channels_last: whole"
        " steps of training. Medians; of the processes the slowest.",
        table(("constant", "measured"), constants),
        "The first two lines made the constants; the third tests the model.",
        table(("", "measured", "the model"), step),
        "What the model makes of these constants, were there so many such processes, with"
        f" {BETWEEN_MACHINES / 1e9:.0f} GB/s each way between machines of {MACHINE} at most"
        " (assumed, not measured):",
        _predictions(known),
    ]
    return "\n\n".join(parts) + "\n"


def _predictions(known: Constants) -> str:
    rows: list[Sequence[str]] = []
    for processes in PROCESSES:
        slower = min(known.bandwidth, BETWEEN_MACHINES)
        bandwidth = known.bandwidth if processes <= MACHINE else slower
        constants = Constants(
            known.gradient, known.buckets, known.rate, bandwidth, known.latency, known.passes
        )
        for images in IMAGES:
            cost = predict(constants, processes, images)
            parts = (cost.compute, cost.exchange, cost.exposed, cost.step)
            share = f"{cost.compute / cost.step:.0%}"
            rows.append((str(processes), str(images), *map(seconds, parts), share))
    head = ("processes", "images of each", "compute", "exchange", "exposed", "step")
    return table((*head, "compute / step"), rows)
