"""A run that was stopped and resumed equals one that was not, bit for bit."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from magsd.config import Config
from magsd.errors import ConfigError, RunError
from magsd.training import trainer
from magsd.training.checkpoint import load_checkpoint
from magsd.training.metrics_log import read_metrics
from magsd.training.run import train_run
from magsd.training.trainer import Interrupted, Trainer

STEPS = 3  # an epoch of the small run

# Runs the command in a process that sends itself a signal while a step is under way.
CHILD = """
import os
from magsd.training.trainer import Trainer
step = Trainer._one_step
def one_step(self, *arguments):
    if self.global_step == int(os.environ["AT"]):
        os.kill(os.getpid(), int(os.environ["SEND"]))
    step(self, *arguments)
Trainer._one_step = one_step
from magsd.cli import main
main()
"""


Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def run_command(warm_python: Command) -> Command:
    """Runs the command; with SEND and AT it sends itself that signal in the step after AT steps."""

    def run(arguments: list[str], **send: object) -> subprocess.CompletedProcess[str]:
        return warm_python(*(["-c", CHILD] if send else ["-m", "magsd"]), *arguments, **send)

    return run


@pytest.fixture(scope="module")
def whole_run(run_command: Command, small_pairs: list[str], made_once: Callable[..., Path]) -> Path:
    """An uninterrupted run in its own process."""

    def train(folder: Path) -> None:
        done = run_command(["train", "--out", str(folder / "run"), *small_pairs])
        assert done.returncode == 0, done.stdout + done.stderr

    return made_once("whole", train) / "run"


def assert_same_runs(first: Path, second: Path, same_state: Callable[[Any, Any], None]) -> None:
    for name in ("last.pt", "best.pt"):
        one, other = (load_checkpoint(run / "checkpoints" / name) for run in (first, second))
        one.pop("config"), other.pop("config")
        same_state(one, other)
    times = {"seconds", "images_per_second"}
    one, other = (
        [
            {k: v for k, v in row.items() if k not in times}
            for row in read_metrics(run / "metrics.csv")
        ]
        for run in (first, second)
    )
    assert one == other
    assert (first / "split.csv").read_bytes() == (second / "split.csv").read_bytes()


@pytest.mark.parametrize(
    ("number", "at", "stored"),
    [
        (signal.SIGTERM, STEPS + 1, (1, 2)),
        (signal.SIGINT, STEPS - 1, (0, STEPS)),
    ],
    ids=["middle of an epoch", "end of an epoch"],
)
def test_signal_then_resume_in_real_processes(
    number: signal.Signals,
    at: int,
    stored: tuple[int, int],
    run_command: Command,
    tmp_path: Path,
    small_pairs: list[str],
    whole_run: Path,
    same_state,
) -> None:
    out = tmp_path / "run"
    stopped = run_command(["train", "--out", str(out), *small_pairs], SEND=int(number), AT=at)
    assert stopped.returncode == 128 + number, stopped.stdout + stopped.stderr
    assert f"--resume --out {out}" in stopped.stdout
    saved = load_checkpoint(out / "checkpoints" / "last.pt")
    assert (saved["epoch"], saved["step"]) == stored
    resumed = run_command(["train", "--resume", "--out", str(out)])
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert_same_runs(whole_run, out, same_state)


def test_kill_then_resume_in_real_processes(
    run_command: Command, tmp_path: Path, small_pairs: list[str], whole_run: Path, same_state
) -> None:
    """SIGKILL in the middle of the second epoch: the end of the first is what remains."""
    out = tmp_path / "run"
    killed = run_command(
        ["train", "--out", str(out), *small_pairs],
        SEND=int(signal.SIGKILL),
        AT=STEPS + 1,
    )
    assert killed.returncode == -signal.SIGKILL
    saved = load_checkpoint(out / "checkpoints" / "last.pt")
    assert (saved["epoch"], saved["step"]) == (1, 0)
    load_checkpoint(out / "checkpoints" / "best.pt")
    resumed = run_command(["train", "--resume", "--out", str(out)])
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert_same_runs(whole_run, out, same_state)


def train_and_stop(config: Config, out: Path, console: Console, at: int, monkeypatch) -> None:
    """Train in this process; SIGTERM comes during the step after `at` steps."""
    one_step = Trainer._one_step

    def signalled(self: Trainer, *arguments: Any) -> None:
        if self.global_step == at:
            os.kill(os.getpid(), signal.SIGTERM)
        one_step(self, *arguments)

    monkeypatch.setattr(Trainer, "_one_step", signalled)
    with pytest.raises(Interrupted) as stopped:
        train_run(config, out, console=console)
    assert stopped.value.signum == signal.SIGTERM
    monkeypatch.undo()


@pytest.mark.parametrize(
    "overrides",
    [
        ("optim.name=adamw", "schedule=cosine", "warmup_epochs=1", "decay_norms=false"),
        ("precision=bfloat16", "channels_last=true", "clip_norm=1.0"),
        ("model.name=plain", "class_weights=balanced", "deterministic=true"),
        ("backbone_args={output_stride: 16, drop_path_rate: 0.5}", "train.batch_size=3"),
        ("checkpoint_interval=2",),
        ("ema=0.9", "lr=0.1"),
        (
            "ema=0.6",
            "model=wsdan",
            "backbone=test_resnet",
            "recompute=true",
            "checkpoint_interval=1",
        ),
    ],
    ids=[
        *("adamw", "bfloat16", "plain", "random depth", "frequent checkpoints"),
        *("average", "average and centers"),
    ],
)
def test_every_setting_resumes_bit_equal(
    overrides: tuple[str, ...], tmp_path: Path, small_config, console, same_state, monkeypatch
) -> None:
    config = small_config(*overrides)
    train_run(config, tmp_path / "whole", console=console)
    for at in (1, STEPS + 1):
        out = tmp_path / f"stopped{at}"
        train_and_stop(config, out, console, at, monkeypatch)
        train_run(config, out, resume=True, console=console)
        assert_same_runs(tmp_path / "whole", out, same_state)


def test_signal_during_validation(
    tmp_path: Path, small_config, console, same_state, monkeypatch
) -> None:
    """The finished epoch is kept, and only its validation done again."""
    train_run(small_config(), tmp_path / "whole", console=console)
    validate = trainer.validate

    def signalled(*arguments: Any, **named: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return validate(*arguments, **named)

    monkeypatch.setattr(trainer, "validate", signalled)
    out = tmp_path / "run"
    with pytest.raises(Interrupted):
        train_run(small_config(), out, console=console)
    monkeypatch.undo()
    saved = load_checkpoint(out / "checkpoints" / "last.pt")
    assert (saved["epoch"], saved["step"]) == (0, STEPS)
    train_run(small_config(), out, resume=True, console=console)
    assert_same_runs(tmp_path / "whole", out, same_state)


def test_resume_after_the_first_epoch_extends(
    tmp_path: Path, small_config, console, same_state
) -> None:
    """A run of one epoch that is told to go on for another equals a run of two."""
    overrides = ("schedule=constant",)
    train_run(small_config(*overrides), tmp_path / "two", console=console)
    train_run(small_config(*overrides, "epochs=1"), tmp_path / "one", console=console)
    train_run(small_config(*overrides), tmp_path / "one", resume=True, console=console)
    assert_same_runs(tmp_path / "two", tmp_path / "one", same_state)


def test_rows_newer_than_the_checkpoint_are_written_again(
    tmp_path: Path, small_config, console
) -> None:
    out = tmp_path / "run"
    train_run(small_config("epochs=1"), out, console=console)
    with open(out / "metrics.csv", "a") as file:
        file.write("2,6,half a ro")
    train_run(small_config(), out, resume=True, console=console)
    rows = read_metrics(out / "metrics.csv")
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert float(rows[1]["train_loss"]) > 0


def test_different_seeds_differ(tmp_path: Path, small_config, console) -> None:
    """The comparison above can fail."""
    train_run(small_config(), tmp_path / "a", console=console)
    train_run(small_config("train.seed=1"), tmp_path / "b", console=console)
    first, second = (read_metrics(tmp_path / name / "metrics.csv") for name in "ab")
    assert first[-1]["train_loss"] != second[-1]["train_loss"]


@pytest.mark.parametrize(
    "pair",
    ["attention_maps=8", "train.seed=4", "batch_size=8", "fold=1", "ema=0.5", "monitor=loss"],
)
def test_resume_refuses_what_the_state_depends_on(
    pair: str, tmp_path: Path, small_config, console
) -> None:
    train_run(small_config("epochs=1"), tmp_path / "run", console=console)
    with pytest.raises(ConfigError, match=f"cannot change: .*{pair.split('=')[0]}"):
        train_run(small_config(pair), tmp_path / "run", resume=True, console=console)


def test_resume_without_a_run(tmp_path: Path, small_config, console) -> None:
    with pytest.raises(RunError, match="holds no run"):
        train_run(small_config(), tmp_path / "none", resume=True, console=console)


def test_resume_from_a_corrupt_checkpoint(tmp_path: Path, small_config, console) -> None:
    out = tmp_path / "run"
    train_run(small_config("epochs=1"), out, console=console)
    last = out / "checkpoints" / "last.pt"
    last.write_bytes(last.read_bytes()[:1000])
    with pytest.raises(RunError, match=r"corrupt checkpoint .*last\.pt"):
        train_run(small_config(), out, resume=True, console=console)


def test_resume_without_the_last_checkpoint_keeps_the_best(
    tmp_path: Path, small_config, console
) -> None:
    out = tmp_path / "run"
    train_run(small_config("epochs=1"), out, console=console)
    (out / "checkpoints" / "last.pt").unlink()
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    with pytest.raises(RunError, match=r"no checkpoint at .*last\.pt.*best\.pt is there"):
        train_run(small_config(), out, resume=True, console=console)
    assert before == {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}


def test_resume_needs_no_pretrained_weights(tmp_path: Path, small_config, console) -> None:
    import timm
    from safetensors.torch import save_file

    weights = tmp_path / "weights.safetensors"
    save_file(timm.create_model("test_resnet").state_dict(), weights)
    pair = f"pretrained={weights}"
    out = tmp_path / "run"
    train_run(small_config(pair, "in_channels=3", "epochs=1"), out, console=console)
    weights.unlink()
    train_run(small_config(pair, "in_channels=3"), out, resume=True, console=console)


def test_resume_before_the_first_checkpoint_starts_anew(
    tmp_path: Path, small_config, console, same_state
) -> None:
    train_run(small_config("epochs=1"), tmp_path / "whole", console=console)
    out = tmp_path / "run"
    train_run(small_config("epochs=1"), out, console=console)
    for name in ("last.pt", "best.pt"):
        (out / "checkpoints" / name).unlink()
    train_run(small_config("epochs=1"), out, resume=True, console=console)
    assert_same_runs(tmp_path / "whole", out, same_state)
