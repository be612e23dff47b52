"""Views that pass as one batch, each with its own statistics, are views that pass one by one."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from magsd.config import Config, TrainConfig, load_config
from magsd.data import Part
from magsd.data.run_data import open_images, plain_loader
from magsd.distributed import ALONE, Team, synchronize_batchnorm, team_of
from magsd.methods import method
from magsd.models import build_model
from magsd.models.backbone import Backbone
from magsd.runtime import Runtime
from magsd.training.optim import build_optimizer
from magsd.training.run_folder import RunFolder
from magsd.training.step import BatchShard, StepResult
from magsd.training.train_step import TrainStep
from magsd.training.trainer import Trainer
from magsd_kernels import norm_groups

CLASSES = 3
IMAGES = 4
STEPS = 20
#: Relative, in float64.
BOUND = 1e-10
#: With confidence 1 no prediction of the image is a target of the distance: where a view equals its
#: image, |p - q| would have either sign by rounding.
SMALL = (
    "confidence=1",
    "backbone=test_resnet",
    "backbone_args={output_stride: 16}",
    "pretrained=false",
    "attention_maps=4",
)


def config_of(*pairs: str) -> Config:
    return load_config(None, pairs, shared=SMALL)


class Training:
    """Steps as the trainer takes them, on images that are drawn."""

    def __init__(
        self,
        config: Config,
        dtype: torch.dtype = torch.float64,
        prepare: Callable[[nn.Module], None] = lambda model: None,
        team: Team = ALONE,
    ) -> None:
        torch.manual_seed(0)
        self.dtype, self.team = dtype, team
        runtime = Runtime.from_config(config.train)
        self.model = runtime.model(build_model(config.model, CLASSES).to(dtype))
        self.model.backbone.recompute = config.train.recompute
        prepare(self.model)
        self.passes: list[int] = []
        self.model.register_forward_pre_hook(lambda _, inputs: self.passes.append(len(inputs[0])))
        self.step = TrainStep(
            self.model,
            build_optimizer(self.model, config.optim),
            method(config.model.name).objective(config, None),
            runtime,
            team=team,
            fuse_norm=config.train.fuse_norm,
        )

    def one(self, number: int) -> StepResult:
        rank, size = self.team.rank, self.team.size
        draw = torch.Generator().manual_seed(size * number + rank)
        images = torch.randn(IMAGES, 1, 8, 8, generator=draw, dtype=torch.float64)
        images = nn.functional.interpolate(images, (32, 32), mode="bilinear").to(self.dtype)
        labels = torch.randint(0, CLASSES, (IMAGES,), generator=draw)
        torch.manual_seed(number)  # of what layers draw
        if size == 1:
            return self.step(images, labels, draw)
        shard = BatchShard(Part(rank * IMAGES, size * IMAGES), 1.0, 1.0, self.team.all_reduce)
        return self.step(images, labels, torch.Generator().manual_seed(number), shard)

    def follow(self, other: Training) -> None:
        """Take over the other's parameters, buffers and optimizer."""
        self.model.load_state_dict(other.model.state_dict())
        self.step.load_state_dict(deepcopy(other.step.state_dict()))

    def gradient(self) -> Tensor:
        return torch.cat([p.grad.flatten() for p in self.model.parameters()])


def compare(found: Training, wanted: Training, *, steps: int, bound: float = BOUND) -> None:
    """Each step from the state to which `wanted` has come: losses, gradient, statistics, weights.

    By themselves two runs come apart however alike their steps are, see test_training_agreement.py.
    """
    for number in range(steps):
        found.follow(wanted)
        for mine, other in zip(found.one(number), wanted.one(number), strict=True):
            assert float((mine - other).abs()) <= bound * float(other.abs()), number
        mine, other = found.gradient(), wanted.gradient()
        assert float((mine - other).norm()) <= bound * float(other.norm()), number
        state = found.model.state_dict()
        for key, value in wanted.model.state_dict().items():
            difference = (state[key] - value).abs().max()
            assert float(difference) <= bound * float(value.abs().max()), (number, key)


MODELS = {
    "batch norm": [],
    "group norm": ["backbone=test_efficientnet_gn", "backbone_args={}"],
    "layer norm": ["backbone=test_convnext", "backbone_args={}"],
}
OTHERS = {
    "efficientnet": ["backbone=test_efficientnet"],
    "cascade": ["model=magsd-cascade"],
    "wsdan": ["model=wsdan"],
    "recompute": ["recompute=true"],
    "channels_last": ["channels_last=true"],
}


@pytest.mark.parametrize("name", [*MODELS, *OTHERS])
def test_steps_are_those_of_separate_views(name: str) -> None:
    pairs = (MODELS | OTHERS)[name]
    grouped, separate = (
        Training(config_of(*pairs, f"views={views}")) for views in ("grouped", "separate")
    )
    steps = STEPS if name in MODELS else 3
    compare(grouped, separate, steps=steps)
    views = 2 if name == "wsdan" else 3
    assert grouped.passes == [IMAGES, IMAGES * views] * steps
    assert separate.passes == [IMAGES] * (1 + views) * steps


@pytest.mark.parametrize("model", ["magsd", "plain"])
def test_fused_norms_give_what_torch_gives(model: str) -> None:
    fused, torchs = (
        Training(config_of(f"model={model}", f"fuse_norm={value}")) for value in ("true", "false")
    )
    compare(fused, torchs, steps=3)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_in_half_precision(precision: str) -> None:
    grouped, separate = (
        Training(config_of(f"precision={precision}", f"views={views}"), torch.float32)
        for views in ("grouped", "separate")
    )
    for number in range(2):
        grouped.follow(separate)
        for mine, other in zip(grouped.one(number), separate.one(number), strict=True):
            torch.testing.assert_close(mine, other, rtol=0.02, atol=0.02)
        assert grouped.step.scaler.state_dict() == separate.step.scaler.state_dict()
    assert grouped.passes == [IMAGES, 3 * IMAGES] * 2


def test_synchronized_norms_run_group_by_group() -> None:
    """As under several processes; of this one alone they are ordinary batch statistics."""
    grouped = Training(config_of("views=grouped"), prepare=synchronize_batchnorm)
    compare(grouped, Training(config_of("views=separate")), steps=2)
    assert grouped.passes == [IMAGES, 3 * IMAGES] * 2


#: What `compare_together` below is called by.
TOGETHER = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_grouped_views import compare_together
compare_together()
"""


def compare_together() -> None:
    with team_of(TrainConfig(device="cpu")) as team:
        grouped, separate = (
            Training(config_of(f"views={views}"), team=team) for views in ("grouped", "separate")
        )
        compare(grouped, separate, steps=2)
        assert grouped.passes == [IMAGES, 3 * IMAGES] * 2


def test_in_two_processes(
    torchrun: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    (tmp_path / "script.py").write_text(TOGETHER)
    done = torchrun(tmp_path / "script.py")
    assert done.returncode == 0, done.stdout + done.stderr


def test_recomputed_groups_pass_one_at_a_time() -> None:
    """In the backward, too: so no more is kept than of a pass of one group."""
    backbone = Backbone("test_resnet", scales=1)
    backbone.recompute = True
    passes: list[int] = []
    backbone.net.register_forward_pre_hook(lambda _, inputs: passes.append(len(inputs[0])))
    with norm_groups(3):
        maps = backbone(torch.randn(6, 1, 32, 32))
    assert [len(each) for each in maps] == [6]
    maps[0].sum().backward()
    assert passes == [2] * 6


REASONS = {
    "drop_path": (
        ["backbone_args={drop_path_rate: 0.2}"],
        "dropout or stochastic depth would be drawn otherwise",
    ),
    "dropout": (["model=magsd-dropout"], "dropout or stochastic depth would be drawn otherwise"),
    "unfused": (
        ["fuse_norm=false"],
        "the batch statistics of backbone.net.conv1.1 and 14 more would be those of all views",
    ),
    "unknown": (
        ["backbone=test_efficientnet", "backbone_args={norm_layer: evonormb0}"],
        "the batch statistics of backbone.net.bn1 and ",
    ),
    "checkpointed": (
        [
            "backbone=densenet121",
            "backbone_args={memory_efficient: true, growth_rate: 4, block_config: [2, 1, 1, 1]}",
        ],
        "backbone.net.features_denseblock1.denselayer1 computes its activations again by itself",
    ),
    "none": ([], None),
    "nothing to fuse": (
        ["fuse_norm=false", "backbone=test_efficientnet_gn", "backbone_args={}"],
        None,
    ),
    "separate": (["fuse_norm=false", "views=separate"], None),
    "merged": (["fuse_norm=false", "views=merged"], None),
    "plain": (["model=plain", "fuse_norm=false"], None),
}


@pytest.mark.parametrize("case", REASONS)
def test_a_line_says_why_views_pass_one_by_one(
    case: str, small_config: Callable[..., Config], tmp_path: Path
) -> None:
    settings, why = REASONS[case]
    config = small_config(*settings)
    classes, cache = open_images(config, config.data.source)
    loader = plain_loader(config, cache, list(range(8)), classes)
    said: list[str] = []
    trainer = Trainer(
        config,
        build_model(config.model, len(classes)),
        loader,
        loader,
        RunFolder(tmp_path),
        Runtime.from_config(config.train),
        said.append,
    )
    assert len(said) == (why is not None)
    if why is not None:
        assert said[0].startswith(f"the views pass one by one (views=separate): {why}")
    if config.train.views == "grouped":
        assert trainer.model.takes_groups == (why is None and case != "plain")


def test_views_that_cannot_be_grouped_pass_one_by_one() -> None:
    grouped, separate = (
        Training(config_of("backbone_args={drop_path_rate: 0.5}", f"views={views}"))
        for views in ("grouped", "separate")
    )
    compare(grouped, separate, steps=2, bound=0.0)
    assert grouped.passes == separate.passes == [IMAGES] * 8
