"""What every classifier here returns, and how it is saved and loaded."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from huggingface_hub import PyTorchModelHubMixin
from huggingface_hub.constants import SAFETENSORS_SINGLE_FILE
from safetensors.torch import save_file
from torch import Tensor, nn

from magsd.models.backbone import Backbone
from magsd.models.config import Preprocessing
from magsd_kernels import attention_mixup

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


class ClassifierOutput(NamedTuple):
    """Result of a forward pass over B images.

    logits: (B, K). attention: (B, M, h, w), or None for a model without attention.
    features: (B, C, H, W), the backbone's last map. pooled: (B, M*C), where training wants it.
    """

    logits: Tensor
    attention: Tensor | None
    features: Tensor
    pooled: Tensor | None = None


class Classifier(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="magsd",
    license="apache-2.0",
    pipeline_tag="image-classification",
    tags=["chest-x-ray", "visual-attention"],
):
    """Base of the classifiers: a timm backbone, class names and preprocessing.

    `save_pretrained(folder)` writes model.safetensors and config.json with everything that
    prediction needs; `from_pretrained(folder or hub id)` reads them. `classes` and
    `preprocessing` may be set after construction.
    """

    name: str
    #: Share of the crop in the refined view; the published weight of mix-up.
    refine_weight: float = 0.4
    #: Whether several batches may pass as one within `magsd_kernels.norm_groups`; TrainStep looks.
    takes_groups: bool = False

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        *,
        classes: Sequence[str] | None = None,
        preprocessing: Preprocessing | dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"num_classes: expected at least 2, got {num_classes}")
        if classes is not None and len(classes) != num_classes:
            raise ValueError(f"classes: expected {num_classes} names, got {list(classes)}")
        self.backbone = backbone
        self.num_classes = num_classes
        self.classes = None if classes is None else tuple(classes)
        if isinstance(preprocessing, dict):
            preprocessing = Preprocessing.from_dict(preprocessing)
        self.preprocessing = preprocessing

    @property
    def in_channels(self) -> int:
        """Channels of the images this model takes."""
        return self.backbone.in_channels

    def forward(self, images: Tensor) -> ClassifierOutput:
        """Classify images (B, in_channels, H, W)."""
        raise NotImplementedError

    def saliency(self, output: ClassifierOutput) -> Tensor:
        """Where the model looked: (B, 1, h, w) float32, not negative, without gradient."""
        raise NotImplementedError

    @torch.no_grad()
    def refined_view(self, images: Tensor, saliency: Tensor) -> Tensor:
        """What evaluation looks at besides the images: (B, C, H, W), each image blended with the
        crop around the pixels at or above half of its saliency map's maximum.
        """
        theta = torch.full((len(images),), 0.5, device=images.device)
        return attention_mixup(images, saliency, theta, padding=0.1, weight=self.refine_weight)

    def hub_config(self) -> dict[str, Any]:
        """Name of this model, and the arguments that rebuild it from a random start."""
        arguments = self._hub_mixin_config or {}
        # The mixin holds a dataclass only for a class that takes one as its `config`.
        assert isinstance(arguments, dict)
        return arguments | {
            "name": self.name,
            "pretrained": False,
            "classes": None if self.classes is None else list(self.classes),
            "preprocessing": None if self.preprocessing is None else asdict(self.preprocessing),
        }

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        config: dict[str, Any] | DataclassInstance | None = None,
        **kwargs: Any,
    ) -> str | None:
        """Write weights (safetensors), config.json and a model card into a folder."""
        return super().save_pretrained(
            save_directory, config=self.hub_config() if config is None else config, **kwargs
        )

    def _save_pretrained(self, save_directory: Path) -> None:
        # safetensors refuses channels_last weights, so each tensor is written contiguous.
        state = {key: value.contiguous() for key, value in self.state_dict().items()}
        save_file(state, save_directory / SAFETENSORS_SINGLE_FILE, metadata={"format": "pt"})

    @classmethod
    def _from_pretrained(cls, *, strict: bool = True, **kwargs: Any) -> Classifier:
        # The mixin's own default accepts a file in which weights are missing, and it prints on
        # standard output, where a program's result may be.
        with contextlib.redirect_stdout(io.StringIO()):
            model: Classifier = super()._from_pretrained(strict=strict, **kwargs)
        return model
