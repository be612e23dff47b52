"""Keys of a configuration that the chosen model, loss, optimizer or schedule never reads."""

from __future__ import annotations

from typing import TYPE_CHECKING

from magsd.models.config import MODEL_KEYS

if TYPE_CHECKING:
    from magsd.config import Config, LossConfig

# A choice, the values of it that read certain keys, and these keys.
_READERS: list[tuple[str, tuple[str, ...], str]] = [
    *(
        ("model.name", tuple(m for m, own in MODEL_KEYS.items() if key in own), f"model.{key}")
        for key in sorted({key for own in MODEL_KEYS.values() for key in own})
    ),
    ("model.name", ("magsd", "wsdan"), "views.padding loss.name train.views"),
    (
        "model.name",
        ("magsd",),
        "views.mixup_theta views.dim_theta views.patch_theta views.weight views.floor",
    ),
    (
        "model.name",
        ("wsdan",),
        "views.crop_theta views.drop_theta loss.center_weight loss.center_rate",
    ),
    ("the loss", ("soft_distance",), "loss.confidence loss.smoothing"),
    ("model.regularizer", ("dropout",), "model.dropout"),
    ("optim.name", ("sgd",), "optim.momentum optim.nesterov"),
    ("optim.name", ("adamw",), "optim.betas"),
    ("optim.schedule", ("step",), "optim.milestones optim.gamma"),
    ("optim.schedule", ("cosine",), "optim.final_lr"),
]


def loss_of(model: str, loss: LossConfig) -> str:
    """What a model is trained by: "soft_distance" or "cross_entropy"."""
    if model == "plain":
        return "cross_entropy"
    if loss.name == "published":
        return "soft_distance" if model == "magsd" else "cross_entropy"
    return loss.name


def unread_keys(config: Config) -> dict[str, str]:
    """Dotted key that nothing reads under `config` -> why, in words."""
    choices = {
        "model.name": config.model.name,
        "model.regularizer": config.model.regularizer,
        "the loss": loss_of(config.model.name, config.loss),
        "optim.name": config.optim.name,
        "optim.schedule": config.optim.schedule,
    }
    unread: dict[str, str] = {}
    for choice, readers, keys in _READERS:
        if choices[choice] not in readers:
            only = f"{' and '.join(readers)} read{'s' if len(readers) == 1 else ''} it"
            why = f"{choice} is {choices[choice]}, and only {only}"
            unread = dict.fromkeys(keys.split(), why) | unread
    return unread
