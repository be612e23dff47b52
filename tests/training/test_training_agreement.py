"""`magsd train --kernels cpu` takes the steps that `--kernels reference` takes."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import magsd_kernels
from magsd.config import Config, load_config
from magsd.data import Batch, split_by_patient
from magsd.data.cache import ImageCache
from magsd.data.run_data import open_images, plain_loader, training_loader
from magsd.models import build_model
from magsd.runtime import Runtime
from magsd.training.run_folder import RunFolder
from magsd.training.step import StepResult
from magsd.training.trainer import Trainer

STEPS = 20
#: The default run of `magsd train`, on fewer and smaller images.
SMALLER = (
    "data.source=phantom:n=160,size=48",
    "image_size=48",
    "batch_size=6",
    "train.device=cpu",
)
CPU = magsd_kernels.backends()["cpu"]
pytestmark = pytest.mark.skipif(CPU != "available", reason=f"C++ kernels: {CPU}")


class Bounds(NamedTuple):
    """Relative differences that rounding explains."""

    loss: float
    statistics: float
    gradient: float


#: A few units in the last place of a loss; of a gradient what four passes through a network make
#: of that.
BOUNDS = {torch.float32: Bounds(1e-6, 1e-6, 3e-6), torch.float64: Bounds(1e-14, 1e-14, 1e-10)}


@pytest.fixture(scope="module")
def config(cache_dir: Path) -> Config:
    return load_config("phantom", [*SMALLER, f"cache_dir={cache_dir}"])


@pytest.fixture(scope="module")
def images(config: Config) -> tuple[tuple[str, ...], ImageCache]:
    return open_images(config, config.data.source)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Run:
    """A trainer on one backend, and what its last step gave."""

    def __init__(
        self,
        backend: str,
        config: Config,
        images: tuple[tuple[str, ...], ImageCache],
        dtype: torch.dtype,
        folder: Path,
    ) -> None:
        classes, cache = images
        split = split_by_patient(cache.records, folds=config.data.folds, fold=0, seed=0)
        torch.manual_seed(config.train.seed)
        self.backend = backend
        self.trainer = Trainer(
            config,
            build_model(config.model, len(classes), classes=classes).to(dtype),
            training_loader(config, cache, split.train, classes),
            plain_loader(config, cache, split.validation, classes),
            RunFolder(folder),
            Runtime.from_config(config.train),
        )
        self._objective = self.trainer.train_step.objective
        self.trainer.train_step.objective = self._recorded

    def _recorded(self, *arguments: object) -> StepResult:
        self.result = self._objective(*arguments)
        return self.result

    def follow(self, other: Run) -> None:
        """Take over the other's parameters, buffers and optimizer."""
        self.trainer.model.load_state_dict(other.trainer.model.state_dict())
        optimizer = other.trainer.train_step.optimizer
        self.trainer.train_step.optimizer.load_state_dict(deepcopy(optimizer.state_dict()))

    def step(self, batch: Batch) -> None:
        """One step as the training loop takes it."""
        with magsd_kernels.use_backend(self.backend):
            self.trainer._one_step(batch)

    def losses(self) -> Tensor:
        result = self.result
        return torch.stack([result.loss.detach(), result.cross_entropy, result.distance])

    def statistics(self) -> Tensor:
        """Running means and variances of every batch norm."""
        buffers = [x for x in self.trainer.model.buffers() if x.is_floating_point()]
        return torch.cat([x.flatten().double() for x in buffers])

    def gradient(self) -> Tensor:
        return torch.cat([p.grad.flatten().double() for p in self.trainer.model.parameters()])


def difference(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_steps_agree(
    dtype: torch.dtype,
    config: Config,
    images: tuple[tuple[str, ...], ImageCache],
    tmp_path: Path,
) -> None:
    """Each of the first steps, from the state to which the reference has come.

    Two runs that go on by themselves say little. AdamW divides a gradient by its own size, so that
    an entry which is nothing but rounding moves its weight as far as any other: on these images
    runs in float64 that are 5e-15 apart after the second step are 1e-2 apart after twenty, and in
    float32 the reference comes apart from itself on another number of threads. From a common state
    the comparison can be tight: every loss, the batch norms' running statistics, and the whole
    gradient.

    A gradient has corners (rectifiers, the thresholds of the views, the root in the pooling), at
    which float32 may stand on either side; so there the median step is judged. In float64 no step
    comes that near to one, and each is. In float32 the backbone's norms are torch's own.
    """
    if dtype == torch.float32:
        config = load_config(None, ["fuse_norm=false"], base=deepcopy(config))
    gradients = [each.between for each in compared(config, images, dtype, tmp_path, steps=STEPS)]
    judged = statistics.median(gradients) if dtype == torch.float32 else max(gradients)
    assert judged <= BOUNDS[dtype].gradient, gradients


def test_fused_norms_in_float32_are_as_near_to_float64_as_the_reference_is(
    config: Config, images: tuple[tuple[str, ...], ImageCache], tmp_path: Path
) -> None:
    """Every norm of the backbone rounds in its own way, on both sides of the comparison."""
    gradients = compared(config, images, torch.float32, tmp_path, steps=STEPS)
    ours, theirs = (statistics.median(each[i] for each in gradients) for i in (1, 2))
    assert ours <= 2 * theirs, gradients


@pytest.mark.parametrize("model", ["magsd-up", "magsd-cascade", "magsd-max", "wsdan"])
def test_steps_of_other_models_agree(
    model: str,
    config: Config,
    images: tuple[tuple[str, ...], ImageCache],
    tmp_path: Path,
) -> None:
    """In float64; other layers around the same operations, or other operations."""
    pairs = [f"model={model}", "backbone_args={output_stride: 16}"]
    other = load_config(None, pairs, base=deepcopy(config))
    gradients = compared(other, images, torch.float64, tmp_path, steps=4)
    assert max(each.between for each in gradients) <= BOUNDS[torch.float64].gradient, gradients


class Gradients(NamedTuple):
    """Differences of a step's gradients: of the kernels' from the reference's, and of both from the
    reference's in float64.
    """

    between: float
    ours: float
    theirs: float


def compared(
    config: Config,
    images: tuple[tuple[str, ...], ImageCache],
    dtype: torch.dtype,
    folder: Path,
    *,
    steps: int,
) -> list[Gradients]:
    """Check losses and statistics of the first steps; how their gradients differ."""
    bounds = BOUNDS[dtype]
    reference = Run("reference", config, images, dtype, folder / "reference")
    cpu = Run("cpu", config, images, dtype, folder / "cpu")
    exact = Run("reference", config, images, torch.float64, folder / "exact")
    gradients = []
    for number, batch in zip(range(steps), reference.trainer.train_loader.epoch(0), strict=False):
        for run in (cpu, exact):
            run.follow(reference)
        for run in (reference, cpu):
            run.step(batch._replace(images=batch.images.to(dtype)))
        if dtype != torch.float64:
            exact.step(batch._replace(images=batch.images.double()))
        assert difference(cpu.losses(), reference.losses()) <= bounds.loss, number
        assert difference(cpu.statistics(), reference.statistics()) <= bounds.statistics, number
        right = reference if dtype == torch.float64 else exact
        found = [(cpu, reference), (cpu, right), (reference, right)]
        gradients.append(Gradients(*(difference(a.gradient(), b.gradient()) for a, b in found)))
    assert len(gradients) == steps
    return gradients
