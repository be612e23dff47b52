"""What each of several processes does by itself: its part of a batch, its settings, its place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from magsd.cli import train
from magsd.config import Config, load_config
from magsd.data import Part, shard_bounds
from magsd.data.run_data import open_images, training_loader
from magsd.distributed import (
    Team,
    note_launch,
    restarted,
    synchronize_batchnorm,
    team_of,
)
from magsd.errors import ConfigError, DataError
from magsd.methods import method
from magsd.methods.magsd import MAGSDViews, MAGSDViewsConfig
from magsd.methods.wsdan import WSDANViews, WSDANViewsConfig
from magsd.models import ModelConfig, build_model
from magsd.training.step import BatchShard
from magsd_kernels import AttentionViews


@pytest.fixture(scope="module")
def images(small_pairs: list[str]):
    config = load_config(None, small_pairs)
    return open_images(config, config.data.source)


@pytest.mark.parametrize("ranks", [2, 3])
def test_parts_of_a_batch_are_the_batch(ranks: int, images, small_config) -> None:
    """Order, labels, and every augmented pixel."""
    classes, cache = images
    config = small_config("batch_size=8")
    whole = training_loader(config, cache, list(range(22)), classes)
    parts = [
        training_loader(config, cache, list(range(22)), classes, Team(rank, ranks))
        for rank in range(ranks)
    ]
    assert {len(part) for part in parts} == {len(whole)} == {3}
    for batch, *own in zip(whole.epoch(1), *(part.epoch(1) for part in parts), strict=True):
        assert [i for part in own for i in part.indices] == batch.indices
        assert all(len(part.indices) >= 2 for part in own)
        assert torch.equal(torch.cat([part.labels for part in own]), batch.labels)
        assert torch.equal(torch.cat([part.images for part in own]), batch.images)
        for part in own:
            assert part.positions == batch.positions
            first = part.part.first
            assert batch.indices[first : first + len(part.indices)] == part.indices


def test_a_last_batch_too_small_for_all_is_left_out(images, small_config) -> None:
    classes, cache = images
    config = small_config("batch_size=8")

    def steps(count: int, size: int) -> int:
        return len(training_loader(config, cache, list(range(count)), classes, Team(0, size)))

    assert [steps(count, 1) for count in (8, 9, 10)] == [1, 1, 2]
    assert [steps(count, 2) for count in (8, 11, 12)] == [1, 1, 2]
    with pytest.raises(DataError, match="5 training images for 3 processes: expected at least 6"):
        steps(5, 3)


def test_bounds_share_everything_once() -> None:
    for count in range(12):
        for ranks in (1, 2, 5):
            bounds = [shard_bounds(count, rank, ranks) for rank in range(ranks)]
            assert [i for ends in bounds for i in range(*ends)] == list(range(count))
            sizes = [last - first for first, last in bounds]
            assert max(sizes) - min(sizes) <= 1


def small_model(name: str, backbone: str = "test_resnet") -> nn.Module:
    config = ModelConfig(name=name, backbone=backbone, pretrained=False)
    return build_model(config, 4)


@pytest.mark.parametrize("name", ["magsd", "plain"])
def test_a_part_without_weight_takes_part_without_a_nan(name: str) -> None:
    """All its images are of a class of weight 0: 0 / 0 for it, nothing for the whole batch."""
    model = small_model(name)
    step = method(name).objective(Config.of(name), torch.tensor([0.0, 1, 1, 1]))
    labels = torch.zeros(2, dtype=torch.int64)
    share = BatchShard(Part(2, 6), 0.0, 2 / 3)
    images = torch.randn(2, 1, 48, 48)
    result = step(model, images, labels, torch.Generator().manual_seed(0), share)
    assert float(result.cross_entropy) == 0
    result.loss.backward()
    gradients = [p.grad for p in model.parameters()]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)


def test_views_of_given_uniforms() -> None:
    attention = torch.rand(5, 4, 6, 6)
    views = AttentionViews()
    drawn = views.draw(attention, torch.Generator().manual_seed(3))
    uniforms = torch.rand(5, 8, generator=torch.Generator().manual_seed(3))
    for one, other in zip(drawn, views.draw(attention, uniforms=uniforms), strict=True):
        assert torch.equal(one, other)
    some = views.draw(attention[2:4], uniforms=uniforms[2:4])
    assert all(torch.equal(a[2:4], b) for a, b in zip(drawn, some, strict=True))
    with pytest.raises(ValueError, match=r"AttentionViews: uniforms must have shape \(5, 8\)"):
        views.draw(attention, uniforms=uniforms[:4])


@pytest.mark.parametrize("views", [MAGSDViews(MAGSDViewsConfig()), WSDANViews(WSDANViewsConfig())])
def test_views_of_a_step_are_one_operator(views) -> None:
    """Drawing their maps is part of it: two launches on a GPU."""
    images, attention = torch.rand(5, 1, 24, 24), torch.rand(5, 4, 6, 6)
    called = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.append(func.name())
            return func(*args, **(kwargs or {}))

    with Recorder():
        made = views(images, attention, torch.rand(5, views.uniforms_per_image))
    assert made.shape[1:] == images.shape
    assert [name for name in called if name.startswith("magsd")][:1] == ["magsd::sampled_views"]
    assert sum(name.startswith("magsd::") for name in called) == 1


@pytest.mark.parametrize("backbone", ["test_resnet", "test_efficientnet"])
def test_synchronized_batch_norms_keep_activations_and_names(backbone: str) -> None:
    """timm's fused norms hold an activation that torch's own conversion drops."""
    model = small_model("magsd", backbone)
    names = list(model.state_dict())
    images = torch.randn(2, 1, 48, 48)
    before = model.eval()(images).logits
    synchronize_batchnorm(model)
    synchronize_batchnorm(model)  # as after a step that could not be recorded
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert norms
    assert all(isinstance(norm, nn.SyncBatchNorm) for norm in norms)
    assert list(model.state_dict()) == names
    torch.testing.assert_close(model(images).logits, before)


@pytest.fixture
def launch(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets what torchrun tells its processes."""

    def set_variables(name: str = "job", *, ranks: int = 1, restarts: int = 0) -> None:
        for key, value in {
            "TORCHELASTIC_RUN_ID": name,
            "TORCHELASTIC_RESTART_COUNT": restarts,
            "RANK": 0,
            "LOCAL_RANK": 0,
            "WORLD_SIZE": ranks,
        }.items():
            monkeypatch.setenv(key, str(value))

    return set_variables


@pytest.mark.parametrize("name", ["job", "none"])
def test_only_a_run_of_the_same_start_is_gone_on_with(name: str, tmp_path: Path, launch) -> None:
    alone = Team()
    launch(name)
    assert not restarted(alone, tmp_path)
    launch(name, restarts=1)
    assert not restarted(alone, tmp_path)
    note_launch(tmp_path)
    assert restarted(alone, tmp_path)
    launch(name)
    assert not restarted(alone, tmp_path)
    launch("another", restarts=1)
    assert not restarted(alone, tmp_path)


def test_nothing_is_noted_without_torchrun(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "8")  # of some other launcher: not ours
    note_launch(tmp_path)
    assert not list(tmp_path.iterdir())
    with team_of(load_config().train) as team:
        assert (team.rank, team.size, team.is_main) == (0, 1, True)


def test_settings_that_several_processes_cannot_train_with(
    small_config: Callable[..., Config], launch
) -> None:
    launch(ranks=3)
    for pair, message in (
        ("batch_size=5", r"batch_size=5 is shared by 3 processes; .*at least 6"),
        ("sync_batchnorm=true", r"sync_batchnorm=true needs GPUs"),
    ):
        with pytest.raises(ConfigError, match=message), team_of(small_config(pair).train):
            pytest.fail("joined")
    with pytest.raises(ConfigError, match="under torchrun the run's folder must be given: --out"):
        train(out=None, config=None, data=None, kernels=None, overrides=[])
