"""`python -m benchmarks.evidence --out DIR`: everything that a machine has to show, by one command.

Made for a GPU that is there for minutes. Stages run in order of worth until the deadline. All that
is finished lies in DIR/evidence.zip, with DIR/evidence.md as its table of contents; the same
command goes on where the last one ended or was killed, on another machine from `--resume` of its
archive.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from benchmarks.harness import pieces
from benchmarks.harness.device import Device, command_line
from benchmarks.harness.machine import commit, folder, write
from benchmarks.harness.pieces import Piece, unpacked
from magsd_kernels import native

ROOT = Path(__file__).parents[1]
_CUDA_TOOLS = Path("/usr/local/cuda/bin")
_SUMMARY = ("results.csv", "summary.csv", "summary.md", "scores.png")
_WATCHED = (
    "multiscale_attention",
    "bilinear_attention_pool",
    "attention_views",
    "soft_distance_loss",
)
_PROFILED = (
    ("bilinear_attention_pool", "bfloat16"),
    ("attention_views", "float32"),
    ("bilinear_attention_pool", "float32"),
)
_LOOK = "import sys; from magsd_kernels import native; sys.exit(native.why_not(sys.argv[1]))"
_PACKING_SECONDS = 5.0
_LIMIT = 400.0  # of one piece that does not write its results as it goes


@dataclass(frozen=True)
class Plan:
    """What the stages need to know: options, this run's folder, and the machine's name."""

    options: argparse.Namespace
    work: Path
    machine: str

    @property
    def device(self) -> str:
        """Cpu or cuda."""
        return str(self.options.device)

    @property
    def gpu(self) -> bool:
        """Whether there is one."""
        return self.device == "cuda"

    def module(self, name: str, *arguments: str) -> tuple[str, ...]:
        """`python -m name`, on the device."""
        return (sys.executable, "-m", name, f"--device={self.device}", *arguments)

    def pytest(self, *arguments: str) -> tuple[str, ...]:
        """Every test's line as it passes, so that a log that ends says where."""
        quick = ("--co", "-q") if self.options.quick else ("-v",)
        return (sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments, *quick)

    def tool(self, name: str, *arguments: str) -> tuple[tuple[str, ...], str]:
        """A program of the CUDA toolkit, and why it is absent."""
        found = shutil.which(name) or shutil.which(name, path=_CUDA_TOOLS)
        absent = "" if found else f"there is no {name}"
        return (found or name, *arguments), absent if self.gpu else "needs a GPU"


def main(arguments: Sequence[str] | None = None, start: float | None = None) -> int:
    """Command line; 0 where all is done and good, 1 where something failed, 75 if there is more.

    start: of the time that the deadline allows, by time.monotonic(); None: now.
    """
    start = time.monotonic() if start is None else start
    options = _options(arguments)
    signal.signal(signal.SIGTERM, _terminated)
    deadline = start + options.deadline - min(_PACKING_SECONDS, options.deadline / 10)
    found = commit()
    facts = {"commit": found["id"], "dirty": found["dirty"]}
    out = options.out.resolve()
    with unpacked(out / "evidence.zip", options.resume) as archive:
        plan = Plan(options, archive.folder, folder(Device(options.device)))
        names = list(STAGES) if "all" in options.stage else options.stage
        planned = {name: stage(plan) for name, stage in STAGES.items()}
        done = True
        for name in names:
            done &= pieces.run(
                planned[name],
                archive,
                deadline=deadline,
                jobs=options.jobs if name in ("native", "triton") else 1,
                facts=facts,
                folder=ROOT,
                again=options.again,
            )
            everything = [piece for stage in planned.values() for piece in stage]
            write(out / "evidence.md", pieces.summary(everything, archive))
        chosen = [piece for name in names for piece in planned[name] if not piece.absent]
        outcomes = [archive.outcome(piece) for piece in chosen]
    if not done:
        return pieces.AGAIN
    return int(any(o is not None and o["ended"] != pieces.PASSED for o in outcomes))


def _terminated(number: int, frame: FrameType | None) -> None:
    """Kill what runs and pack what is done."""
    raise SystemExit(128 + number)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line("evidence", __doc__)
    add = parser.add_argument
    add("--out", type=Path, metavar="DIR", required=True)
    add("--stage", nargs="+", choices=("all", *STAGES), default=["all"], metavar="NAME")
    add("--deadline", type=float, metavar="SECONDS", default=float("inf"), help="of the whole")
    add("--resume", type=Path, metavar="FILE", help="archive of an earlier run")
    jobs = max(1, min(8, (os.cpu_count() or 1) // 2))
    add("--jobs", type=int, default=jobs, help="files of tests that run at once")
    add("--again", action="store_true", help="run what failed once more")
    add("--max-autotune", action="store_true", help="let it compete: takes minutes")
    add("--quick", action="store_true", help="does everything work?")
    add("--data", metavar="SOURCE", help="of the comparison, which is absent else")
    add("--weights", metavar="FILE", help="of tf_efficientnet_lite0; default: timm's")
    add("--runs", type=Path, default=Path("runs"), help="where trained runs go")
    return parser.parse_args(arguments)


def _build(plan: Plan) -> list[Piece]:
    """Of what was carried here, unless it loads; in every run: it may be on another machine."""
    build = (sys.executable, "setup.py", "build_ext", "--inplace")
    limits = {"MAGSD_BUILD_CUDA": "0"}
    if plan.gpu:
        major, minor = torch.cuda.get_device_capability()
        limits = {"MAGSD_BUILD_CUDA": "1", "TORCH_CUDA_ARCH_LIST": f"{major}.{minor}"}
    absent = "" if native.why_not(plan.device) else "the library loads"
    look = (sys.executable, "-c", _LOOK, plan.device)
    return [
        Piece("build", "library", build, environment=limits, absent=absent, repeated=True),
        Piece("build", "loads", look, repeated=True),
    ]


def _tests(stage: str, plan: Plan) -> list[Piece]:
    """A piece for every file with tests of targets: native are the C++ kernels of the device.

    Triton is compiled on a GPU, interpreted on a CPU.
    """
    target = f"{plan.device if stage == 'native' else stage}-{plan.device}"
    environment = {"OMP_NUM_THREADS": "1"}
    if stage == "triton" and not plan.gpu:
        environment["TRITON_INTERPRET"] = "1"
    return [
        Piece(
            stage,
            path.stem,
            plan.pytest(str(path.relative_to(ROOT)), "-k", target),
            _LIMIT,
            environment,
        )
        for path in sorted((ROOT / "tests" / "kernels").glob("test_*.py"))
        if re.search(r"^def test_\w+\([^)]*\btarget\b", path.read_text(), re.MULTILINE)
    ]


def _sanitizer(plan: Plan) -> list[Piece]:
    """Our kernels alone; each tensor is an allocation, so that a step beyond its end shows."""
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    found = []
    for check in ("memcheck", "racecheck"):
        words = ["--tool", check, "--error-exitcode", "9", "--kernel-name", "kns=magsd"]
        if check == "memcheck":  # torch asks what fails where there is nothing to find
            words += ["--report-api-errors", "no"]
        tool, absent = plan.tool("compute-sanitizer", *words)
        for function in _WATCHED:
            command = (*tool, *plan.module("benchmarks.probe", function, "--backend=cuda"))
            name = f"{check}-{function}"
            found.append(Piece("sanitizer", name, command, _LIMIT, environment, absent))
    return found


def _ncu(plan: Plan) -> list[Piece]:
    sections = ("SpeedOfLight", "MemoryWorkloadAnalysis", "LaunchStats", "Occupancy")
    tool, absent = plan.tool(
        *("ncu", "--profile-from-start", "off", "--clock-control", "none", "--csv"),
        *("--kernel-name-base", "demangled", "--kernel-name", "regex:magsd"),
        *(word for section in sections for word in ("--section", section)),
    )
    found = []
    for function, precision in _PROFILED:
        call = plan.module("benchmarks.probe", function, "--backend=cuda", "--batch=256")
        command = (*tool, *call, f"--precision={precision}")
        found.append(Piece("ncu", f"{function}-{precision}", command, _LIMIT, absent=absent))
    return found


def _step(batch: int, plan: Plan) -> list[Piece]:
    """The whole training step at one batch size."""
    name = f"step{batch}"
    out = f"--out={plan.work / plan.machine / name / 'train_step.json'}"
    size = [f"--batch={batch}", "--seconds=60"]
    if plan.options.quick:
        size = ["--batch=4", "--side=64", "--backbone=test_resnet", "--seconds=0", "--rounds=2"]
    return [Piece(name, "train_step", plan.module("benchmarks.train_step", out, *size), _LIMIT)]


def _central(plan: Plan) -> list[Piece]:
    batch = 256 if plan.gpu else 16
    return _rows("central", plan, "--central", f"--batches={batch}")


def _rest(plan: Plan) -> list[Piece]:
    """All other rows, growth and call overhead, and the tests of this device not yet run."""
    others = f"{plan.device} and not {plan.device}-{plan.device} and not triton-{plan.device}"
    tests = plan.pytest("tests/kernels", "-k", others)
    return [*_rows("rest", plan), Piece("rest", "kernels", tests, 2 * _LIMIT)]


def _rows(stage: str, plan: Plan, *chosen: str) -> list[Piece]:
    """Rows are written one by one, so that the deadline alone ends them; and a report of them."""
    chosen = ("--seconds=2", "-p", "no:cacheprovider", *chosen)
    rows, report = (plan.work / plan.machine / name for name in ("rows", "report"))
    if plan.options.quick:
        chosen = (*chosen, "--central", "--quick", "--seconds=0.1")
    if plan.options.max_autotune:
        chosen = (*chosen, "--max-autotune")
    if plan.options.again:
        chosen = (*chosen, "--again")
    command = plan.module("benchmarks.run", f"--rows={rows}", *chosen)
    joined = (sys.executable, "-m", "benchmarks.report", str(rows), f"--out={report}")
    return [Piece(stage, "rows", command), Piece(stage, "report", joined, repeated=True)]


def _training(plan: Plan) -> list[Piece]:
    test = plan.pytest("tests/training/test_training_device.py")
    return [Piece("training", "device", test, _LIMIT)]


def _comparison(name: str, backbone: str, plan: Plan) -> list[Piece]:
    """MAG-SD against its backbone, five folds by patient."""
    options = plan.options
    runs = (options.runs / f"evidence-{name}").resolve()
    weights = "false" if name == "resnet50" else options.weights or "true"
    pairs = [
        f"model.backbone={backbone}",
        f"model.pretrained={weights}",
        f"train.device={options.device}",
        "channels_last=true",
        "overlays=0",
    ]
    if plan.gpu:
        pairs.append("precision=bfloat16")
    if options.quick:
        pairs += ["folds=2", "epochs=1", "image_size=64", "data.augment.enabled=false"]
    command = (
        *(sys.executable, "-m", "magsd", "crossval", "--config=finetune"),
        *(f"--data={options.data}", f"--out={runs}", "--model=plain", "--model=magsd", *pairs),
    )
    absent = "" if options.data else "--data names no images"
    kept = {runs / file: f"{plan.machine}/crossval-{name}/{file}" for file in _SUMMARY}
    return [Piece(f"crossval-{name}", "crossval", command, absent=absent, kept=kept)]


STAGES: dict[str, Callable[[Any], list[Piece]]] = {
    "build": _build,
    "native": partial(_tests, "native"),
    "triton": partial(_tests, "triton"),
    "sanitizer": _sanitizer,
    "step16": partial(_step, 16),
    "central": _central,
    "ncu": _ncu,
    "training": _training,
    "step64": partial(_step, 64),
    "rest": _rest,
    "lite0": partial(_comparison, "lite0", "tf_efficientnet_lite0"),
    "resnet50": partial(_comparison, "resnet50", "resnet50"),
}


if __name__ == "__main__":
    sys.exit(main(start=pieces.process_start()))
