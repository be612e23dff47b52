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
from pathlib import Path
from types import FrameType

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
_SANITIZED = {
    # torch asks what fails where there is nothing to find
    "memcheck": ("--report-api-errors", "no"),
    "racecheck": (),
}
_PROFILED = (
    ("bilinear_attention_pool", "bfloat16"),
    ("attention_views", "float32"),
    ("bilinear_attention_pool", "float32"),
)
_PROFILER = (
    *("--profile-from-start", "off", "--clock-control", "none", "--csv"),
    *("--kernel-name-base", "demangled", "--kernel-name", "regex:magsd"),
    *("--section", "SpeedOfLight", "--section", "MemoryWorkloadAnalysis"),
    *("--section", "LaunchStats", "--section", "Occupancy"),
)
_LOOK = "import sys; from magsd_kernels import native; sys.exit(native.why_not(sys.argv[1]))"
#: Stages whose pieces run several at once.
_PARALLEL = ("native", "triton")
_PACKING_SECONDS = 5.0
_LIMIT = 400.0  # of one piece that does not write its results as it goes


class Plan:
    """What runs on a machine. options: of the command. work: this run's folder for results."""

    def __init__(self, options: argparse.Namespace, work: Path) -> None:
        self.options = options
        self.device: str = options.device
        self.gpu = self.device == "cuda"
        self.work = work

    def module(self, name: str, *arguments: str) -> tuple[str, ...]:
        """`python -m name`, on the device."""
        return (sys.executable, "-m", name, f"--device={self.device}", *arguments)

    def pytest(self, stage: str, name: str, *arguments: str, limit: float = _LIMIT) -> Piece:
        """Every test's line as it passes, so that a log that ends says where."""
        quick = ("--co", "-q") if self.options.quick else ("-v",)
        command = (sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments, *quick)
        environment = {"OMP_NUM_THREADS": "1"} if stage in _PARALLEL else {}
        if stage == "triton" and not self.gpu:
            environment["TRITON_INTERPRET"] = "1"
        return Piece(stage, name, command, limit, environment)

    def tool(self, name: str) -> tuple[str, str]:
        """A program of the CUDA toolkit, and why it is absent."""
        found = shutil.which(name) or shutil.which(name, path=_CUDA_TOOLS)
        absent = "" if found else f"there is no {name}"
        return found or name, absent if self.gpu else "needs a GPU"

    def build(self) -> list[Piece]:
        """Of what was carried here, unless it loads; in every run: it may be on another machine."""
        build = (sys.executable, "setup.py", "build_ext", "--inplace")
        limits = {"MAGSD_BUILD_CUDA": "0"}
        if self.gpu:
            major, minor = torch.cuda.get_device_capability()
            limits = {"MAGSD_BUILD_CUDA": "1", "TORCH_CUDA_ARCH_LIST": f"{major}.{minor}"}
        absent = "" if native.why_not(self.device) else "the library loads"
        look = (sys.executable, "-c", _LOOK, self.device)
        return [
            Piece("build", "library", build, environment=limits, absent=absent, repeated=True),
            Piece("build", "loads", look, repeated=True),
        ]

    def tests(self, stage: str, backend: str) -> list[Piece]:
        """Every file with tests of targets; Triton is compiled on a GPU, interpreted on a CPU."""
        target = f"{backend}-{self.device}"
        return [
            self.pytest(stage, path.stem, str(path.relative_to(ROOT)), "-k", target)
            for path in sorted((ROOT / "tests" / "kernels").glob("test_*.py"))
            if re.search(r"^def test_\w+\([^)]*\btarget\b", path.read_text(), re.MULTILINE)
        ]

    def sanitizer(self) -> list[Piece]:
        """Our kernels alone; each tensor is an allocation, so that a step beyond its end shows."""
        environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        tool, absent = self.tool("compute-sanitizer")
        found = []
        for check, options in _SANITIZED.items():
            words = (tool, "--tool", check, "--error-exitcode", "9", "--kernel-name", "kns=magsd")
            for function in _WATCHED:
                call = self.module("benchmarks.probe", function, "--backend=cuda")
                command = (*words, *options, *call)
                name = f"{check}-{function}"
                found.append(Piece("sanitizer", name, command, _LIMIT, environment, absent))
        return found

    def ncu(self) -> list[Piece]:
        """Nsight Compute over what moves most."""
        tool, absent = self.tool("ncu")
        found = []
        for function, precision in _PROFILED:
            size = ("--backend=cuda", "--batch=256", f"--precision={precision}")
            command = (tool, *_PROFILER, *self.module("benchmarks.probe", function, *size))
            found.append(Piece("ncu", f"{function}-{precision}", command, _LIMIT, absent=absent))
        return found

    def training(self) -> list[Piece]:
        """The training loop's tests."""
        return [self.pytest("training", "device", "tests/training/test_training_device.py")]

    def central(self) -> list[Piece]:
        """MAG-SD's central operations at a batch that fills the device."""
        return self.rows("central", "--central", f"--batches={256 if self.gpu else 16}")

    def rest(self) -> list[Piece]:
        """All other rows, growth and call overhead, and the tests of this device not yet run."""
        device = self.device
        others = f"{device} and not {device}-{device} and not triton-{device}"
        tests = self.pytest("rest", "kernels", "tests/kernels", "-k", others, limit=2 * _LIMIT)
        return [*self.rows("rest"), tests]

    def step(self, stage: str, batch: int) -> list[Piece]:
        """The whole training step at one batch size."""
        out = f"--out={self.work / stage / 'train_step.json'}"
        size = [f"--batch={batch}", "--seconds=60"]
        if self.options.quick:
            size = ["--batch=4", "--side=64", "--backbone=test_resnet", "--seconds=0", "--rounds=2"]
        command = self.module("benchmarks.train_step", out, "--no-compiled", *size)
        return [Piece(stage, "train_step", command, _LIMIT)]

    def rows(self, stage: str, *chosen: str) -> list[Piece]:
        """Rows are written one by one, so that the deadline alone ends them; and a report."""
        rows, report = self.work / "rows", self.work / "report"
        chosen = (f"--rows={rows}", "--seconds=2", "-p", "no:cacheprovider", *chosen)
        if self.options.quick:
            chosen = (*chosen, "--central", "--quick", "--seconds=0.1")
        if self.options.max_autotune:
            chosen = (*chosen, "--max-autotune")
        if self.options.again:
            chosen = (*chosen, "--again")
        joined = (sys.executable, "-m", "benchmarks.report", str(rows), f"--out={report}")
        return [
            Piece(stage, "rows", self.module("benchmarks.run", *chosen)),
            Piece(stage, "report", joined, repeated=True),
        ]

    def comparison(self, name: str, backbone: str, weights: str) -> list[Piece]:
        """MAG-SD against its backbone, five folds by patient."""
        stage, runs = f"crossval-{name}", Path("runs", f"evidence-{name}").resolve()
        settings = [
            f"model.backbone={backbone}",
            f"model.pretrained={weights}",
            f"train.device={self.device}",
            "channels_last=true",
            "overlays=0",
        ]
        if self.gpu:
            settings.append("precision=bfloat16")
        if self.options.quick:
            settings += ["folds=2", "epochs=1", "image_size=64", "data.augment.enabled=false"]
        data = f"--data={self.options.data}"
        command = (
            *(sys.executable, "-m", "magsd", "crossval", "--config=finetune", data),
            *(f"--out={runs}", "--model=plain", "--model=magsd", *settings),
        )
        absent = "" if self.options.data else "--data names no images"
        kept = {runs / file: f"{self.work.name}/{stage}/{file}" for file in _SUMMARY}
        return [Piece(stage, "crossval", command, absent=absent, kept=kept)]


#: In order of worth.
STAGES: dict[str, Callable[[Plan], list[Piece]]] = {
    "build": Plan.build,
    "native": lambda plan: plan.tests("native", plan.device),
    "triton": lambda plan: plan.tests("triton", "triton"),
    "sanitizer": Plan.sanitizer,
    "step16": lambda plan: plan.step("step16", 16),
    "central": Plan.central,
    "ncu": Plan.ncu,
    "training": Plan.training,
    "step64": lambda plan: plan.step("step64", 64),
    "rest": Plan.rest,
    "lite0": lambda plan: plan.comparison("lite0", "tf_efficientnet_lite0", plan.options.weights),
    "resnet50": lambda plan: plan.comparison("resnet50", "resnet50", "false"),
}


def main(arguments: Sequence[str] | None = None, start: float | None = None) -> int:
    """Command line; 0 where all is done and good, 1 where something failed, 75 if there is more.

    start: of the time that the deadline allows, by time.monotonic(); None: now.
    """
    start = time.monotonic() if start is None else start
    options = parse(arguments)
    signal.signal(signal.SIGTERM, _terminated)
    deadline = start + options.deadline - min(_PACKING_SECONDS, options.deadline / 10)
    found = commit()
    facts = {"commit": found["id"], "dirty": found["dirty"]}
    out = options.out.resolve()
    with unpacked(out / "evidence.zip", options.resume) as archive:
        plan = Plan(options, archive.folder / folder(Device(options.device)))
        stages = {name: stage(plan) for name, stage in STAGES.items()}
        everything = [piece for planned in stages.values() for piece in planned]
        chosen = list(STAGES) if "all" in options.stage else options.stage
        done = True
        for name in chosen:
            done &= pieces.run(
                stages[name],
                archive,
                deadline=deadline,
                jobs=options.jobs if name in _PARALLEL else 1,
                facts=facts,
                folder=ROOT,
                again=options.again,
            )
            write(out / "evidence.md", pieces.summary(everything, archive))
        ran = [piece for name in chosen for piece in stages[name] if not piece.absent]
        outcomes = [archive.outcome(piece) for piece in ran]
    if not done:
        return pieces.AGAIN
    return int(any(o is not None and o["ended"] != pieces.PASSED for o in outcomes))


def _terminated(number: int, frame: FrameType | None) -> None:
    """Kill what runs and pack what is done."""
    raise SystemExit(128 + number)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options of the command."""
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
    add("--weights", metavar="FILE", default="true", help="of tf_efficientnet_lite0, not timm's")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main(start=pieces.process_start()))
