"""What a model is built from, as plain data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class ModelConfig:
    """Choice of network; the number of classes comes from the data.

    name: "magsd" or "plain" (the same backbone, global average pooling and a linear layer).
    backbone: any timm model that supports `features_only`.
    in_channels: 1 for grey images, 3 for colour.
    attention_maps: M, number of attention maps (magsd).
    scales: how many of the backbone's last maps attend (magsd).
    pretrained: True for timm's weights, False for a random start, or the path of a safetensors
        file with timm's parameter names.
    backbone_args: further keyword arguments of `timm.create_model`.
    """

    name: str = "magsd"
    backbone: str = "resnet50"
    in_channels: int = 1
    attention_maps: int = 32
    scales: int = 2
    pretrained: bool | str = True
    backbone_args: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Preprocessing:
    """What happens to a decoded image before the z-score; stored with a model that is saved.

    image_size: side of the square input, in pixels.
    clahe: (clip limit, tiles per side) of the contrast equalisation, or None.
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
