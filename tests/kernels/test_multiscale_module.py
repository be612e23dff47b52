"""MultiscaleAttention, the layer."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import magsd_kernels as mk

from .support import (
    random,
)

in_both_modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


CHANNELS = (6, 4)


def features_of(batch: int = 2, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [
        random(batch, 6, 8, 8, seed=1, dtype=dtype),
        random(batch, 4, 4, 4, seed=2, dtype=dtype),
    ]


def norms_of(layer: nn.Module, kind: type[nn.Module] = nn.BatchNorm2d) -> list[Any]:
    return [m for m in layer.modules() if isinstance(m, kind)]


def convolutions_of(layer: nn.Module) -> list[nn.Conv2d]:
    return [m for m in layer.modules() if isinstance(m, nn.Conv2d)]


def composed(layer: nn.Module, features: Sequence[Tensor]) -> Tensor:
    """The published composition of torch's own layers."""
    size = features[-1].shape[-2:]
    return sum(
        F.interpolate(F.relu(norm(conv(x))), size, mode="area")
        for conv, norm, x in zip(convolutions_of(layer), norms_of(layer), features, strict=True)
    )


def new_layer(**options: Any) -> nn.Module:
    torch.manual_seed(3)
    layer = mk.MultiscaleAttention(CHANNELS, 5, **options)
    for norm in norms_of(layer):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias)
    return layer


def test_layer_has_published_parts():
    layer = mk.MultiscaleAttention(CHANNELS)
    shapes = [tuple(conv.weight.shape) for conv in convolutions_of(layer)]
    assert shapes == [(32, 6, 1, 1), (32, 4, 1, 1)]
    assert all(conv.bias is None for conv in convolutions_of(layer))
    assert [norm.num_features for norm in norms_of(layer)] == [32, 32]
    assert {(norm.eps, norm.momentum) for norm in norms_of(layer)} == {(1e-3, 0.1)}
    options = mk.MultiscaleAttention(CHANNELS, 5, eps=0.1, momentum=0.4)
    assert {(norm.eps, norm.momentum) for norm in norms_of(options)} == {(0.1, 0.4)}


@in_both_modes
def test_layer_is_the_composition_of_torch_layers(training):
    layer, twin = new_layer().train(training), new_layer().train(training)
    for _ in range(2):
        features = [x.requires_grad_() for x in features_of()]
        found, wanted = layer(features), composed(twin, features)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
        direction = random(*found.shape, dtype=torch.float32)
        found_gradients = torch.autograd.grad(found, [*layer.parameters(), *features], direction)
        gradients = torch.autograd.grad(wanted, [*twin.parameters(), *features], direction)
        for a, b in zip(found_gradients, gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    for (name, a), (other, b) in zip(
        layer.state_dict().items(), twin.state_dict().items(), strict=True
    ):
        assert name == other
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert [int(n.num_batches_tracked) for n in norms_of(layer)] == [2 * training] * 2


def test_layer_state_dict_round_trip():
    layer = new_layer()
    layer(features_of())
    twin = mk.MultiscaleAttention(CHANNELS, 5)
    twin.load_state_dict(layer.state_dict(), strict=True)
    assert torch.equal(layer.eval()(features_of()), twin.eval()(features_of()))
    keys = set(layer.state_dict())
    assert sum(key.endswith("running_mean") for key in keys) == 2
    assert sum(key.endswith("num_batches_tracked") for key in keys) == 2


def test_layer_weight_decay_filter_finds_the_norms():
    layer = new_layer()
    norms = {id(p) for norm in norms_of(layer) for p in norm.parameters()}
    assert len(norms) == 4
    assert {id(p) for p in layer.parameters() if p.dim() == 1} == norms


@in_both_modes
def test_layer_converted_to_sync_batch_norm(training):
    """Without a process group SyncBatchNorm computes ordinary batch statistics."""
    layer = new_layer().train(training)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(layer))
    assert len(norms_of(converted, nn.SyncBatchNorm)) == 2
    found, wanted = converted(features_of()), layer(features_of())
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    for name, value in layer.state_dict().items():
        torch.testing.assert_close(converted.state_dict()[name], value, rtol=1e-5, atol=1e-6)


def test_layer_runs_a_replaced_norm():
    """Any module put in a norm's place is the one that runs, as users expect of submodules."""
    layer = new_layer().eval()
    for name, module in list(layer.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            parent = layer.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], nn.Identity())
    features = features_of()
    wanted = sum(
        F.interpolate(F.relu(conv(x)), (4, 4), mode="area")
        for conv, x in zip(convolutions_of(layer), features, strict=True)
    )
    torch.testing.assert_close(layer(features), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("frozen", [(0,), (1,), (0, 1)], ids=str)
def test_layer_with_frozen_norms(frozen):
    """A norm in evaluation mode inside a training layer uses and keeps its running statistics."""
    layer, twin = new_layer().train(), new_layer().train()
    for module in (layer, twin):
        for i in frozen:
            norms_of(module)[i].eval()
            norms_of(module)[i].requires_grad_(False)
    torch.testing.assert_close(
        layer(features_of()), composed(twin, features_of()), rtol=1e-5, atol=1e-5
    )
    for name, value in twin.state_dict().items():
        torch.testing.assert_close(layer.state_dict()[name], value, rtol=1e-5, atol=1e-6)
    for i in frozen:
        assert int(norms_of(layer)[i].num_batches_tracked) == 0


@pytest.mark.parametrize("mode", ["area", "bilinear", "nearest"])
def test_layer_size_and_mode(mode):
    layer = new_layer(size=(6, 5), mode=mode).eval()
    features = features_of()
    wanted = sum(
        F.interpolate(F.relu(norm(conv(x))), (6, 5), mode=mode)
        for conv, norm, x in zip(convolutions_of(layer), norms_of(layer), features, strict=True)
    )
    torch.testing.assert_close(layer(features), wanted, rtol=1e-5, atol=1e-5)


def test_layer_under_autocast_gives_bfloat16():
    layer = new_layer().train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(features_of())
    assert out.dtype == torch.bfloat16
    reference = composed(new_layer().train(), features_of())
    assert (out.float() - reference).abs().max() < 0.05 * reference.abs().max()
    out.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layer.parameters())


def test_layer_wrong_number_of_features():
    with pytest.raises(ValueError, match="feature"):
        new_layer()(features_of()[:1])
