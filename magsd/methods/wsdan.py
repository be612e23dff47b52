"""WS-DAN: attention by one convolution, bilinear attention pooling, centers of the classes.

Source: Hu et al., "See Better Before Looking Closer: Weakly Supervised Data Augmentation Network
for Fine-Grained Visual Classification" (arXiv 1901.09891).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from magsd.config import Config, LossConfig, ViewsConfig
from magsd.methods import register_method
from magsd.models.attentive import POOLED_LENGTH, AttentiveClassifier
from magsd.models.backbone import Backbone
from magsd.models.classifier import ClassifierOutput
from magsd.models.config import ModelConfig, Preprocessing
from magsd.models.pooling import AttentionPool
from magsd.schema import INTERVAL, Check, at_least, between, setting
from magsd.training.step import (
    CountableSoftDistance,
    MeanCrossEntropy,
    StepFunction,
    attention_step,
)
from magsd_kernels import MultiscaleAttention, attention_crop
from magsd_kernels.guided_views import sampled_views, scaled


@dataclass
class WSDANConfig(ModelConfig):
    """The network.

    attention_maps: M, number of attention maps.
    level: which of the backbone's maps, counted from the end, is pooled.
    pool: "avg" or "max" over the pixels in bilinear attention pooling.
    """

    name: str = "wsdan"
    attention_maps: int = setting(32, at_least(1))
    level: int = setting(-1, Check(lambda v: v < 0, "-1 for the last map, or less"))
    pool: Literal["avg", "max"] = "avg"


@dataclass
class WSDANViewsConfig(ViewsConfig):
    """Ranges from which each image's thresholds are drawn; padding: of the crop's box."""

    crop_theta: tuple[float, float] = setting((0.4, 0.6), INTERVAL)
    drop_theta: tuple[float, float] = setting((0.2, 0.5), INTERVAL)
    padding: float = setting(0.1, at_least(0))


_SOFT = ("name", "soft_distance")


@dataclass
class WSDANLossConfig(LossConfig):
    """The loss, to which the center loss is added.

    name: "cross_entropy" (mean over the image and the views), as "published", or "soft_distance"
        (cross entropy of the image, and how far the views' predictions are from its own).
    confidence, smoothing: of the soft distance.
    center_weight, center_rate: of the center loss, and how far a center moves in a step.
    """

    name: Literal["published", "soft_distance", "cross_entropy"] = "published"
    confidence: float = setting(0.7, between(0, 1), when=_SOFT)
    smoothing: float = setting(0.01, between(0, 1), when=_SOFT)
    center_weight: float = setting(1.0, at_least(0))
    center_rate: float = setting(0.05, between(0, 1))


# One map, crop and drop views, centers of the classes.
VARIANTS = {"wsdan": {"model.pool": "avg", "loss.name": "published"}}


class WSDANViews(nn.Module):
    """Crop and drop, (2, B, C, H, W), each by its own map; every resize with align_corners=True."""

    uniforms_per_image = 4

    def __init__(self, config: WSDANViewsConfig) -> None:
        super().__init__()
        self.ranges = (config.crop_theta, config.drop_theta)
        self.padding = config.padding

    def forward(self, images: Tensor, attention: Tensor, uniforms: Tensor) -> Tensor:
        """See `GuidedViews`."""
        views, _ = sampled_views(
            images,
            attention,
            uniforms[:, :2],
            scaled(uniforms[:, 2:], self.ranges),
            padding=self.padding,
            weight=1.0,
            floor=0.0,
            align_corners=True,
        )
        return views


@dataclass(frozen=True)
class CenterLoss:
    """Distance to the centers of the model, which then move.

    weight: of the distance. rate: how far they move.
    """

    weight: float
    rate: float

    def __call__(
        self,
        model: nn.Module,
        output: ClassifierOutput,
        labels: Tensor,
        total: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """See `OutputLoss`."""
        assert isinstance(model.centers, Tensor)
        assert output.pooled is not None
        loss = self.weight * center_loss(output.pooled, labels, model.centers)
        move_centers(model.centers, output.pooled, labels, rate=self.rate, total=total)
        return loss


def objective(config: Config, class_weights: Tensor | None) -> StepFunction:
    """The step on the image and its two views."""
    views, loss = config.views, config.loss
    assert isinstance(views, WSDANViewsConfig)
    assert isinstance(loss, WSDANLossConfig)
    return partial(
        attention_step,
        views=WSDANViews(views),
        loss=CountableSoftDistance(
            confidence=loss.confidence, smoothing=loss.smoothing, class_weights=class_weights
        )
        if loss.name == "soft_distance"
        else MeanCrossEntropy(class_weights),
        added=CenterLoss(loss.center_weight, loss.center_rate),
        passes=config.train.views,
    )


@register_method(
    objective=objective,
    model=WSDANConfig,
    views=WSDANViewsConfig,
    loss=WSDANLossConfig,
    variants=VARIANTS,
)
class WSDAN(AttentiveClassifier):
    """The published network on any timm backbone.

    One map of the backbone, `level` from its end (-1 the last: inception_v3's mixed_7c; -2 its
    mixed_6e), gives the attention and is pooled. The other arguments and errors are those of
    MAGSD. `centers` (K, M*C) float32 runs after the mean pooled vector of each class in training.
    """

    name = "wsdan"

    def __init__(
        self,
        backbone: str = "inception_v3",
        num_classes: int = 4,
        in_channels: int = 3,
        attention_maps: int = 32,
        level: int = -1,
        pool: str = "avg",
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
                scales=1,
                level=level,
                pretrained=pretrained,
                backbone_args=backbone_args,
            ),
            num_classes,
            classes=classes,
            preprocessing=preprocessing,
        )
        entries = attention_maps * self.backbone.channels[-1]
        self.attention = MultiscaleAttention(self.backbone.channels, attention_maps)
        self.pool = AttentionPool(pool=pool)
        self.head = nn.Linear(entries, num_classes, bias=False)
        self.register_buffer("centers", torch.zeros(num_classes, entries))
        self.centers: Tensor

    def forward(self, images: Tensor) -> ClassifierOutput:
        """Classify images (B, in_channels, H, W)."""
        features = self.backbone(images)[-1]
        attention = self.attention([features])
        pooled = self.pool(features, attention)
        return ClassifierOutput(self.head(pooled * POOLED_LENGTH), attention, features, pooled)

    @torch.no_grad()
    def refined_view(self, images: Tensor, saliency: Tensor) -> Tensor:
        """The crop around all that draws a tenth of the strongest attention, as published."""
        theta = torch.full((len(images),), 0.1, device=images.device)
        return attention_crop(images, saliency, theta, padding=0.05, align_corners=True)


def center_loss(pooled: Tensor, labels: Tensor, centers: Tensor) -> Tensor:
    """Mean over the images of the squared distance to the center of their class.

    pooled (B, D), labels (B,) int64, centers (K, D) float32, brought to length 1. The centers get
    no gradient. Returns a scalar of the centers' dtype.
    """
    with torch.autocast(pooled.device.type, enabled=False):
        own = F.normalize(centers, dim=1).index_select(0, labels)
        return (pooled.to(centers.dtype) - own).square().sum(1).mean()


@torch.no_grad()
def move_centers(
    centers: Tensor,
    pooled: Tensor,
    labels: Tensor,
    *,
    rate: float = 0.05,
    total: Callable[[Tensor], Tensor] = lambda values: values,
) -> None:
    """Move each class's center by `rate` towards the mean of its pooled vectors, in place.

    The published code writes center += rate (P - center) for each image, where of several images
    of a class the last one wins; the mean does not depend on their order. A class without images
    stays. total: sums a tensor over the processes that share the batch.
    """
    with torch.autocast(pooled.device.type, enabled=False):
        # Not one_hot, which looks at its values on some devices.
        classes = torch.arange(len(centers), device=labels.device)
        member = (labels[:, None] == classes).to(centers.dtype)
        # A product with the memberships: unlike index_add_ it is deterministic on a GPU.
        sums = total(member.T @ pooled.to(centers.dtype))
        counts = total(member.sum(0))[:, None]
    towards = sums / counts.clamp_min(1)
    centers.add_((towards - centers) * (counts > 0), alpha=rate)
