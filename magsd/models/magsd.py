"""MAG-SD: multiscale attention over a backbone's maps, bilinear attention pooling, a linear layer.

Source: Li et al., "Multiscale Attention Guided Network for COVID-19 Diagnosis Using Chest X-ray
Images", IEEE JBHI 2021 (arXiv 2012.02278), section on MA-Net.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from magsd.models.backbone import Backbone
from magsd.models.classifier import Classifier, ClassifierOutput
from magsd.models.config import Preprocessing
from magsd_kernels import MultiscaleAttention, bilinear_attention_pool

# The pooled vector has unit length; the published classifier sees it 100 times as long.
POOLED_LENGTH = 100.0


class MAGSD(Classifier):
    """The published network on any timm backbone.

    The last `scales` maps of the backbone each give `attention_maps` attention maps; their sum,
    at the size of the coarsest, pools the last map. `pretrained`: False, True (timm's weights), or
    the path of a safetensors file with timm's parameter names.

    Raises ConfigError for a backbone that timm does not have or that has fewer maps, and
    MagsdError where weights cannot be had.
    """

    name = "magsd"

    def __init__(
        self,
        backbone: str = "resnet50",
        num_classes: int = 4,
        in_channels: int = 1,
        attention_maps: int = 32,
        scales: int = 2,
        pretrained: bool | str = False,
        backbone_args: dict[str, Any] | None = None,
        classes: Sequence[str] | None = None,
        preprocessing: Preprocessing | dict[str, Any] | None = None,
    ) -> None:
        if attention_maps < 1:
            raise ValueError(f"attention_maps: expected at least 1, got {attention_maps}")
        super().__init__(
            Backbone(
                backbone,
                in_channels=in_channels,
                scales=scales,
                pretrained=pretrained,
                backbone_args=backbone_args,
            ),
            num_classes,
            classes=classes,
            preprocessing=preprocessing,
        )
        self.attention = MultiscaleAttention(self.backbone.channels, attention_maps)
        self.head = nn.Linear(attention_maps * self.backbone.channels[-1], num_classes, bias=False)

    def forward(self, images: Tensor) -> ClassifierOutput:
        """Classify images (B, in_channels, H, W)."""
        maps = self.backbone(images)
        attention = self.attention(maps)
        pooled = bilinear_attention_pool(maps[-1], attention, scale=POOLED_LENGTH)
        return ClassifierOutput(self.head(pooled), attention, maps[-1])

    @torch.no_grad()
    def saliency(self, output: ClassifierOutput) -> Tensor:
        """Mean of the attention maps, (B, 1, h, w) float32."""
        if output.attention is None:
            raise ValueError("saliency: expected this model's output, got one without attention")
        return output.attention.float().mean(dim=1, keepdim=True)
