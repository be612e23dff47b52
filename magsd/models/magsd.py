"""MAG-SD: multiscale attention over a backbone's maps, bilinear attention pooling, a linear layer.

Source: Li et al., "Multiscale Attention Guided Network for COVID-19 Diagnosis Using Chest X-ray
Images", IEEE JBHI 2021 (arXiv 2012.02278), section on MA-Net; its variants are ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from magsd.errors import ConfigError
from magsd.models.attentive import POOLED_LENGTH, AttentiveClassifier
from magsd.models.backbone import Backbone
from magsd.models.classifier import ClassifierOutput
from magsd.models.config import Preprocessing
from magsd.models.fusion import CascadeAttention, FinestAttention
from magsd.models.pooling import AttentionPool
from magsd_kernels import MultiscaleAttention, resample_attention

FUSIONS = ("down", "up", "shuffle", "cascade")


class MAGSD(AttentiveClassifier):
    """The published network on any timm backbone, and its variants.

    The last `scales` maps of the backbone each give `attention_maps` attention maps.

    fusion: "down" sums them at the size of the coarsest and pools the last map, as published; "up"
    and "shuffle" sum at the size of the finest, brought there bilinearly or by pixel shuffle;
    "cascade", of three scales F1, F2, F3, pools F2 under the attention of F1, F3 under that of F2
    and F3 under its own, and classifies all three; its attention is the sum of the three.
    pool: "avg" or "max" over the pixels. regularizer: "l2" normalizes the pooled matrix, "dropout"
    drops its entries with probability `dropout` instead. refine_weight: share of the attended crop
    in the view that evaluation adds. pretrained: False, True (timm's weights), or the path of a
    safetensors file with timm's parameter names.

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
        fusion: str = "down",
        pool: str = "avg",
        regularizer: str = "l2",
        dropout: float = 0.5,
        refine_weight: float = 0.4,
        pretrained: bool | str = False,
        backbone_args: dict[str, Any] | None = None,
        classes: Sequence[str] | None = None,
        preprocessing: Preprocessing | dict[str, Any] | None = None,
    ) -> None:
        if attention_maps < 1:
            raise ValueError(f"attention_maps: expected at least 1, got {attention_maps}")
        if fusion not in FUSIONS:
            raise ConfigError(f"unknown fusion {fusion!r}; known: {', '.join(FUSIONS)}")
        if regularizer not in ("l2", "dropout"):
            raise ConfigError(f"unknown regularizer {regularizer!r}; known: l2, dropout")
        if fusion == "cascade" and scales != 3:
            raise ConfigError(f"fusion=cascade needs scales=3, got scales={scales}")
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
        channels, reductions = self.backbone.channels, self.backbone.reductions
        pooled = channels[1:] + channels[2:] if fusion == "cascade" else channels[-1:]
        self.refine_weight = refine_weight
        self.attention = _attention(fusion, channels, reductions, attention_maps)
        self.pool = AttentionPool(
            pool=pool,
            # Of the whole vector, also where it is put together of several matrices.
            length=POOLED_LENGTH / math.sqrt(len(pooled)),
            dropout=dropout if regularizer == "dropout" else None,
        )
        self.head = nn.Linear(attention_maps * sum(pooled), num_classes, bias=False)

    def forward(self, images: Tensor) -> ClassifierOutput:
        """Classify images (B, in_channels, H, W)."""
        maps = self.backbone(images)
        if isinstance(self.attention, CascadeAttention):
            steps = self.attention(maps)
            parts = zip((maps[1], maps[2], maps[2]), steps, strict=True)
            pooled = torch.cat([self.pool(features, step) for features, step in parts], 1)
            attention = resample_attention(steps)
        else:
            attention = self.attention(maps)
            pooled = self.pool(maps[-1], attention)
        return ClassifierOutput(self.head(pooled), attention, maps[-1])


def _attention(fusion: str, channels: list[int], reductions: list[int], num_maps: int) -> nn.Module:
    if fusion == "down":
        return MultiscaleAttention(channels, num_maps)
    if fusion == "cascade":
        return CascadeAttention(channels, num_maps)
    return FinestAttention(channels, num_maps, reductions=reductions, shuffle=fusion == "shuffle")
