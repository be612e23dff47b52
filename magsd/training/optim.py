"""Optimizers, and the learning rate as a function of the step alone: nothing to resume."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from magsd.config import OptimConfig


def build_optimizer(
    model: nn.Module, config: OptimConfig, *, capturable: bool = False
) -> torch.optim.Optimizer:
    """SGD as published, or AdamW, over every parameter that takes a gradient.

    With `decay_norms=False` vectors (biases, batch norms) are spared weight decay. On CPUs and
    NVIDIA's and AMD's GPUs a step is one pass over all parameters: for ResNet-50 a quarter of the
    time on two cores. With `capturable` a CUDA graph can hold it, since its state and learning rate
    are read from the device.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    spared = [] if config.decay_norms else [p for p in parameters if p.ndim <= 1]
    chosen = {id(p) for p in spared}
    groups: list[dict[str, object]] = [
        {
            "params": [p for p in parameters if id(p) not in chosen],
            "weight_decay": config.weight_decay,
        }
    ]
    if spared:
        groups.append({"params": spared, "weight_decay": 0.0})
    fused = all(p.device.type in ("cpu", "cuda") for p in parameters) or None
    optimizer: torch.optim.Optimizer
    if config.name == "adamw":
        optimizer = torch.optim.AdamW(
            groups, lr=config.lr, betas=config.betas, fused=fused, capturable=capturable
        )
    else:
        optimizer = torch.optim.SGD(
            groups,
            lr=config.lr,
            momentum=config.momentum,
            nesterov=config.nesterov and config.momentum > 0,
            fused=fused,
        )
    if capturable:
        place_learning_rate(optimizer)
    return optimizer


def place_learning_rate(optimizer: torch.optim.Optimizer) -> None:
    """Let every group's rate be a tensor beside its parameters."""
    for group in optimizer.param_groups:
        device = group["params"][0].device
        group["lr"] = torch.tensor(float(group["lr"]), dtype=torch.float32, device=device)


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Take over a stored state; how a step runs (fused, captured) stays as it was built."""
    kept: list[dict[str, Any]] = [
        {key: group[key] for key in ("fused", "capturable", "foreach") if key in group}
        for group in optimizer.param_groups
    ]
    placed = [isinstance(group["lr"], torch.Tensor) for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, settings in zip(optimizer.param_groups, kept, strict=True):
        group.update(settings)
        group["lr"] = float(group["lr"])
    if all(placed):
        place_learning_rate(optimizer)


def learning_rate(config: OptimConfig, step: int, steps_per_epoch: int, epochs: int) -> float:
    """Learning rate at global `step` (from 0).

    "step" multiplies by gamma when an epoch in `milestones` begins; "cosine" falls to `final_lr`
    over the steps after the linear warm-up.
    """
    warmup = round(config.warmup_epochs * steps_per_epoch)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.schedule == "step":
        passed = sum(step // steps_per_epoch >= epoch for epoch in config.milestones)
        return config.lr * config.gamma**passed
    if config.schedule == "cosine":
        total = max(epochs * steps_per_epoch - warmup, 1)
        progress = min((step - warmup) / total, 1.0)
        return config.final_lr + (config.lr - config.final_lr) * 0.5 * (
            1 + math.cos(math.pi * progress)
        )
    return config.lr


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Give every group the same rate."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(value)
        else:
            group["lr"] = value
