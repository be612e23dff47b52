"""One step of training in every precision, and the whole of a run in each."""

from __future__ import annotations

import inspect
import itertools
import math
import subprocess
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from magsd.config import Config, OptimConfig
from magsd.runtime import CPU, Runtime
from magsd.torch_settings import deterministic_algorithms
from magsd.training import trainer as trainer_module
from magsd.training.checkpoint import load_checkpoint
from magsd.training.metrics_log import StepSums, read_metrics
from magsd.training.optim import build_optimizer
from magsd.training.run import train_run
from magsd.training.step import StepResult
from magsd.training.train_step import TrainStep
from magsd.training.trainer import Interrupted, Trainer

FLOAT16 = Runtime(precision="float16")


class Objective:
    """Mean of squares times a factor, under which gradients can overflow."""

    def __init__(self, factor: float = 1.0) -> None:
        self.factor = factor

    def __call__(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        generator: torch.Generator | None,
        shard: object = None,
    ) -> StepResult:
        values = model(images)
        loss = self.factor * values.float().square().mean()
        correct = (values.detach().argmax(1) == labels).sum()
        return StepResult(loss, loss.detach(), torch.zeros_like(loss.detach()), correct)


def make_step(
    runtime: Runtime, factor: float = 1.0, *, fuse_norm: bool = False, **optim: Any
) -> TrainStep:
    torch.manual_seed(0)
    model: nn.Module = nn.Linear(4, 3)
    if fuse_norm:
        as_images = nn.Unflatten(1, (4, 1, 1))
        model = nn.Sequential(as_images, nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), model)
    settings = OptimConfig(**{"lr": 0.1, **optim})
    return TrainStep(
        model,
        build_optimizer(model, settings),
        Objective(factor),
        runtime,
        clip_norm=settings.clip_norm,
        sums=StepSums(runtime.device),
        fuse_norm=fuse_norm,
    )


def batch(seed: int = 0) -> tuple[Tensor, Tensor, None]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(8, 4, generator=generator), torch.zeros(8, dtype=torch.int64), None


def weights(step: TrainStep) -> Tensor:
    return torch.cat([p.detach().flatten() for p in step.model.parameters()])


#: Every setting of the step itself, switched on.
SETTINGS: list[dict[str, Any]] = [
    {},
    {"name": "adamw"},
    {"clip_norm": 0.1},
    {"fuse_norm": True},
]
in_every_way = pytest.mark.parametrize(
    ("settings", "runtime"), list(itertools.product(SETTINGS, (CPU, FLOAT16)))
)


def own_state(step: TrainStep) -> dict[str, Any]:
    """What a step holds beside what it is given, and beside the scaler."""
    given = inspect.signature(TrainStep).parameters
    return {k: v for k, v in vars(step).items() if k not in given and k != "scaler"}


def test_every_setting_is_tried() -> None:
    parameters = inspect.signature(TrainStep).parameters.values()
    settings = {each.name for each in parameters if each.kind is each.KEYWORD_ONLY}
    assert settings - {"sums", "team", "sync_batchnorm"} <= {name for s in SETTINGS for name in s}


@in_every_way
def test_a_step_neither_reads_nor_draws(settings: dict[str, Any], runtime: Runtime) -> None:
    """The host waits for nothing; what is random comes from the generator that is given."""
    # The script of two processes below imports this file without the benchmarks.
    from benchmarks.harness.device import HostReads

    step = make_step(runtime, **settings)
    step(*batch())
    before = torch.get_rng_state()
    with HostReads() as reads:
        step(*batch(1))
    assert reads.count == 0
    assert torch.equal(torch.get_rng_state(), before)


@in_every_way
def test_a_step_changes_the_memory_that_it_has(settings: dict[str, Any], runtime: Runtime) -> None:
    """A CUDA graph repeats it with the addresses and with the host's numbers of one step."""
    step = make_step(runtime, **settings)

    def seen() -> Any:
        return pytree.tree_map_only(Tensor, Tensor.data_ptr, own_state(step))

    step(*batch())
    before = seen()
    step(*batch(1))
    assert seen() == before


@in_every_way
def test_a_resumed_step_has_all_that_it_had(
    settings: dict[str, Any], runtime: Runtime, same_state: Callable[[Any, Any], None]
) -> None:
    step, resumed = make_step(runtime, **settings), make_step(runtime, **settings)
    for seed in range(3):
        step(*batch(seed))
    resumed.model.load_state_dict(step.model.state_dict())
    resumed.load_state_dict(deepcopy(step.state_dict()))
    for each in (step, resumed):
        each(*batch(3))
    assert torch.equal(weights(step), weights(resumed))
    same_state(own_state(step), own_state(resumed))
    same_state(step.state_dict(), resumed.state_dict())


def test_a_checkpoint_from_before_later_additions_is_taken_over() -> None:
    step, saved = make_step(CPU), make_step(CPU)
    saved(*batch())
    step.load_state_dict({"optimizer": saved.state_dict()["optimizer"]})
    step(*batch(1))


@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize("clip_norm", [None, 0.1])
def test_float16_steps_are_near_those_of_float32(name: str, clip_norm: float | None) -> None:
    """However large the scale: gradients are clipped and applied without it."""
    steps = [make_step(each, name=name, clip_norm=clip_norm) for each in (CPU, FLOAT16)]
    start = weights(steps[0])
    for seed in range(3):
        for step in steps:
            step(*batch(seed))
    moved, wanted = (weights(step) - start for step in reversed(steps))
    assert float(wanted.norm()) > 0.01
    assert float((moved - wanted).norm() / wanted.norm()) < 0.02
    assert float(steps[1].scaler.get_scale()) == 2**16


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_step_whose_gradients_overflow_is_skipped(name: str) -> None:
    """Also where it is the first, of which torch's fused SGD would keep unwritten momentum."""
    with deterministic_algorithms(True):  # fills what is not written with NaN
        step = make_step(FLOAT16, factor=30, name=name, lr=1e-3)
        start = weights(step)
        step(*batch())
        assert torch.equal(weights(step), start)
        assert float(step.scaler.get_scale()) == 2**15
        for _ in range(8):
            step(*batch())
    assert bool(weights(step).isfinite().all())
    assert not torch.equal(weights(step), start)
    assert math.isfinite(step.sums.read()["train_loss"])


def test_a_reset_step_goes_on_with_its_scale() -> None:
    step = make_step(FLOAT16, factor=1e4)
    step(*batch())
    step.scaler.scale(torch.ones(()))
    step.optimizer.zero_grad()
    step.objective(step.model, *batch()).loss.backward()
    step.scaler.unscale_(step.optimizer)  # half a step
    step.reset()
    assert float(step.scaler.get_scale()) == 2**15
    step(*batch())


@pytest.mark.parametrize("before", ["float32", "float16"])
@pytest.mark.parametrize("after", ["float32", "float16"])
def test_a_state_is_taken_over_by_any_precision(before: str, after: str) -> None:
    saved, step = (make_step(Runtime(precision=each), factor=1e4) for each in (before, after))
    saved(*batch())
    step.load_state_dict(deepcopy(saved.state_dict()))
    kept = before == after == "float16"
    if after == "float16":
        assert float(step.scaler.get_scale()) == (2**15 if kept else 2**16)
        assert all("momentum_buffer" in state for state in step.optimizer.state.values())
    step(*batch())
    assert bool(weights(step).isfinite().all())


def test_a_float16_run_resumes_bit_for_bit(
    small_config: Callable[..., Config], tmp_path: Path, console: Any, monkeypatch, same_state
) -> None:
    """With the scale at which it stopped, which a first step that overflows has halved."""
    config = small_config("precision=float16", "clip_norm=5", "epochs=3")
    train_run(config, tmp_path / "whole", console=console)
    one_step = Trainer._one_step

    def stopped(self: Trainer, *arguments: Any) -> None:
        one_step(self, *arguments)
        if self.global_step == 4:
            raise trainer_module._Stop(15)

    monkeypatch.setattr(Trainer, "_one_step", stopped)
    with pytest.raises(Interrupted):
        train_run(config, tmp_path / "run", console=console)
    monkeypatch.setattr(Trainer, "_one_step", one_step)
    train_run(config, tmp_path / "run", resume=True, console=console)
    whole, resumed = (
        load_checkpoint(tmp_path / name / "checkpoints" / "last.pt") for name in ("whole", "run")
    )
    whole.pop("config"), resumed.pop("config")
    same_state(whole, resumed)


#: Trains in two processes; the images of one alone overflow at first.
TOGETHER = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_train_step import train_together
train_together(sys.argv[1])
"""


def train_together(out: str) -> None:
    """Six float16 steps of a process that has half of the images."""
    from magsd.config import TrainConfig
    from magsd.data import Part
    from magsd.distributed import team_of
    from magsd.training.step import BatchShard

    with team_of(TrainConfig(device="cpu")) as team:
        one = make_step(FLOAT16)
        step = TrainStep(one.model, one.optimizer, Objective(), FLOAT16, clip_norm=1.0, team=team)
        shard = BatchShard(Part(8 * team.rank, 16), 1.0, 1.0, team.all_reduce)
        scales, moved = [], []
        for seed in range(6):
            images, labels, _ = batch(2 * seed + team.rank)
            large = 300.0 if team.rank == 1 and seed < 2 else 1.0
            step(large * images, labels, None, shard)
            scales.append(step.scaler.get_scale())
            moved.append(weights(step))
        torch.save({"scales": scales, "weights": torch.stack(moved)}, f"{out}.{team.rank}")


def test_processes_agree_on_the_scale_and_on_skipped_steps(
    torchrun: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    (tmp_path / "script.py").write_text(TOGETHER)
    done = torchrun(tmp_path / "script.py", tmp_path / "kept")
    assert done.returncode == 0, done.stdout + done.stderr
    first, second = (torch.load(tmp_path / f"kept.{rank}") for rank in (0, 1))
    assert first["scales"] == second["scales"]
    assert first["scales"][0] < 2**16
    assert torch.equal(first["weights"], second["weights"])
    assert bool(first["weights"].isfinite().all())
    assert not torch.equal(first["weights"][-1], first["weights"][0])


def test_a_compiled_backbone_trains_in_float16(
    small_config: Callable[..., Config], tmp_path: Path, console: Any, monkeypatch
) -> None:
    """How it is lowered does not matter here."""
    compile_with = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self: compile_with(self, backend="aot_eager"))
    torch._dynamo.reset()
    try:
        trained = train_run(
            small_config("precision=float16", "compile=true", "epochs=1"),
            tmp_path / "run",
            console=console,
        )
    finally:
        torch._dynamo.reset()
    (row,) = read_metrics(trained.folder.metrics)
    assert math.isfinite(float(row["train_loss"]))
