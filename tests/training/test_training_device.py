"""The training loop on each device: what waits, and that a recorded step trains as a plain one.

The kernels' own tests run on every device; here it is the loop around them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from rich.console import Console

from benchmarks.harness.device import HostReads
from magsd.config import Config
from magsd.data import split_by_patient
from magsd.data.run_data import open_images, plain_loader, training_loader
from magsd.methods import methods
from magsd.models import build_model
from magsd.runtime import Runtime
from magsd.training.metrics_log import MetricsLog
from magsd.training.progress import TrainingProgress
from magsd.training.run_folder import RunFolder
from magsd.training.signals import StopRequest
from magsd.training.trainer import Trainer

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=needs_gpu)]


def make_trainer(config: Config, folder: Path, said: list[str]) -> Trainer:
    torch.manual_seed(0)
    classes, cache = open_images(config, config.data.source)
    split = split_by_patient(cache.records, folds=2, seed=0)
    return Trainer(
        config,
        build_model(config.model, len(classes)),
        training_loader(config, cache, split.train, classes),
        plain_loader(config, cache, split.validation, classes),
        RunFolder(folder),
        Runtime.from_config(config.train),
        said.append,
    )


def one_epoch(trainer: Trainer) -> None:
    progress = TrainingProgress(Console(quiet=True), 1, len(trainer.train_loader), 0)
    trainer._train_epoch(MetricsLog(None, None), progress, StopRequest())


@contextlib.contextmanager
def no_waits(device: str) -> Iterator[None]:
    """Raises where the host waits for a GPU; elsewhere, where it would read what a GPU holds."""
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return
    with HostReads() as reads:
        yield
    assert reads.count == 0


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("model", ["magsd-cascade", *methods()])
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_an_epoch_between_two_reports_waits_for_nothing(
    device: str, model: str, precision: str, small_config: Callable[..., Config], tmp_path: Path
) -> None:
    """From the loader to the optimizer, at a new learning rate each step."""
    config = small_config(
        f"model={model}",
        f"train.device={device}",
        f"precision={precision}",
        "log_interval=1000",
        "schedule=cosine",
        "cuda_graph=false",
        "clip_norm=5",
    )
    said: list[str] = []
    trainer = make_trainer(config, tmp_path, said)
    one_epoch(trainer)  # what happens once: libraries' choices, the optimizer's state
    trainer.epoch, trainer.step = 1, 0
    before = torch.get_rng_state()
    with no_waits(device):
        one_epoch(trainer)
    assert torch.equal(torch.get_rng_state(), before), "drawn from torch's own generator"
    assert trainer.read_sums()["train_loss"] > 0


@pytest.mark.parametrize(
    ("model", "kept"),
    [("magsd", "on"), ("magsd", "auto"), ("wsdan", "off"), ("plain", "on"), ("plain", "off")],
)
def test_an_epoch_waits_for_no_copy(
    stand_in: str, model: str, kept: str, small_config: Callable[..., Config], tmp_path: Path
) -> None:
    """Between host and device, whether the images stay there or come batch by batch."""
    config = small_config(
        f"model={model}",
        f"train.device={stand_in}",
        f"images_on_device={kept}",
        "class_weights=balanced",
        "log_interval=1000",
        "schedule=cosine",
        "clip_norm=5",
    )
    trainer = make_trainer(config, tmp_path, [])
    one_epoch(trainer)  # what happens once: the images' copy, the optimizer's state
    trainer.epoch, trainer.step = 1, 0
    with HostReads() as reads:
        one_epoch(trainer)
    assert reads.count == 0
    assert trainer.sums.values.device.type == stand_in


@needs_gpu
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("model", ["magsd", "magsd-cascade", "wsdan"])
def test_recorded_and_plain_steps_lose_alike_over_50_steps(
    model: str, optimizer: str, small_config: Callable[..., Config], tmp_path: Path
) -> None:
    losses = {}
    for graph in (False, True):
        config = small_config(
            f"model={model}",
            f"optim.name={optimizer}",
            "train.device=cuda",
            "source=phantom:n=408,size=32",
            "log_interval=1000",
            f"cuda_graph={graph}",
        )
        said: list[str] = []
        trainer = make_trainer(config, tmp_path / str(graph), said)
        steps = []
        for batch in trainer.train_loader.epoch(0):
            trainer._one_step(batch)
            steps.append(trainer.sums.values[:2].tolist())
        assert said == []
        if graph:
            assert trainer.captured_step is not None
            assert trainer.captured_step.captured
        losses[graph] = torch.tensor(steps)
    assert len(losses[True]) >= 50
    torch.testing.assert_close(losses[True], losses[False], rtol=1e-4, atol=0)
