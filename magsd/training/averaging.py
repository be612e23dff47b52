"""The exponential moving average of a model's weights while it trains."""

from __future__ import annotations

from timm.utils.model_ema import ModelEmaV3
from torch import nn


def weight_average(model: nn.Module, decay: float) -> ModelEmaV3 | None:
    """The average of a model's parameters and buffers, on its device; None for a decay of 0.

    `update(model, step)` after the step of that number, from 1 on, moves it by 1 - d towards the
    model's. Before it has seen many steps d is less than the decay: 0 in the first step, whose
    weights it copies, then min(decay, (1 + n) / (10 + n)) with n = step - 2. Batch norms' running
    statistics are averaged like weights; counters of steps are copied.

    timm's class knows d on the host and waits for nothing. torch.optim.swa_utils.AveragedModel
    reads a counter at every update, which waits for a GPU, and has no lower decay at the start.
    """
    if not decay:
        return None
    # 1 - (1 + m / 9) ** -1 = m / (9 + m), where timm's m is step - 1.
    return ModelEmaV3(model, decay, use_warmup=True, warmup_gamma=9.0, warmup_power=1.0)
