"""`python -m benchmarks.train_step`: the whole training step, ours against the published one.

Forward passes, backward and optimizer. The losses of both are compared first, from the same weights
and the same draws; then all are timed in turn, with four passes of the bare backbone as the floor.
Writes JSON and, beside it, the same as Markdown.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import steps
from benchmarks.harness.contender import WrongResult
from benchmarks.harness.device import Device, HostReads, command_line
from benchmarks.harness.elsewhere import Elsewhere, Remote
from benchmarks.harness.machine import RESULTS, folder, provenance, rounded, write
from benchmarks.harness.sizes import MAGSD
from benchmarks.harness.steps import BASELINE, FLOOR, OURS, PUBLISHED, Batch, Contender, Member
from benchmarks.harness.timing import Samples, interleave, quartiles, ratios
from benchmarks.published_step import HostDraws, published_step
from benchmarks.reporting.train_step import render
from magsd.config import Config
from magsd.methods import method
from magsd.torch_settings import cudnn_benchmark, kept_memory
from magsd_kernels import AttentionViews, environment

_BATCHES = 2
_TOLERANCE = 1e-5
_CHECKED_IMAGES = 4  # a loss of so few is as wrong as one of many
_PROFILER_SECONDS = 10.0  # of which the profiler's own work may be most


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = command_line("train_step", __doc__)
    add = parser.add_argument
    add("--batch", type=int, nargs="+", default=[16], metavar="B")
    add("--backbone", default="resnet50", help="any of timm's with feature maps")
    add("--side", type=int, default=MAGSD.side, help="of the images, in pixels")
    add("--seconds", type=float, default=120.0, help="of timing per batch size (default: 120)")
    add("--rounds", type=int, default=5, help="at least so many, however long they take")
    add("--out", type=Path, metavar="FILE", help="default: results/<machine>/train_step.json")
    add("--no-compiled", action="store_true", help="no torch.compile, which takes minutes")
    options = parser.parse_args(arguments)
    if environment.value(environment.BACKEND):
        raise SystemExit(f"{environment.BACKEND} is set: what is measured is the automatic choice")
    device = Device(options.device)
    measured: list[dict[str, Any]] = []
    size = {"backbone": options.backbone, "side": options.side}
    saved = provenance(device) | size | {"steps": measured}
    out = options.out or RESULTS / folder(device) / "train_step.json"
    report = out.with_suffix(".md")
    for batch in options.batch:
        measured.append(rounded(measure(device, batch, options)))
        # Here already: a larger batch may not fit, or not end in time.
        write(out, json.dumps(saved, indent=1) + "\n")
        write(report, render(saved))
        print(report, flush=True)
    return 0


def measure(device: Device, batch: int, options: argparse.Namespace) -> dict[str, Any]:
    """Check, run and time all members at one batch size."""
    models = steps.networks(options.backbone, device.type)
    batches = [steps.draw_batch(device, batch, options.side, seed) for seed in range(_BATCHES)]
    images, labels = batches[0]
    pool = steps.GraphPool() if device.type == "cuda" else None

    elsewhere = Elsewhere() if device.type == "cpu" else None

    def build(member: Member) -> Contender | Remote:
        if member.who == PUBLISHED and elsewhere is not None:
            made = partial(contender_elsewhere, member, options.backbone, batch, options.side)
            return Remote(elsewhere, made, partial(read_off, device=device), _BATCHES)
        return Contender(member, models, batches, pool and pool.handle)

    # The first two as in a run; for every member.
    with cudnn_benchmark(), kept_memory(images.device), steps.no_tf32():
        difference = check(models, (images[:_CHECKED_IMAGES], labels[:_CHECKED_IMAGES]))
        everyone = steps.members(device.type, not options.no_compiled)
        entries = time_members(everyone, device, build, options, batch)
    return {"batch": batch, "loss_difference": difference, "members": entries}


def time_members(
    everyone: Sequence[Member],
    device: Device,
    build: Callable[[Member], Contender | Remote],
    options: argparse.Namespace,
    batch: int,
) -> list[dict[str, Any]]:
    """Group by group; a contender is built for its first and freed after its last."""
    alive: dict[Member, Contender | Remote] = {}
    facts: dict[Member, dict[str, Any]] = {}
    expected: dict[Member, float] = {}
    entries: dict[Member, dict[str, Any]] = {}
    together = steps.groups(everyone, device.type)
    for group in together:
        for member in set(alive) - set(group):
            del alive[member]
        device.release()
        for member in group:
            if member not in alive:
                alive[member] = build(member)
                facts[member], expected[member] = read_off(alive[member], device)
                print(f"B {batch}: {member}: {expected[member]:.3g} s", file=sys.stderr)
        times = interleave(
            {str(member): alive[member].calls() for member in group},
            device.synchronize,
            options.seconds / len(together),
            fewest_rounds=options.rounds,
            expected={str(m): expected[m] for m in group} if device.type == "cpu" else None,
        )
        for member in group:
            if member not in entries:  # who is in several groups counts in the first
                entries[member] = _entry(member, times, batch) | facts[member]
    return [entries[member] for member in everyone]


def check(models: Mapping[str, nn.Module], batch: Batch) -> float:
    """Relative difference of our losses from the published: same weights, same draws, float32.

    Gradients are not compared here: the last digit of a resized image can turn a rectifier over,
    and the gradient jumps. Raises WrongResult where rounding does not explain it.
    """
    differences = []
    for who in (OURS, steps.SEPARATE):
        with torch.no_grad():  # batch norms count the images they see
            theirs, ours = both_losses(copy.deepcopy(dict(models)), batch, who)
        differences.append(float(abs(ours - theirs) / abs(theirs)))
        if not differences[-1] <= _TOLERANCE:  # NaN is wrong too
            raise WrongResult(f"our loss is {ours} ({who}), the published one {theirs}")
    return max(differences)


def both_losses(
    models: Mapping[str, nn.Module], batch: Batch, who: str = OURS
) -> tuple[Tensor, Tensor]:
    """The published loss and ours, from the same draws; the networks have the same weights."""
    ours, device = models[who], batch[0].device

    def generator() -> torch.Generator:
        return torch.Generator(device).manual_seed(0)

    with torch.no_grad():
        attention = copy.deepcopy(ours)(batch[0]).attention
    drawn = AttentionViews().draw(attention, generator())
    replayed = HostDraws(drawn.index, drawn.theta.tolist(), drawn.offsets.tolist())
    published = published_step(models[PUBLISHED], *batch, lambda _: replayed)
    step = method("magsd").objective(Config(), None)
    return published, step(ours, *batch, generator()).loss


def contender_elsewhere(member: Member, backbone: str, batch: int, side: int) -> Contender:
    """As `measure` makes one, from its settings alone."""
    models, device = steps.networks(backbone, "cpu"), Device("cpu")
    batches = [steps.draw_batch(device, batch, side, seed) for seed in range(_BATCHES)]
    return Contender(member, models, batches)


def read_off(contender: Contender | Remote, device: Device) -> tuple[dict[str, Any], float]:
    """Peak memory; on a GPU launches and waits, on a CPU what would be waits; seconds of a call."""
    if isinstance(contender, Remote):
        facts: tuple[dict[str, Any], float] = contender.facts
        return facts
    call = contender.calls()[0]
    if device.type == "cpu":
        start = perf_counter()
        with HostReads() as reads:
            peak = device.peak_memory(call)
        seconds = perf_counter() - start
        if seconds < _PROFILER_SECONDS:
            seconds = device.seconds(call)
        return {"memory": contender.resident_bytes() + peak, "host_reads": reads.count}, seconds
    call()
    launches, waits = device.activity(call)
    activity: dict[str, Any] = {"launches": launches, "waits": waits}
    if contender.member.who == OURS:
        activity["refused"] = device.why_it_waits(call)
    if not contender.member.captured:  # a graph's memory is its own, and none is taken in a replay
        activity["memory"] = contender.resident_bytes() + device.peak_memory(call)
    return activity, 0.0


def _entry(member: Member, times: Mapping[str, Samples], batch: int) -> dict[str, Any]:
    """Times and their ratios within rounds: the published step's over ours, ours over the floor."""
    own = times[str(member)]
    seconds = quartiles(own.seconds)
    entry: dict[str, Any] = {
        "name": str(member),
        **asdict(member),
        "seconds": seconds,
        "rounds": len(own.seconds),
        "images_per_second": batch / seconds[1],
        "speedup": ratios(times[str(BASELINE)], own),
    }
    if member.who != FLOOR:
        floor = str(member.floor)
        entry |= {"floor": floor, "over_floor": ratios(own, times[floor])}
    return entry


if __name__ == "__main__":
    sys.exit(main())
