"""The baseline: a backbone, global average pooling and a linear layer, on the same path."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from magsd.config import Config
from magsd.methods import register_method
from magsd.models.backbone import Backbone
from magsd.models.classifier import Classifier, ClassifierOutput
from magsd.models.config import ModelConfig, Preprocessing
from magsd.training.step import StepFunction, plain_step

_BACKBONES = ("resnet18", "resnet50", "vgg16", "inception_v3", "densenet121")
# The configured backbone, and baselines on backbones of their own.
VARIANTS: dict[str, dict[str, Any]] = {"plain": {}} | {
    name: {"model.backbone": name, "model.backbone_args": {}} for name in _BACKBONES
}


@dataclass
class PlainConfig(ModelConfig):
    """The network: a backbone and a linear layer."""

    name: str = "plain"


def objective(config: Config, class_weights: Tensor | None) -> StepFunction:
    """Cross entropy of the image."""
    return partial(plain_step, class_weights=class_weights)


@register_method(objective=objective, model=PlainConfig, variants=VARIANTS)
class PlainClassifier(Classifier):
    """Backbone with a linear head, without attention; arguments and errors as for MAGSD."""

    name = "plain"

    def __init__(
        self,
        backbone: str = "resnet50",
        num_classes: int = 4,
        in_channels: int = 1,
        pretrained: bool | str = False,
        backbone_args: dict[str, Any] | None = None,
        classes: Sequence[str] | None = None,
        preprocessing: Preprocessing | dict[str, Any] | None = None,
    ) -> None:
        super().__init__(
            Backbone(
                backbone,
                in_channels=in_channels,
                scales=1,
                pretrained=pretrained,
                backbone_args=backbone_args,
            ),
            num_classes,
            classes=classes,
            preprocessing=preprocessing,
        )
        self.head = nn.Linear(self.backbone.channels[-1], num_classes)

    def forward(self, images: Tensor) -> ClassifierOutput:
        """Classify images (B, in_channels, H, W)."""
        features = self.backbone(images)[-1]
        return ClassifierOutput(self.head(features.mean(dim=(2, 3))), None, features)

    @torch.no_grad()
    def saliency(self, output: ClassifierOutput) -> Tensor:
        """Class activation map of the predicted class, its positive part, (B, 1, h, w) float32.

        Source: Zhou et al., "Learning Deep Features for Discriminative Localization", CVPR 2016.
        """
        weights = self.head.weight.float()[output.logits.argmax(dim=1)]
        # float32 also where the caller runs under autocast: the map is read, not trained on.
        with torch.autocast(output.features.device.type, enabled=False):
            activation = torch.einsum("bchw,bc->bhw", output.features.float(), weights)
        return activation.relu().unsqueeze(1)
