"""`python -m benchmarks.evidence`: everything that a machine has to show, by one command.

In order of worth: the tests of the operations and of the training loop on this machine's devices,
the benchmarks, the training step, and a five-fold comparison of MAG-SD with its backbone. Each
stage is a command of its own, printed before it runs; one that fails does not take the others with
it. Results go to benchmarks/results/<machine>/, the stages' outcome to evidence.json there.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter

import torch
from cpuinfo import get_cpu_info
from pytest_benchmark.utils import get_commit_info

from benchmarks.harness.device import Device
from benchmarks.harness.machine import describe, folder

_HERE = Path(__file__).parent
_SUMMARY = ("results.csv", "summary.csv", "summary.md", "scores.png")


@dataclass(frozen=True)
class Stage:
    """A command for Python, and files of its that are kept, with where they are kept."""

    name: str
    command: list[str]
    kept: dict[Path, Path] = field(default_factory=dict)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; the exit status is 1 where a stage failed."""
    options = _options(arguments)
    device = Device(options.device)
    out = options.out or _HERE / "results" / folder(device)
    out.mkdir(parents=True, exist_ok=True)
    commit = get_commit_info()
    told = {
        "machine_info": describe(device, get_cpu_info().get("brand_raw", "unknown")),
        "commit_info": {name: commit.get(name) for name in ("id", "dirty")},
    }
    chosen = [s for s in stages(options, out) if options.only is None or s.name in options.only]
    done = []
    for stage in chosen:
        done.append(run(stage))
        (out / "evidence.json").write_text(json.dumps(told | {"stages": done}, indent=1) + "\n")
    return int(any(stage["status"] for stage in done))


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evidence", description=__doc__)
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="default: a GPU if there is one",
    )
    parser.add_argument("--quick", action="store_true", help="does everything work?")
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="some of the stages")
    parser.add_argument(
        "--data", metavar="SOURCE", default="phantom:n=480,size=128", help="of the comparison"
    )
    parser.add_argument(
        "--weights", metavar="FILE", help="of tf_efficientnet_lite0; default: timm's"
    )
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where trained runs go")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: results/<machine>")
    return parser.parse_args(arguments)


def stages(options: argparse.Namespace, out: Path) -> list[Stage]:
    """What is run, in order."""
    device = f"--device={options.device}"
    quick = options.quick
    kernels = ["pytest", "-q", "tests/kernels", "-k", options.device]
    step = ["--rounds=1", "--seconds=1", "--side=64", "--batch", "4"] if quick else ["--batch"]
    step += [] if quick else ["16", "64"] if options.device == "cuda" else ["16"]
    return [
        Stage("operations", ["-m", *kernels, *(["-x", "--co"] if quick else [])]),
        Stage("training", ["-m", "pytest", "-q", "tests/training/test_training_device.py"]),
        Stage(
            "benchmarks",
            ["-m", "benchmarks.run", device, f"--out={out / 'results.json'}"]
            + (["--quick"] if quick else []),
        ),
        Stage(
            "step",
            ["-m", "benchmarks.train_step", device, f"--out={out / 'train_step.json'}", *step],
        ),
        _comparison("lite0", "tf_efficientnet_lite0", options.weights or "true", options, out),
        _comparison("resnet50", "resnet50", "false", options, out),
    ]


def _comparison(
    name: str, backbone: str, pretrained: str, options: argparse.Namespace, out: Path
) -> Stage:
    """MAG-SD against its backbone, five folds by patient."""
    runs = options.runs / f"evidence-{name}"
    pairs = [
        f"model.backbone={backbone}",
        f"model.pretrained={pretrained}",
        f"train.device={options.device}",
        "channels_last=true",
        "overlays=0",
    ]
    if options.device == "cuda":
        pairs.append("precision=bfloat16")
    if options.quick:
        pairs += ["folds=2", "epochs=1", "image_size=64", "data.augment.enabled=false"]
    command = ["magsd", "crossval", "--config=finetune", f"--data={options.data}", f"--out={runs}"]
    return Stage(
        name,
        ["-m", *command, "--model=plain", "--model=magsd", *pairs],
        {runs / file: out / f"crossval-{name}" / file for file in _SUMMARY},
    )


def run(stage: Stage) -> dict[str, object]:
    """Run a stage and keep its files; what became of it."""
    command = shlex.join(["python", *stage.command])
    sys.stdout.write(f"\n=== {stage.name}: {command}\n")
    sys.stdout.flush()
    start = perf_counter()
    done = subprocess.run([sys.executable, *stage.command], check=False, cwd=_HERE.parent)
    for source, target in stage.kept.items():
        if source.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)
    return {
        "name": stage.name,
        "command": command,
        "status": done.returncode,
        "seconds": round(perf_counter() - start, 1),
    }


if __name__ == "__main__":
    sys.exit(main())
