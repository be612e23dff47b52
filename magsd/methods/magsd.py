"""MAG-SD: multiscale attention over a backbone's maps, bilinear attention pooling, soft distance.

Source: Li et al., "Multiscale Attention Guided Network for COVID-19 Diagnosis Using Chest X-ray
Images", IEEE JBHI 2021 (arXiv 2012.02278); its variants are ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from magsd.config import Config, LossConfig, ViewsConfig
from magsd.errors import ConfigError
from magsd.methods import register_method
from magsd.models.attentive import POOLED_LENGTH, AttentiveClassifier
from magsd.models.backbone import Backbone
from magsd.models.classifier import ClassifierOutput
from magsd.models.config import ModelConfig, Preprocessing
from magsd.models.fusion import CascadeAttention, FinestAttention
from magsd.models.pooling import AttentionPool
from magsd.schema import INTERVAL, Check, at_least, between, setting
from magsd.training.step import (
    CountableSoftDistance,
    MeanCrossEntropy,
    StepFunction,
    attention_step,
)
from magsd_kernels import AttentionViews, MultiscaleAttention, resample_attention

Fusion = Literal["down", "up", "shuffle", "cascade"]
FUSIONS: tuple[str, ...] = get_args(Fusion)


@dataclass
class MAGSDConfig(ModelConfig):
    """The network.

    attention_maps: M, number of attention maps.
    scales: how many of the backbone's last maps attend.
    fusion: how the maps of several scales come together: "down" averages all to the coarsest size,
        as published; "up" brings all to the finest, bilinearly, and "shuffle" by pixel shuffle;
        "cascade" pools each scale's own features.
    pool: "avg" or "max" over the pixels in bilinear attention pooling.
    regularizer: of the pooled matrix: "l2" normalizes it, "dropout" drops entries instead.
    dropout: probability with which an entry is dropped.
    refine_weight: share of the attended crop in the view that evaluation adds.
    """

    name: str = "magsd"
    attention_maps: int = setting(32, at_least(1))
    scales: int = setting(2, at_least(1))
    fusion: Fusion = "down"
    pool: Literal["avg", "max"] = "avg"
    regularizer: Literal["l2", "dropout"] = "l2"
    dropout: float = setting(
        0.5, Check(lambda v: 0 <= v < 1, "0 to below 1"), when=("regularizer", "dropout")
    )
    refine_weight: float = setting(0.4, between(0, 1))


@dataclass
class MAGSDViewsConfig(ViewsConfig):
    """Ranges from which each image's thresholds are drawn, and the constants of the views.

    weight: share of the crop in mix-up, at 1 the crop itself.
    """

    mixup_theta: tuple[float, float] = setting((0.4, 0.6), INTERVAL)
    dim_theta: tuple[float, float] = setting((0.2, 0.5), INTERVAL)
    patch_theta: tuple[float, float] = setting((0.4, 0.6), INTERVAL)
    padding: float = setting(0.1, at_least(0))
    weight: float = setting(0.4, between(0, 1))
    floor: float = setting(0.001, between(0, 1))


_SOFT = ("name", "published", "soft_distance")


@dataclass
class MAGSDLossConfig(LossConfig):
    """The loss.

    name: "soft_distance" (cross entropy of the image, and how far the views' predictions are from
        its own), as "published", or "cross_entropy": mean over the image and the views.
    confidence, smoothing: of the soft distance.
    """

    name: Literal["published", "soft_distance", "cross_entropy"] = "published"
    confidence: float = setting(0.7, between(0, 1), when=_SOFT)
    smoothing: float = setting(0.01, between(0, 1), when=_SOFT)


PUBLISHED = {
    "model.scales": 2,
    "model.fusion": "down",
    "model.pool": "avg",
    "model.regularizer": "l2",
    "model.refine_weight": 0.4,
    "views.weight": 0.4,
    "loss.name": "published",
}
_THREE = PUBLISHED | {"model.scales": 3}
VARIANTS = {
    # MAG-SD as published: two scales, summed at the size of the coarsest.
    "magsd": PUBLISHED,
    # Attention from the last map alone.
    "magsd-1-scale": PUBLISHED | {"model.scales": 1},
    # Three scales, as the paper describes it.
    "magsd-3-scales": _THREE,
    # Three scales, brought bilinearly to the size of the finest and summed there.
    "magsd-up": _THREE | {"model.fusion": "up"},
    # The same, the coarser scales brought to the finest size by pixel shuffle.
    "magsd-shuffle": _THREE | {"model.fusion": "shuffle"},
    # The attention of each scale pools features of the next; self-attention on the finest map.
    "magsd-cascade": _THREE | {"model.fusion": "cascade"},
    # The pooled matrix is not normalized; its entries are dropped in training instead.
    "magsd-dropout": PUBLISHED | {"model.regularizer": "dropout", "model.dropout": 0.5},
    # The first view is the crop itself instead of its mix with the image.
    "magsd-crop": PUBLISHED | {"model.refine_weight": 1.0, "views.weight": 1.0},
    # Maximum over the pixels in bilinear attention pooling (GMP).
    "magsd-max": PUBLISHED | {"model.pool": "max"},
    # Without the soft distance: mean cross entropy of the image and its three views.
    "magsd-cross-entropy": PUBLISHED | {"loss.name": "cross_entropy"},
}


class MAGSDViews(nn.Module):
    """Mix-up, dim and patch, (3, B, C, H, W) in one tensor."""

    uniforms_per_image = 8

    def __init__(self, config: MAGSDViewsConfig) -> None:
        super().__init__()
        self.views = AttentionViews(
            mixup_theta=config.mixup_theta,
            dim_theta=config.dim_theta,
            patch_theta=config.patch_theta,
            padding=config.padding,
            weight=config.weight,
            floor=config.floor,
        )

    def forward(self, images: Tensor, attention: Tensor, uniforms: Tensor) -> Tensor:
        """See `GuidedViews`."""
        views: Tensor = self.views(images, attention, uniforms=uniforms)
        return views


def objective(config: Config, class_weights: Tensor | None) -> StepFunction:
    """The step on the image and its three views."""
    views, loss = config.views, config.loss
    assert isinstance(views, MAGSDViewsConfig)
    assert isinstance(loss, MAGSDLossConfig)
    return partial(
        attention_step,
        views=MAGSDViews(views),
        loss=MeanCrossEntropy(class_weights)
        if loss.name == "cross_entropy"
        else CountableSoftDistance(
            confidence=loss.confidence, smoothing=loss.smoothing, class_weights=class_weights
        ),
        passes=config.train.views,
    )


@register_method(
    objective=objective,
    model=MAGSDConfig,
    views=MAGSDViewsConfig,
    loss=MAGSDLossConfig,
    variants=VARIANTS,
)
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
