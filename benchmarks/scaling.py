"""What several processes cost: `torchrun --nproc-per-node=W -m benchmarks.scaling`.

Measures a training step without and with the exchange of gradients, and the exchange by itself,
and holds the model of docs/scaling.md against them. Writes scaling.json and scaling.md.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from benchmarks.harness.device import Device, command_line
from benchmarks.harness.machine import RESULTS, describe, folder, write
from benchmarks.harness.sizes import MAGSD
from benchmarks.harness.steps import BFLOAT16, FLOAT32, OURS, draw_batch, networks, train_step
from benchmarks.harness.timing import Call, quartiles
from benchmarks.reporting.tables import heading
from benchmarks.reporting.text import seconds, table
from magsd.config import TrainConfig
from magsd.data import Part
from magsd.distributed import ALONE, Team, team_of
from magsd.runtime import Runtime
from magsd.training.step import BatchShard

_BUCKET = 25 << 20  # DistributedDataParallel's default
_WARM_UP = 2


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


class Cost(NamedTuple):
    """Seconds of a step and of what it is made of."""

    compute: float
    exchange: float
    exposed: float
    step: float


def predict(constants: Constants, processes: int, images: int) -> Cost:
    """What a step with so many images in each of so many processes costs."""
    compute = constants.passes * images / constants.rate
    if processes == 1:
        return Cost(compute, 0.0, 0.0, compute)
    moved = 2 * (processes - 1) / processes * constants.gradient
    waiting = constants.buckets * hops(processes) * constants.latency
    exchange = moved / constants.bandwidth + waiting
    # Only the raw image's backward, the last of all, is left to hide behind.
    exposed = max(exchange - compute / 6, exchange / constants.buckets)
    return Cost(compute, exchange, exposed, compute + exposed)


def hops(processes: int) -> float:
    """Messages after one another in the exchange of a bucket."""
    return 2 * math.log2(processes)


def bandwidth_of(
    exchange: float, processes: int, gradient: float, buckets: int, latency: float
) -> float:
    """The bandwidth with which the model explains a measured exchange."""
    waiting = buckets * hops(processes) * latency
    return 2 * (processes - 1) / processes * gradient / max(exchange - waiting, 1e-9)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line, in each process."""
    parser = command_line("scaling", __doc__)
    add = parser.add_argument
    add("--images", type=int, default=16, help="of each process")
    add("--backbone", default="resnet50", help="any of timm's with feature maps")
    add("--side", type=int, default=MAGSD.side, help="of the images, in pixels")
    add("--rounds", type=int, default=5)
    add("--precision", choices=(FLOAT32, BFLOAT16), default=BFLOAT16)
    add("--out", type=Path, metavar="DIR", help="default: results/<machine>")
    options = parser.parse_args(arguments)
    with team_of(TrainConfig(device=options.device, batch_size=1 << 20)) as team:
        if team.size < 2:
            raise SystemExit("one process exchanges nothing: torchrun --nproc-per-node=2 or more")
        saved = measure(team, options)
        if team.is_main:
            out = options.out or RESULTS / folder(Device(options.device))
            write(out / "scaling.json", json.dumps(saved, indent=1) + "\n")
            write(out / "scaling.md", render(saved))
            print(out / "scaling.md")
    return 0


def measure(team: Team, options: argparse.Namespace) -> dict[str, Any]:
    """Constants of the model, and what they were read off."""
    device = Device(options.device)
    model = networks(options.backbone, options.device)[OURS]
    gradient = sum(4 * p.numel() for p in model.parameters())
    buckets = -(-gradient // _BUCKET)
    parts = list(torch.empty(gradient // 4, device=options.device).split(_BUCKET // 4))
    one = torch.zeros(1, device=options.device)

    def exchange() -> None:
        for work in [dist.all_reduce(part, async_op=True) for part in parts]:
            work.wait()

    calls = {
        "alone": _step(ALONE, team, model, options),
        "joined": _step(team, team, model, options),
        "exchange": exchange,
        "small": lambda: dist.all_reduce(one),
    }
    times = {name: _seconds(call, device, options.rounds) for name, call in calls.items()}
    latency = times["small"] / hops(team.size)
    bandwidth = bandwidth_of(times["exchange"], team.size, gradient, buckets, latency)
    rate = Constants.passes * options.images / times["alone"]
    told = {name: getattr(options, name) for name in ("images", "backbone", "side")}
    return {
        "machine_info": describe(device),
        "processes": team.size,
        **told,
        "arithmetic": options.precision,
        "measured": times,
        "constants": asdict(Constants(gradient, buckets, rate, bandwidth, latency)),
    }


def _step(among: Team, team: Team, model: nn.Module, options: argparse.Namespace) -> Call:
    """A training step whose gradients are exchanged among some processes of the team."""
    runtime = Runtime(torch.device(options.device), options.precision, channels_last=True)
    batch = draw_batch(Device(options.device), options.images, options.side, team.rank)
    generator = torch.Generator(options.device).manual_seed(0)
    part = Part(team.rank * options.images, team.size * options.images)
    step = train_step(runtime.model(copy.deepcopy(model)), runtime, among)
    return partial(step, *batch, generator, BatchShard(part, 1.0, 1.0, team.all_reduce))


def _seconds(call: Call, device: Device, rounds: int) -> float:
    """Median over the rounds of what the slowest process took; all begin each round together."""
    times = []
    for number in range(_WARM_UP + rounds):
        dist.barrier()
        taken = torch.tensor(device.seconds(call), dtype=torch.float64)
        dist.all_reduce(taken, dist.ReduceOp.MAX)
        if number >= _WARM_UP:
            times.append(float(taken))
    return quartiles(times)[1]


def render(saved: dict[str, Any]) -> str:
    """Markdown from the saved JSON."""
    known = Constants(**saved["constants"])
    here = predict(known, saved["processes"], saved["images"])
    measured = saved["measured"]
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
        heading("Several processes", saved["machine_info"]),
        f"Measured with {saved['processes']} processes of {saved['images']} images each,"
        f" {saved['backbone']}, {saved['side']}², {saved['arithmetic']}, channels_last: whole"
        " steps of training. Medians; of the processes the slowest.",
        table(("constant", "measured"), constants),
        "The first two lines made the constants; the third tests the model.",
        table(("", "measured", "the model"), step),
    ]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    sys.exit(main())
