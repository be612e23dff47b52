"""Several processes train as one does: the same images, gradients, figures, and no file twice."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import magsd
from magsd.config import Config, load_config
from magsd.data import Batch, BatchLoader, Part, choose_split, shard_bounds, split_by_patient
from magsd.data.run_data import open_images, plain_loader, training_loader
from magsd.distributed import Team, team_of
from magsd.models import build_model
from magsd.runtime import CPU, Runtime
from magsd.training import load_run
from magsd.training.checkpoint import load_checkpoint
from magsd.training.metrics_log import COLUMNS, MetricsLog, read_metrics
from magsd.training.progress import TrainingProgress
from magsd.training.run import train_run
from magsd.training.run_folder import RunFolder
from magsd.training.signals import StopRequest
from magsd.training.train_step import shard_of
from magsd.training.trainer import Interrupted, Trainer
from magsd.training.validation import validate

IMAGES = 12  # of the small run's training set
STEPS = 3  # its epoch

#: One process dies, or gets a signal, in the step after AT steps; on the first try only.
BROKEN = """
import os, signal
from magsd.training.trainer import Trainer
step = Trainer._one_step
def one_step(self, *arguments):
    first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    if first and self.team.rank == 1 and self.global_step == int(os.environ["AT"]):
        if os.environ["WHAT"] == "die":
            os._exit(1)
        os.kill(os.getpid(), int(os.environ["WHAT"]))
    step(self, *arguments)
Trainer._one_step = one_step
from magsd.cli import main
main()
"""

#: What `save_gradients` below is called by.
GRADIENTS = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_training_distributed import save_gradients
save_gradients(*sys.argv[1:])
"""


Two = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def train_on_two(torchrun: Two) -> Two:
    """Runs `magsd train`, or a script in its place, in two processes."""

    def run(
        arguments: list[str], *, script: Path | None = None, **how: Any
    ) -> subprocess.CompletedProcess[str]:
        program = script or Path(magsd.__file__).with_name("__main__.py")
        return torchrun(program, "train", *arguments, **how)

    return run


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    path = tmp_path / "broken.py"
    path.write_text(BROKEN)
    return path


@pytest.fixture(scope="module")
def two(
    run_python: Two, small_pairs: list[str], made_once: Callable[..., Path]
) -> tuple[Path, str]:
    """A whole run of two processes by the documented command, and what it printed."""

    def train(folder: Path) -> None:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        done = run_python(*launcher, "-m", "magsd", "train", "--out", folder / "run", *small_pairs)
        assert done.returncode == 0, done.stdout + done.stderr
        (folder / "printed").write_text(done.stdout + done.stderr)

    folder = made_once("two", train)
    return folder / "run", (folder / "printed").read_text()


def save_gradients(out: str, *pairs: str) -> None:
    """Train an epoch in float64 with fixed batch statistics; keep what each step gave."""
    configs = [load_config(None, setting, shared=pairs) for setting in SETTINGS]
    with team_of(configs[0].train) as team:
        kept = [one_epoch(config, team, Path(out)) for config in configs]
    if team.is_main:
        torch.save(kept, out)


#: With confidence 1 no raw prediction is a target of the distance. A view that equals its image
#: has the same prediction up to rounding, and |p - q| would have either sign where batches of
#: other sizes (merged views) round otherwise.
SETTINGS = (
    ("class_weights=[0.25, 3.0, 0.5, 1.0]",),
    ("class_weights=balanced", "views=merged", "confidence=1"),
    ("model.name=plain", "class_weights=balanced"),
    # The second step's loss depends on the centers that the first one moved.
    ("model=wsdan", "class_weights=balanced", "center_rate=0.5"),
)
#: Relative.
BOUND = 1e-12


def one_epoch(config: Config, team: Team, folder: Path) -> dict[str, Any]:
    classes, cache = open_images(config, config.data.source)
    split = split_by_patient(cache.records, folds=2, seed=0)
    # Few of one class, so that balanced weights differ; twelve, so that the last batch has five.
    normal = [i for i in split.train if cache.records[i].label == "normal"]
    chosen = sorted([i for i in split.train if i not in normal][:11] + normal[:1])
    torch.manual_seed(team.rank)  # the leader's weights must reach the others
    trainer = Trainer(
        config,
        build_model(config.model, len(classes)).double(),
        training_loader(config, cache, chosen, classes, team),
        part_of_validation(config, cache, split.validation[:11], classes, team),
        RunFolder(folder),
        Runtime.from_config(config.train),
        team=team,
    )
    model = trainer.model.eval()
    model.train = lambda mode=True: model  # type: ignore[method-assign]
    one_step, gradients = trainer._one_step, []

    def recorded(batch: Batch) -> None:
        one_step(batch._replace(images=batch.images.double()))
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))

    trainer._one_step = recorded  # type: ignore[method-assign]
    progress = TrainingProgress(Console(quiet=True), 1, len(trainer.train_loader), 0)
    trainer._train_epoch(MetricsLog(None, None), progress, StopRequest())
    model.float()
    measured = validate(model, trainer.validation_loader, trainer.runtime, team=team)
    return {"gradients": gradients, "figures": trainer.read_sums() | measured}


def part_of_validation(
    config: Config, cache: Any, indices: list[int], classes: tuple[str, ...], team: Team
) -> BatchLoader:
    first, last = shard_bounds(len(indices), team.rank, team.size)
    return plain_loader(config, cache, indices[first:last], classes)


def test_gradients_of_two_are_those_of_one(
    torchrun: Two, tmp_path: Path, small_pairs: list[str]
) -> None:
    pairs = [*small_pairs, "data.source=phantom:n=32,size=32", "batch_size=7"]
    script = tmp_path / "gradients.py"
    script.write_text(GRADIENTS)
    out = tmp_path / "two.pt"
    done = torchrun(script, out, *pairs)
    assert done.returncode == 0, done.stdout + done.stderr
    save_gradients(str(tmp_path / "one.pt"), *pairs)
    one, two = (torch.load(tmp_path / f"{name}.pt") for name in ("one", "two"))
    for wanted, found in zip(one, two, strict=True):
        assert len(wanted["gradients"]) == len(found["gradients"]) == 2
        for mine, other in zip(wanted["gradients"], found["gradients"], strict=True):
            assert float((mine - other).norm() / mine.norm()) < BOUND
        for name, value in wanted["figures"].items():
            exact = name.endswith("accuracy") or name == "first_bad"
            # Validation runs in float32.
            near = 0.0 if exact else 1e-6 if name.startswith("validation") else BOUND
            assert found["figures"][name] == pytest.approx(value, rel=near, abs=0.0), name


def counts(row: dict[str, str]) -> float:
    return float(row["train_accuracy"]) * IMAGES


@pytest.mark.parametrize("known", [True, False])
def test_the_share_of_a_batch_of_no_weight_is_a_number(known: bool) -> None:
    """And comes from the host alone: the device's labels here cannot be read."""
    labels = [1, 1]
    there, here = torch.tensor(labels, device="meta"), torch.tensor(labels)
    batch = Batch(torch.zeros(2, 1, 4, 4), there, [0, 1], [0, 1], Part(0, 2), here)
    weights = torch.tensor([1.0, 0.0], dtype=torch.float64)
    share = shard_of(batch, Team(), weights, labels if known else None)
    assert (share.cross_entropy, share.distance) == (0.0, 1.0)


def test_run_of_two(two: tuple[Path, str]) -> None:
    out, printed = two
    rows = read_metrics(out / "metrics.csv")
    assert tuple(rows[0]) == COLUMNS
    assert [(row["epoch"], row["step"]) for row in rows] == [("1", "3"), ("2", "6")]
    assert all(abs(counts(row) - round(counts(row))) < 1e-6 for row in rows)
    assert printed.count("epoch 2/2") == printed.count("best epoch") == 1
    assert "Warning" not in printed
    assert (out / "evaluation.json").is_file()
    names = {path.name for path in out.rglob("*") if path.is_file()}
    assert not [name for name in names if name.endswith(".part")]
    saved = load_checkpoint(out / "checkpoints" / "last.pt")
    assert (saved["epoch"], saved["global_step"]) == (2, 2 * STEPS)
    assert not [key for key in saved["model"] if key.startswith("module")]


def test_validation_of_two_is_that_of_its_checkpoint(two: tuple[Path, str]) -> None:
    """The best weights, measured by one process: the same sums, no image twice or left out."""
    out, _ = two
    run = load_run(out)
    row = read_metrics(out / "metrics.csv")[run.epoch - 1]
    _, cache = open_images(run.config, run.config.data.source)
    indices = choose_split(cache.records, folds=2, test=True).validation
    loader = plain_loader(run.config, cache, indices, run.classes)
    measured = validate(run.model, loader, CPU)
    for name, value in measured.items():
        assert float(row[name]) == pytest.approx(value, rel=1e-5), name


def test_a_killed_process_ends_in_the_same_run(
    train_on_two: Two, tmp_path: Path, broken: Path, two: tuple[Path, str], small_pairs: list[str]
) -> None:
    """torchrun starts both again; they go on from the first epoch's end, bit for bit."""
    out = tmp_path / "run"
    done = train_on_two(
        ["--out", str(out), *small_pairs],
        script=broken,
        options=("--max-restarts=1",),
        WHAT="die",
        AT=STEPS + 1,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "resuming after epoch 1, step 0 of the next" in done.stdout
    check_rows(out)
    one, other = (load_checkpoint(run / "checkpoints" / "last.pt") for run in (two[0], out))
    for name in ("epoch", "step", "global_step", "images_seen", "classes"):
        assert one[name] == other[name], name
    assert one["model"].keys() == other["model"].keys()
    for name, value in one["model"].items():
        assert torch.equal(value, other["model"][name]), name


def test_a_signal_to_one_stops_both_and_one_goes_on(
    train_on_two: Two, tmp_path: Path, broken: Path, small_pairs: list[str], console: Console
) -> None:
    out = tmp_path / "run"
    stopped = train_on_two(
        ["--out", str(out), *small_pairs], script=broken, WHAT=int(signal.SIGTERM), AT=0
    )
    assert stopped.returncode != 0
    assert stopped.stdout.count(f"--resume --out {out}") == 1, stopped.stdout + stopped.stderr
    saved = load_checkpoint(out / "checkpoints" / "last.pt")
    assert (saved["epoch"], saved["step"]) == (0, 2)  # where the sums are read
    train_run(RunFolder(out).load_config(), out, resume=True, console=console)
    check_rows(out)


def test_two_go_on_where_one_stopped(
    train_on_two: Two,
    tmp_path: Path,
    small_pairs: list[str],
    small_config,
    console: Console,
    monkeypatch,
) -> None:
    out = tmp_path / "run"
    one_step = Trainer._one_step

    def signalled(self: Trainer, *arguments: Any) -> None:
        if self.global_step == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        one_step(self, *arguments)

    monkeypatch.setattr(Trainer, "_one_step", signalled)
    with pytest.raises(Interrupted):
        train_run(small_config(), out, console=console)
    done = train_on_two(["--out", str(out), "--resume"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "resuming after epoch 0, step 1 of the next" in done.stdout
    check_rows(out)


@pytest.mark.parametrize("came", [False, True], ids=["to another process", "to this one"])
def test_a_process_about_to_end_ignores_sigterm(came: bool) -> None:
    """Whether the signal came to it or not; an impatient SIGINT still ends it."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with StopRequest() as stop:
            if came:
                os.kill(os.getpid(), signal.SIGTERM)
            assert bool(stop) == came
            stop.ignore_sigterm()
            os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert signal.getsignal(signal.SIGINT) == before[signal.SIGINT]
    finally:
        signal.signal(signal.SIGTERM, before[signal.SIGTERM])


def check_rows(out: Path) -> None:
    """Both epochs are whole: every image counted once, whoever counted it."""
    rows = read_metrics(out / "metrics.csv")
    assert [(row["epoch"], row["step"]) for row in rows] == [("1", "3"), ("2", "6")]
    sums = load_checkpoint(out / "checkpoints" / "last.pt")["images_seen"]
    assert sums == 2 * IMAGES
    assert all(abs(counts(row) - round(counts(row))) < 1e-6 for row in rows)


def test_another_run_in_the_folder_is_neither_replaced_nor_gone_on_with(
    train_on_two: Two, tmp_path: Path, two: tuple[Path, str], small_pairs: list[str]
) -> None:
    out = tmp_path / "run"
    shutil.copytree(two[0], out)
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    done = train_on_two(
        ["--out", str(out), *small_pairs, "epochs=3"], options=("--max-restarts=1",)
    )
    assert done.returncode != 0
    assert done.stderr.count("holds another run") == 2, done.stderr
    assert before == {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
