"""Ranges in which the numbers of a configuration must lie: keys, check, and the range in words."""

from __future__ import annotations

from typing import Any


def _range_ok(pair: tuple[float, float]) -> bool:
    return 0 <= pair[0] <= pair[1] <= 1


RANGES: list[tuple[str, Any, str]] = [
    ("data.image_size", lambda v: 16 <= v <= 4096, "16 to 4096"),
    ("data.folds train.batch_size", lambda v: v >= 2, "at least 2"),
    (
        "train.epochs train.eval_batch_size train.log_interval data.clahe_tiles "
        "data.shuffle_buffer model.in_channels model.attention_maps model.scales",
        lambda v: v >= 1,
        "at least 1",
    ),
    (
        "data.fold train.checkpoint_interval train.overlays optim.warmup_epochs optim.final_lr "
        "optim.weight_decay views.padding loss.center_weight data.split_seed train.seed",
        lambda v: v >= 0,
        "at least 0",
    ),
    ("model.level", lambda v: v < 0, "-1 for the last map, or less"),
    ("optim.lr data.clahe_clip optim.clip_norm", lambda v: v > 0, "more than 0"),
    (
        "optim.momentum optim.gamma loss.confidence loss.smoothing loss.center_rate views.weight "
        "views.floor model.refine_weight",
        lambda v: 0 <= v <= 1,
        "0 to 1",
    ),
    (
        "views.mixup_theta views.dim_theta views.patch_theta views.crop_theta views.drop_theta",
        _range_ok,
        "0 <= low <= high <= 1",
    ),
    ("model.dropout", lambda v: 0 <= v < 1, "0 to below 1"),
    ("optim.betas", lambda v: all(0 <= b < 1 for b in v), "two numbers in [0, 1)"),
    (
        "loss.class_weights",
        lambda v: isinstance(v, str) or all(w >= 0 for w in v),
        "none, balanced, or numbers of at least 0",
    ),
]
