"""The training step: what it computes, and that it never waits for the device."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import magsd_kernels
from magsd.config import LossConfig, OptimConfig, ViewsConfig
from magsd.models import ModelConfig, build_model
from magsd.training.metrics_log import StepSums
from magsd.training.optim import build_optimizer
from magsd.training.step import attention_step, draw, guided_views, make_step, view_thetas

CLASSES = 4


def make_model(name: str = "magsd") -> nn.Module:
    config = ModelConfig(
        name=name,
        backbone="test_resnet",
        pretrained=False,
        attention_maps=4,
        backbone_args={"output_stride": 16},
    )
    return build_model(config, CLASSES)


def make_batch(size: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(size, 1, 48, 48, generator=generator)
    labels = torch.randint(0, CLASSES, (size,), generator=generator)
    return images, labels, draw(size, generator, torch.device("cpu"))


def run_attention_step(model: nn.Module, weights: Tensor | None = None):
    images, labels, draws = make_batch()
    return attention_step(
        model,
        images,
        labels,
        draws,
        views=ViewsConfig(),
        loss=LossConfig(),
        class_weights=weights,
    )


def test_step_equals_the_method_written_out() -> None:
    """Four passes in training mode, each view from its own map; soft distance by its definition."""
    torch.manual_seed(0)
    model, twin = make_model(), make_model()
    twin.load_state_dict(model.state_dict())
    images, labels, draws = make_batch()
    weights = torch.tensor([1.0, 2.0, 0.5, 1.5])
    result = run_attention_step(model, weights)

    raw = twin(images)
    maps = raw.attention.detach()
    chosen = magsd_kernels.sample_attention(maps, draws[:, :3])
    ranges = ((0.4, 0.6), (0.2, 0.5), (0.4, 0.6))
    theta = [low + (high - low) * draws[:, 3 + i] for i, (low, high) in enumerate(ranges)]
    views = [
        magsd_kernels.attention_mixup(images, maps, theta[0], index=chosen[:, 0]),
        magsd_kernels.attention_dim(images, maps, theta[1], index=chosen[:, 1]),
        magsd_kernels.attention_patch(images, maps, theta[2], draws[:, 6:], index=chosen[:, 2]),
    ]
    probabilities = raw.logits.detach().softmax(1)
    confidence, predicted = probabilities.max(1)
    hard = torch.full_like(probabilities, 0.01)
    hard[torch.arange(len(labels)), labels] = 1 - 0.01 * CLASSES
    spoilt = (predicted != labels) | (confidence < 0.7)
    target = torch.where(spoilt[:, None], hard, probabilities)
    distance = sum((target - twin(view).logits.softmax(1)).abs().mean() for view in views)
    entropy = nn.functional.cross_entropy(raw.logits, labels, weight=weights)

    torch.testing.assert_close(result.loss, entropy + distance)
    torch.testing.assert_close(result.cross_entropy, entropy.detach())
    torch.testing.assert_close(result.distance, distance.detach())
    assert int(result.correct) == int((predicted == labels).sum())

    result.loss.backward()
    (entropy + distance).backward()
    for (name, mine), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert mine.grad is not None, name
        torch.testing.assert_close(mine.grad, other.grad, msg=name)
    for mine, other in zip(model.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(mine, other)


def test_each_view_has_its_own_batch_statistics() -> None:
    model = make_model()
    run_attention_step(model)
    counts = {
        int(module.num_batches_tracked)
        for module in model.backbone.modules()
        if isinstance(module, nn.BatchNorm2d)
    }
    assert counts == {4}


def test_views_take_no_gradient_to_the_attention() -> None:
    images, _, draws = make_batch()
    attention = torch.rand(6, 4, 3, 3, requires_grad=True)
    assert not guided_views(images, attention, draws, ViewsConfig()).requires_grad


def test_thetas_fill_their_ranges() -> None:
    views = ViewsConfig(mixup_theta=(0.1, 0.2), dim_theta=(0.3, 0.5), patch_theta=(0.7, 0.7))
    thetas = view_thetas(torch.tensor([[0.0, 0.0, 0.0], [0.5, 0.5, 0.5]]), views)
    torch.testing.assert_close(thetas, torch.tensor([[0.1, 0.3, 0.7], [0.15, 0.4, 0.7]]))


def test_draws_repeat_with_the_generator() -> None:
    def drawn(seed: int) -> Tensor:
        return draw(3, torch.Generator().manual_seed(seed), torch.device("cpu"))

    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))
    assert drawn(1).shape == (3, 8)


def test_plain_step_is_cross_entropy_of_one_pass() -> None:
    model = make_model("plain")
    images, labels, draws = make_batch()
    step = make_step("plain", ViewsConfig(), LossConfig(), None)
    result = step(model, images, labels, draws)
    with torch.no_grad():
        expected = nn.functional.cross_entropy(model(images).logits, labels)
    torch.testing.assert_close(result.loss, expected)
    assert float(result.distance) == 0
    assert result.loss.requires_grad


@pytest.mark.parametrize("name", ["magsd", "plain"])
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
def test_whole_step_reads_nothing_back(name: str, autocast: bool) -> None:
    """Under FakeTensorMode there are no values: any read, sync or data-dependent shape raises."""
    with magsd_kernels.use_backend("reference"), FakeTensorMode():
        model = make_model(name)
        optimizer = build_optimizer(model, OptimConfig())
        images, labels = torch.randn(6, 1, 48, 48), torch.zeros(6, dtype=torch.int64)
        step = make_step(name, ViewsConfig(), LossConfig(), torch.ones(CLASSES))
        sums = StepSums(torch.device("cpu"))
        for number in range(2):
            draws = draw(6, None, torch.device("cpu"))
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                result = step(model, images, labels, draws)
            optimizer.zero_grad()
            result.loss.backward()
            optimizer.step()
            sums.add(result, 6, number)
        with pytest.raises(DataDependentOutputException):
            result.loss.item()


def test_sums_are_means_and_remember_the_first_bad_step() -> None:
    sums = StepSums(torch.device("cpu"))

    def result(loss: float, correct: int):
        from magsd.training.step import StepResult

        return StepResult(*(torch.tensor(v) for v in (loss, loss / 2, loss / 4, correct)))

    sums.add(result(1.0, 3), 4, 0)
    sums.add(result(4.0, 1), 2, 1)
    values = sums.read()
    assert values["train_loss"] == pytest.approx((1 * 4 + 4 * 2) / 6)
    assert values["train_cross_entropy"] == pytest.approx((1 * 4 + 4 * 2) / 12)
    assert values["train_accuracy"] == pytest.approx(4 / 6)
    assert values["first_bad"] == -1
    sums.add(result(float("inf"), 0), 4, 2)
    sums.add(result(float("nan"), 0), 4, 3)
    assert sums.read()["first_bad"] == 2
