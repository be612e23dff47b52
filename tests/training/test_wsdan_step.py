"""WS-DAN's training step: what it computes, and its shares in several processes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import magsd_kernels
from magsd.config import load_config
from magsd.data import Part
from magsd.methods import method
from magsd.methods.wsdan import WSDANConfig, center_loss
from magsd.models import ModelConfig, build_model
from magsd.training.step import BatchShard, StepFunction

CLASSES = 4


def make_step(name: str, weights: Tensor | None, *pairs: str) -> StepFunction:
    return method(name).objective(load_config(None, [f"model.name={name}", *pairs]), weights)


def make_model() -> nn.Module:
    torch.manual_seed(0)
    config = WSDANConfig(
        backbone="test_resnet",
        pretrained=False,
        attention_maps=4,
        backbone_args={"output_stride": 16},
    )
    model = build_model(config, CLASSES)
    nn.init.uniform_(model.centers, -0.1, 0.1)
    return model


def make_batch(size: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(size, 1, 48, 48, generator=generator)
    return images, torch.randint(0, CLASSES, (size,), generator=generator)


def test_step_equals_the_method_written_out() -> None:
    model, twin = make_model(), make_model()
    images, labels = make_batch()
    weights = torch.tensor([1.0, 2.0, 0.5, 1.5])
    step = make_step("wsdan", weights, "center_weight=0.7", "center_rate=0.2")
    result = step(model, images, labels, torch.Generator().manual_seed(3))

    uniforms = torch.rand(6, 4, generator=torch.Generator().manual_seed(3))
    raw = twin(images)
    maps = raw.attention.detach()
    index = magsd_kernels.sample_attention(maps, uniforms[:, :2])
    crop = magsd_kernels.attention_crop(
        images, maps, 0.4 + 0.2 * uniforms[:, 2], padding=0.1, index=index[:, 0], align_corners=True
    )
    drop = magsd_kernels.attention_drop(
        images, maps, 0.2 + 0.3 * uniforms[:, 3], index=index[:, 1], align_corners=True
    )
    logits = [raw.logits, twin(crop).logits, twin(drop).logits]
    entropy = sum(nn.functional.cross_entropy(x, labels, weight=weights) for x in logits) / 3
    center = 0.7 * center_loss(raw.pooled, labels, twin.centers)
    torch.testing.assert_close(result.loss, entropy + center)
    torch.testing.assert_close(result.cross_entropy, entropy.detach())
    torch.testing.assert_close(result.distance, center.detach())
    assert int(result.correct) == int((raw.logits.argmax(1) == labels).sum())

    result.loss.backward()
    (entropy + center).backward()
    for (name, mine), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, msg=name)
    for label in range(CLASSES):
        own = raw.pooled.detach()[labels == label]
        moved = twin.centers[label].lerp(own.mean(0), 0.2) if len(own) else twin.centers[label]
        torch.testing.assert_close(model.centers[label], moved)


def test_shares_of_two_processes_make_the_whole_batch() -> None:
    """Without batch statistics, which are each process's own: losses, gradients and centers."""
    images, labels = make_batch()
    step = make_step("wsdan", None)
    whole = make_model().eval()
    result = step(whole, images, labels, torch.Generator().manual_seed(1))
    result.loss.backward()

    member = nn.functional.one_hot(labels, CLASSES).float()
    totals = [member.T @ whole(images).pooled.detach(), member.sum(0)]
    parts = [make_model().eval() for _ in range(2)]
    losses = []
    for model, (first, count) in zip(parts, ((0, 4), (4, 2)), strict=True):
        answers = iter(totals)
        shard = BatchShard(
            Part(first, 6), 2 * count / 6, 2 * count / 6, lambda _, answers=answers: next(answers)
        )
        own = slice(first, first + count)
        mine = step(model, images[own], labels[own], torch.Generator().manual_seed(1), shard)
        mine.loss.backward()
        losses.append(mine.loss.detach())
        torch.testing.assert_close(model.centers, whole.centers, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(sum(losses) / 2, result.loss.detach())
    for (name, p), *others in zip(
        whole.named_parameters(), *(model.parameters() for model in parts), strict=True
    ):
        mean = sum(other.grad for other in others) / 2
        torch.testing.assert_close(mean, p.grad, rtol=1e-3, atol=1e-4, msg=name)


def test_reads_nothing_back() -> None:
    """Under FakeTensorMode there are no values: any read, sync or data-dependent shape raises."""
    with magsd_kernels.use_backend("reference"), FakeTensorMode():
        model = make_model()
        labels = torch.zeros(6, dtype=torch.int64)
        step = make_step("wsdan", torch.ones(CLASSES), "train.views=merged")
        step(model, torch.randn(6, 1, 48, 48), labels, None).loss.backward()


@pytest.mark.parametrize("name", ["magsd", "wsdan"])
def test_either_loss_with_either_model(name: str) -> None:
    """`loss.name` replaces the published loss; the mean cross entropy is that of all passes."""
    config = ModelConfig(name=name, backbone="test_resnet", pretrained=False)
    images, labels = make_batch()
    losses = {}
    for loss in ("published", "soft_distance", "cross_entropy"):
        torch.manual_seed(0)
        step = make_step(name, None, f"loss.name={loss}")
        result = step(
            build_model(config, CLASSES), images, labels, torch.Generator().manual_seed(1)
        )
        losses[loss] = float(result.loss.detach())
    published = "soft_distance" if name == "magsd" else "cross_entropy"
    assert losses["published"] == losses[published]
    assert losses["soft_distance"] != losses["cross_entropy"]
