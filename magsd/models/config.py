"""What a model is built from, as plain data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from magsd.schema import at_least, setting


@dataclass
class ModelConfig:
    """What every network is built from; the number of classes comes from the data.

    Methods add what their network takes besides. `build_model` leaves that at the network's own
    defaults where it is given this section alone.

    name: of the method (docs/models.md). backbone: any timm model that supports `features_only`.
    in_channels: 1 for gray images, 3 for color.
    pretrained: True for timm's weights, False for a random start, or the path of a safetensors
        file with timm's parameter names.
    backbone_args: further keyword arguments of `timm.create_model`.
    """

    name: str = "magsd"
    backbone: str = "resnet50"
    in_channels: int = setting(1, at_least(1))
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
