"""How attention of several scales comes together, besides the published sum at the coarsest size.

"up" and "shuffle" sum at the finest size, for lesions too small for the coarsest map; the cascade
lets the attention of each scale pool features of the next.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from magsd.errors import ConfigError
from magsd_kernels import MultiscaleAttention


class FinestAttention(MultiscaleAttention):
    """`MultiscaleAttention` at the size of the finest map: (B, M, h_0, w_0).

    channels, reductions: of each feature map, fine to coarse; a reduction is the image's size over
    the map's. With `shuffle` each projection makes one channel for each place that a pixel of its
    map has in the finest one, and pixel shuffle puts them there; what is then missing to the
    finest size, where sizes are not whole multiples, is resampled bilinearly.
    """

    def __init__(
        self,
        channels: Sequence[int],
        num_maps: int,
        *,
        reductions: Sequence[int],
        shuffle: bool = False,
    ) -> None:
        super().__init__(channels, num_maps, mode="bilinear")
        if shuffle:
            finest = min(reductions)
            self.projections = nn.ModuleList(
                _shuffled_projection(c, num_maps, r // finest)
                for c, r in zip(channels, reductions, strict=True)
            )

    def forward(self, features: Sequence[Tensor], size: tuple[int, int] | None = None) -> Tensor:
        """Feature maps, fine to coarse -> attention of the finest size, or of `size`."""
        return super().forward(features, size or map_size(features[0]))


def map_size(features: Tensor) -> tuple[int, int]:
    """(H, W) of a feature map."""
    return int(features.shape[2]), int(features.shape[3])


def _shuffled_projection(channels: int, num_maps: int, ratio: int) -> nn.Module:
    projection = nn.Conv2d(channels, num_maps * ratio * ratio, 1, bias=False)
    return projection if ratio == 1 else nn.Sequential(projection, nn.PixelShuffle(ratio))


class CascadeAttention(nn.Module):
    """Attention of three scales, each at the size of the features that it pools.

    channels: of the feature maps F1, F2, F3. forward takes them and returns a1 (from F1 after
    self-attention, at the size of F2), a2 (from F2, at that of F3) and a3 (from F3, at its own).
    """

    def __init__(self, channels: Sequence[int], num_maps: int) -> None:
        super().__init__()
        if len(channels) != 3:
            raise ConfigError(f"fusion=cascade needs scales=3, got scales={len(channels)}")
        self.context = SelfAttention(channels[0])
        self.scales = nn.ModuleList(MultiscaleAttention([c], num_maps) for c in channels)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Maps a1, a2, a3, all (B, M, h, w)."""
        first, second, third = features
        sources = (self.context(first), second, third)
        targets = (second, third, third)
        return [
            scale([source], map_size(target))
            for scale, source, target in zip(self.scales, sources, targets, strict=True)
        ]


class SelfAttention(nn.Module):
    """Every pixel's features and a share of all others': (B, C, H, W) -> the same shape.

    The share starts at 0, so that a pretrained map enters as it is. Source: Zhang et al.,
    "Self-Attention Generative Adversarial Networks", ICML 2019, with the scaled dot product.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner = max(channels // 8, 1)
        self.query = nn.Conv2d(channels, inner, 1, bias=False)
        self.key = nn.Conv2d(channels, inner, 1, bias=False)
        self.value = nn.Conv2d(channels, channels, 1, bias=False)
        self.share = nn.Parameter(torch.zeros(1))

    def forward(self, features: Tensor) -> Tensor:
        """The features after exchange between their pixels."""
        query, key, value = (
            layer(features).flatten(2).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        # One head, which the fused kernels want as a dimension of its own.
        mixed = F.scaled_dot_product_attention(query[:, None], key[:, None], value[:, None])[:, 0]
        exchanged: Tensor = mixed.transpose(1, 2).unflatten(2, features.shape[2:])
        return features + self.share.to(features.dtype) * exchanged
