"""What several processes cost: `torchrun --nproc-per-node=W -m benchmarks.scaling`.

Measures a training step without and with the exchange of gradients, and the exchange by itself,
and holds the model of docs/scaling.md against them. Writes scaling.json and scaling.md.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from time import perf_counter

import torch
import torch.distributed as dist
from cpuinfo import get_cpu_info

from benchmarks.harness.device import Device
from benchmarks.harness.machine import describe, folder
from benchmarks.harness.sizes import CLASSES, MAGSD
from benchmarks.harness.steps import BFLOAT16, FLOAT32, network, train_step
from benchmarks.harness.timing import quartiles
from benchmarks.reporting.scaling import Constants, bandwidth_of, hops, render
from benchmarks.train_step import draw_batch
from magsd.config import TrainConfig
from magsd.data import Part
from magsd.distributed import ALONE, Team, team_of
from magsd.models import MAGSD as Network
from magsd.runtime import Runtime
from magsd.training.step import BatchShard

_HERE = Path(__file__).parent
_BUCKET = 25 << 20  # DistributedDataParallel's default
_WARM_UP = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line, in each process."""
    options = _options(arguments)
    train = TrainConfig(device=options.device, batch_size=1 << 20)
    with team_of(train) as team:
        if team.size < 2:
            raise SystemExit("one process exchanges nothing: torchrun --nproc-per-node=2 or more")
        saved = measure(team, options)
        if team.is_main:
            out = options.out or _HERE / "results" / folder(Device(options.device))
            out.mkdir(parents=True, exist_ok=True)
            (out / "scaling.json").write_text(json.dumps(saved, indent=1) + "\n")
            (out / "scaling.md").write_text(render(saved))
            sys.stdout.write(f"{out / 'scaling.md'}\n")
    return 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="torchrun -m benchmarks.scaling", description=__doc__)
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="default: GPUs if there are any",
    )
    parser.add_argument("--images", type=int, default=16, help="of each process")
    parser.add_argument("--backbone", default="resnet50", help="any of timm's with feature maps")
    parser.add_argument("--side", type=int, default=MAGSD.side, help="of the images, in pixels")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--precision", choices=(FLOAT32, BFLOAT16), default=BFLOAT16)
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: results/<machine>")
    return parser.parse_args(arguments)


def measure(team: Team, options: argparse.Namespace) -> dict[str, object]:
    """Constants of the model, and what they were read off."""
    device = Device(options.device)
    model = network(options.backbone, CLASSES, options.device)
    gradient = sum(4 * p.numel() for p in model.parameters())
    buckets = -(-gradient // _BUCKET)
    parts = list(torch.empty(gradient // 4, device=options.device).split(_BUCKET // 4))
    one = torch.zeros(1, device=options.device)

    def exchange() -> None:
        for work in [dist.all_reduce(part, async_op=True) for part in parts]:
            work.wait()

    alone, joined = _steps(team, model, options)
    calls = {
        "alone": alone,
        "joined": joined,
        "exchange": exchange,
        "small": lambda: dist.all_reduce(one),
    }
    times = {name: _seconds(call, device, options.rounds) for name, call in calls.items()}
    latency = times["small"] / hops(team.size)
    bandwidth = bandwidth_of(times["exchange"], team.size, gradient, buckets, latency)
    passes = Constants.passes
    constants = Constants(
        gradient, buckets, passes * options.images / times["alone"], bandwidth, latency
    )
    return {
        "machine_info": describe(device, get_cpu_info().get("brand_raw", "unknown")),
        "processes": team.size,
        "images": options.images,
        "backbone": options.backbone,
        "side": options.side,
        "arithmetic": options.precision,
        "measured": times,
        "constants": asdict(constants),
    }


def _steps(
    team: Team, model: Network, options: argparse.Namespace
) -> tuple[Callable[[], object], Callable[[], object]]:
    """Training steps, without and with the exchange."""
    runtime = Runtime(torch.device(options.device), options.precision, channels_last=True)
    batch = draw_batch(Device(options.device), options.images, options.side, team.rank)
    generator = torch.Generator(options.device).manual_seed(0)
    part = Part(team.rank * options.images, team.size * options.images)
    shard = BatchShard(part, 1.0, 1.0, team.all_reduce)

    def step_of(processes: Team) -> Callable[[], object]:
        own = runtime.model(copy.deepcopy(model))
        step = train_step(own, runtime, processes)
        return partial(step, *batch, generator, shard)

    return step_of(ALONE), step_of(team)


def _seconds(call: Callable[[], object], device: Device, rounds: int) -> float:
    """Median over the rounds of what the slowest process took; all begin each round together."""
    times = []
    for number in range(_WARM_UP + rounds):
        dist.barrier()
        device.synchronize()
        start = perf_counter()
        call()
        device.synchronize()
        taken = torch.tensor(perf_counter() - start, dtype=torch.float64)
        dist.all_reduce(taken, dist.ReduceOp.MAX)
        if number >= _WARM_UP:
            times.append(float(taken))
    return quartiles(times)[1]


if __name__ == "__main__":
    sys.exit(main())
