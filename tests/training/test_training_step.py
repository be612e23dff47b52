"""The training step: what it computes, and that it never waits for the device."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import magsd_kernels
from magsd.config import OptimConfig, load_config
from magsd.methods import method
from magsd.models import ModelConfig, build_model
from magsd.models.backbone import Backbone
from magsd.training.metrics_log import StepSums
from magsd.training.optim import build_optimizer
from magsd.training.step import StepFunction

CLASSES = 4


def make_model(name: str = "magsd") -> nn.Module:
    config = ModelConfig(
        name=name,
        backbone="test_resnet",
        pretrained=False,
        backbone_args={"output_stride": 16},
    )
    return build_model(config, CLASSES)


def make_step(name: str, weights: Tensor | None, *pairs: str) -> StepFunction:
    return method(name).objective(load_config(None, [f"model.name={name}", *pairs]), weights)


def make_batch(size: int = 6) -> tuple[Tensor, Tensor, torch.Generator]:
    """Images, labels, and the generator of the views."""
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(size, 1, 48, 48, generator=generator)
    labels = torch.randint(0, CLASSES, (size,), generator=generator)
    return images, labels, generator


def run_attention_step(model: nn.Module, weights: Tensor | None = None):
    return make_step("magsd", weights)(model, *make_batch())


def test_step_equals_the_method_written_out() -> None:
    """Four passes in training mode, each view from its own map; soft distance by its definition."""
    torch.manual_seed(0)
    model, twin = make_model(), make_model()
    twin.load_state_dict(model.state_dict())
    images, labels, generator = make_batch()
    weights = torch.tensor([1.0, 2.0, 0.5, 1.5])
    result = run_attention_step(model, weights)

    raw = twin(images)
    maps = raw.attention.detach()
    draws = magsd_kernels.AttentionViews().draw(maps, generator)
    index, theta = draws.index.unbind(1), draws.theta.unbind(1)
    views = [
        magsd_kernels.attention_mixup(images, maps, theta[0], index=index[0]),
        magsd_kernels.attention_dim(images, maps, theta[1], index=index[1]),
        magsd_kernels.attention_patch(images, maps, theta[2], draws.offsets, index=index[2]),
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


def test_configured_ranges_and_constants_reach_the_views(monkeypatch) -> None:
    seen = {}

    def record(images, attention, uniforms, theta, offsets, **constants):
        seen.update(constants, theta=theta)
        return images.expand(3, *images.shape), torch.zeros(len(images), 3, dtype=torch.int64)

    monkeypatch.setattr("magsd_kernels.guided_views.sampled_views", record)
    pairs = ["mixup_theta=0.1,0.2", "dim_theta=0.3,0.5", "patch_theta=0.7,0.7"]
    pairs += ["padding=0.2", "views.weight=0.3", "floor=0.01"]
    make_step("magsd", None, *pairs)(make_model(), *make_batch())
    assert (seen["padding"], seen["weight"], seen["floor"]) == (0.2, 0.3, 0.01)
    for theta, (low, high) in zip(
        seen["theta"].T, [(0.1, 0.2), (0.3, 0.5), (0.7, 0.7)], strict=True
    ):
        assert ((low - 1e-6 <= theta) & (theta <= high + 1e-6)).all()


def test_step_repeats_with_its_generator() -> None:
    def loss(seed: int) -> float:
        torch.manual_seed(0)
        images, labels, _ = make_batch()
        step = make_step("magsd", None)
        return float(
            step(make_model(), images, labels, torch.Generator().manual_seed(seed)).loss.detach()
        )

    assert loss(1) == loss(1)
    assert loss(1) != loss(2)


def test_plain_step_is_cross_entropy_of_one_pass() -> None:
    model = make_model("plain")
    images, labels, generator = make_batch()
    step = make_step("plain", None)
    result = step(model, images, labels, generator)
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
        step = make_step(name, torch.ones(CLASSES))
        sums = StepSums(torch.device("cpu"))
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                result = step(model, images, labels, None)
            optimizer.zero_grad()
            result.loss.backward()
            optimizer.step()
            sums.add(result, 6)
        with pytest.raises(DataDependentOutputException):
            result.loss.item()


def test_sums_are_means_and_remember_the_first_bad_step() -> None:
    sums = StepSums(torch.device("cpu"))

    def result(loss: float, correct: int):
        from magsd.training.step import StepResult

        return StepResult(*(torch.tensor(v) for v in (loss, loss / 2, loss / 4, correct)))

    sums.add(result(1.0, 3), 4)
    sums.add(result(4.0, 1), 2)
    values = sums.read()
    assert values["train_loss"] == pytest.approx((1 * 4 + 4 * 2) / 6)
    assert values["train_cross_entropy"] == pytest.approx((1 * 4 + 4 * 2) / 12)
    assert values["train_accuracy"] == pytest.approx(4 / 6)
    assert values["first_bad"] == -1
    sums.add(result(float("inf"), 0), 4)
    sums.add(result(float("nan"), 0), 4)
    assert sums.read()["first_bad"] == 2


def test_merged_views_are_one_batch_of_three_times_the_size() -> None:
    torch.manual_seed(0)
    model, twin = make_model(), make_model()
    twin.load_state_dict(model.state_dict())
    images, labels, generator = make_batch()
    seed = generator.initial_seed()
    step = make_step("magsd", None, "train.views=merged")
    result = step(model, images, labels, torch.Generator().manual_seed(seed))

    raw = twin(images)
    draws = torch.Generator().manual_seed(seed)
    views = magsd_kernels.AttentionViews()(images, raw.attention, generator=draws)
    logits = twin(torch.cat(list(views))).logits.chunk(3)
    expected = magsd_kernels.soft_distance_loss(raw.logits, logits, labels)
    torch.testing.assert_close(result.loss, expected.loss)
    counts = {int(m.num_batches_tracked) for m in model.modules() if isinstance(m, nn.BatchNorm2d)}
    assert counts == {2}


def test_recomputed_activations_change_nothing() -> None:
    """Loss, gradients and running statistics; every pass keeps less."""
    torch.manual_seed(0)
    model, twin = make_model(), make_model()
    twin.load_state_dict(model.state_dict())
    twin.backbone.recompute = True
    kept = []
    for network in (model, twin):
        held: dict[int, int] = {}

        def pack(x: Tensor, held: dict[int, int] = held) -> Tensor:
            held[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            result = run_attention_step(network)
        kept.append(sum(held.values()))
        result.loss.backward()
    assert kept[1] < kept[0] / 2
    for (name, mine), other in zip(
        model.state_dict().items(), twin.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(mine, other, msg=name)
    for (name, mine), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, msg=name)


def test_a_compiled_backbone_recomputes_its_activations() -> None:
    """Two passes before the backward, as a step has: the same gradients and statistics."""
    torch.manual_seed(0)
    backbone = Backbone("test_resnet", scales=1, backbone_args={"output_stride": 16})
    twin = deepcopy(backbone)
    twin.recompute = True
    twin.compile(backend="aot_eager")
    images = torch.randn(2, 1, 32, 32)
    for network in (backbone, twin):
        sum(network(x)[0].square().sum() for x in (images, 2 * images)).backward()
    for mine, other in zip(
        [*backbone.buffers(), *(p.grad for p in backbone.parameters())],
        [*twin.buffers(), *(p.grad for p in twin.parameters())],
        strict=True,
    ):
        torch.testing.assert_close(mine, other)


DRAWING = {
    "test_resnet": [{}, {"drop_path_rate": 0.5}, {"drop_block_rate": 0.3}],
    "densenet121": [{"proj_drop_rate": 0.5, "growth_rate": 4, "block_config": (2, 1, 1, 1)}],
    "test_convnext": [{"drop_path_rate": 0.5}],
    "test_vit": [{"drop_path_rate": 0.5}, {"proj_drop_rate": 0.5}, {"attn_drop_rate": 0.5}],
}


@pytest.mark.parametrize(
    ("name", "arguments"), [(name, each) for name, all_ in DRAWING.items() for each in all_]
)
def test_what_is_recomputed_draws_as_it_drew(name: str, arguments: dict[str, object]) -> None:
    """Dropout and stochastic depth of timm's models, wherever they keep their rates."""
    torch.manual_seed(0)
    size = {"img_size": 32} if name == "test_vit" else {}
    backbone = Backbone(name, scales=1, backbone_args=arguments | size)
    images = torch.randn(3, 1, 32, 32)
    before = torch.get_rng_state()
    gradients = []
    for recompute in (False, True):
        backbone.recompute = recompute
        backbone.zero_grad()
        torch.set_rng_state(before)
        backbone(images)[0].square().sum().backward()
        gradients.append([p.grad for p in backbone.parameters() if p.grad is not None])
    assert backbone.draws == (not torch.equal(before, torch.get_rng_state()))
    assert backbone.draws == bool(arguments)
    for kept, again in zip(*gradients, strict=True):
        torch.testing.assert_close(kept, again)


@pytest.mark.parametrize("name", ["magsd", "plain", "cross_entropy", "wsdan"])
def test_a_batch_of_no_weight_has_no_cross_entropy(name: str) -> None:
    """Where torch's mean is 0 / 0: what is left is what the views or the centers add."""
    pairs = {"cross_entropy": ["loss.name=cross_entropy"], "wsdan": ["center_weight=0"]}
    kind = "magsd" if name == "cross_entropy" else name
    images, labels, generator = make_batch()
    weights = torch.ones(CLASSES)
    weights[labels] = 0
    model = make_model(kind)
    result = make_step(kind, weights, *pairs.get(name, []))(model, images, labels, generator)
    assert float(result.cross_entropy) == 0
    assert torch.equal(result.loss, result.distance)
    result.loss.backward()
    for key, parameter in model.named_parameters():
        assert torch.isfinite(parameter.grad).all(), key
        assert name == "magsd" or not parameter.grad.any(), key
    assert (float(result.loss.detach()) > 0) == (name == "magsd")
