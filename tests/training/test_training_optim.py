"""Optimizers and schedules."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

from magsd.config import OptimConfig
from magsd.training.optim import (
    build_optimizer,
    learning_rate,
    load_optimizer,
    set_learning_rate,
)


def net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))


def test_published_sgd() -> None:
    optimizer = build_optimizer(net(), OptimConfig())
    assert type(optimizer) is torch.optim.SGD
    (group,) = optimizer.param_groups
    assert (group["lr"], group["momentum"], group["nesterov"]) == (1e-3, 0.9, True)
    assert group["weight_decay"] == 5e-4
    assert len(group["params"]) == 4


def test_adamw_spares_vectors_when_asked() -> None:
    config = OptimConfig(name="adamw", weight_decay=0.1, decay_norms=False)
    optimizer = build_optimizer(net(), config)
    assert type(optimizer) is torch.optim.AdamW
    decayed, spared = optimizer.param_groups
    assert [p.ndim for p in decayed["params"]] == [4]
    assert decayed["weight_decay"] == 0.1
    assert [p.ndim for p in spared["params"]] == [1, 1, 1]
    assert spared["weight_decay"] == 0


def test_frozen_parameters_are_left_out() -> None:
    model = net()
    model[0].requires_grad_(False)
    optimizer = build_optimizer(model, OptimConfig())
    assert len(optimizer.param_groups[0]["params"]) == 2


def test_sgd_without_momentum_has_no_nesterov() -> None:
    optimizer = build_optimizer(net(), OptimConfig(momentum=0.0))
    assert optimizer.param_groups[0]["nesterov"] is False


@pytest.mark.parametrize(
    ("epoch", "expected"),
    [(0, 1e-3), (74, 1e-3), (75, 1e-4), (124, 1e-4), (125, 1e-5), (149, 1e-5)],
)
def test_published_steps(epoch: int, expected: float) -> None:
    for step in (epoch * 10, epoch * 10 + 9):
        assert learning_rate(OptimConfig(), step, 10, 150) == pytest.approx(expected)


def test_cosine_with_warmup() -> None:
    config = OptimConfig(schedule="cosine", lr=1.0, final_lr=0.1, warmup_epochs=0.5)
    rates = [learning_rate(config, step, 10, 3) for step in range(31)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[5] == pytest.approx(1.0)
    assert all(a >= b for a, b in pairwise(rates[5:]))
    assert learning_rate(config, 17, 10, 3) > 0.55 > learning_rate(config, 18, 10, 3)
    assert rates[30] == pytest.approx(0.1)
    assert learning_rate(config, 99, 10, 3) == pytest.approx(0.1)


def test_constant() -> None:
    config = OptimConfig(schedule="constant", lr=0.3)
    assert {learning_rate(config, step, 4, 5) for step in range(20)} == {0.3}


def test_every_group_gets_the_rate() -> None:
    optimizer = build_optimizer(net(), OptimConfig(name="adamw", decay_norms=False))
    set_learning_rate(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]


def test_a_learning_rate_on_the_device_survives_a_resume() -> None:
    """What a stored state says of rates as numbers, fused or not, does not undo the capture."""
    plain = build_optimizer(net(), OptimConfig(lr=0.5))
    plain.param_groups[0]["fused"] = None  # as on a device without
    captured = build_optimizer(net(), OptimConfig(lr=0.1), capturable=True)
    load_optimizer(captured, plain.state_dict())
    (group,) = captured.param_groups
    assert isinstance(group["lr"], torch.Tensor)
    assert float(group["lr"]) == 0.5
    assert group["fused"]
    set_learning_rate(captured, 0.25)
    assert float(group["lr"]) == 0.25
    load_optimizer(plain, captured.state_dict())
    assert plain.param_groups[0]["lr"] == 0.25
    assert not plain.param_groups[0]["fused"]
