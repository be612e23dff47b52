"""What a model is built from, as plain data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

# What each model takes of the configuration besides what all take.
MODEL_KEYS: dict[str, tuple[str, ...]] = {
    "magsd": (
        "attention_maps",
        "scales",
        "fusion",
        "pool",
        "regularizer",
        "dropout",
        "refine_weight",
    ),
    "wsdan": ("attention_maps", "level", "pool"),
    "plain": (),
}


@dataclass
class ModelConfig:
    """Choice of network; the number of classes comes from the data.

    name: "magsd", "wsdan", or "plain" (the same backbone, global average pooling and a linear
        layer).
    backbone: any timm model that supports `features_only`.
    in_channels: 1 for gray images, 3 for color.
    attention_maps: M, number of attention maps (magsd, wsdan).
    scales: how many of the backbone's last maps attend (magsd).
    fusion: how the maps of several scales come together (magsd): "down" averages all to the
        coarsest size, as published; "up" brings all to the finest, bilinearly, and "shuffle" by
        pixel shuffle; "cascade" pools each scale's own features.
    level: which of the backbone's maps, counted from the end, is pooled (wsdan).
    pool: "avg" or "max" over the pixels in bilinear attention pooling (magsd, wsdan).
    regularizer: of the pooled matrix (magsd): "l2" normalizes it, "dropout" drops entries instead.
    dropout: probability with which an entry is dropped.
    refine_weight: share of the attended crop in the view that evaluation adds (magsd).
    pretrained: True for timm's weights, False for a random start, or the path of a safetensors
        file with timm's parameter names.
    backbone_args: further keyword arguments of `timm.create_model`.
    """

    name: Literal["magsd", "wsdan", "plain"] = "magsd"
    backbone: str = "resnet50"
    in_channels: int = 1
    attention_maps: int = 32
    scales: int = 2
    fusion: Literal["down", "up", "shuffle", "cascade"] = "down"
    level: int = -1
    pool: Literal["avg", "max"] = "avg"
    regularizer: Literal["l2", "dropout"] = "l2"
    dropout: float = 0.5
    refine_weight: float = 0.4
    pretrained: bool | str = True
    backbone_args: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Preprocessing:
    """What happens to a decoded image before the z-score; stored with a model that is saved.

    image_size: side of the square input, in pixels.
    clahe: (clip limit, tiles per side) of the contrast equalization, or None.
    """

    image_size: int = 224
    clahe: tuple[float, int] | None = (4.0, 4)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Preprocessing:
        """Inverse of `dataclasses.asdict`, also after a round through JSON."""
        clahe = values.get("clahe")
        return cls(
            image_size=int(values["image_size"]),
            clahe=None if clahe is None else (float(clahe[0]), int(clahe[1])),
        )
