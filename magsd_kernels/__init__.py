"""Fused operations for attention-guided networks (MAG-SD, WS-DAN) in PyTorch."""

from magsd_kernels._norms import norm_groups
from magsd_kernels.attention_augment import (
    attention_boxes,
    attention_crop,
    attention_dim,
    attention_drop,
    attention_mixup,
    attention_patch,
    attention_views,
)
from magsd_kernels.attention_sampling import sample_attention
from magsd_kernels.backends import BackendUnavailable, backends, use_backend
from magsd_kernels.batch_norm_act import BatchNormAct, batch_norm_act
from magsd_kernels.bilinear_pool import BilinearAttentionPool, bilinear_attention_pool
from magsd_kernels.guided_views import AttentionViews, ViewDraws
from magsd_kernels.multiscale_attention import (
    MultiscaleAttention,
    multiscale_attention,
    resample_attention,
)
from magsd_kernels.norm_fusion import fuse_batch_norms
from magsd_kernels.soft_distance import SoftDistance, SoftDistanceLoss, soft_distance_loss

__version__ = "0.1.0"

__all__ = [
    "AttentionViews",
    "BackendUnavailable",
    "BatchNormAct",
    "BilinearAttentionPool",
    "MultiscaleAttention",
    "SoftDistance",
    "SoftDistanceLoss",
    "ViewDraws",
    "attention_boxes",
    "attention_crop",
    "attention_dim",
    "attention_drop",
    "attention_mixup",
    "attention_patch",
    "attention_views",
    "backends",
    "batch_norm_act",
    "bilinear_attention_pool",
    "fuse_batch_norms",
    "multiscale_attention",
    "norm_groups",
    "resample_attention",
    "sample_attention",
    "soft_distance_loss",
    "use_backend",
]
