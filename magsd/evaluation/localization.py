"""How much of a model's attention lies inside a lesion or lung mask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class LocalizationScore:
    """Means over images.

    inside: share of the attention that lies inside the mask. uniform: the same for a uniform map,
    that is, the share of the image that the mask covers. images: how many entered the means.
    left_out: images with a mask whose map is zero everywhere or whose mask is empty.
    """

    images: int
    inside: float
    uniform: float
    left_out: int = 0

    @property
    def gain(self) -> float:
        """How many times more attention the mask draws than a uniform map would give it."""
        return self.inside / self.uniform if self.uniform > 0 else float("nan")


@dataclass(frozen=True)
class Localization:
    """Scores over all images with a mask, and by class for classes that have any."""

    overall: LocalizationScore
    per_class: dict[str, LocalizationScore]


def attention_inside(saliency: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Share of each map inside its mask, and share of the image that the mask covers.

    saliency: (B, 1, h, w), not negative. masks: (B, H, W), nonzero inside. The map is upsampled
    bilinearly (align_corners=False) to H x W. Returns two float32 (B,); the first is NaN where the
    map is zero everywhere.
    """
    if saliency.ndim != 4 or saliency.shape[1] != 1:
        raise ValueError(f"saliency: expected (B, 1, h, w), got {tuple(saliency.shape)}")
    if masks.ndim != 3 or len(masks) != len(saliency):
        raise ValueError(f"masks: expected ({len(saliency)}, H, W), got {tuple(masks.shape)}")
    maps = upsampled(saliency, masks.shape[1:])
    covered = (masks > 0).float()
    inside = (maps * covered).sum(dim=(1, 2)) / maps.sum(dim=(1, 2))
    return inside, covered.mean(dim=(1, 2))


def upsampled(saliency: Tensor, shape: Sequence[int]) -> Tensor:
    """Maps (B, 1, h, w) at H x W, (B, H, W) float32: bilinear, align_corners=False."""
    maps = F.interpolate(saliency.float(), tuple(shape), mode="bilinear", align_corners=False)
    return maps[:, 0]


def summarize(
    inside: NDArray[np.floating],
    uniform: NDArray[np.floating],
    targets: NDArray[np.integer],
    classes: Sequence[str],
) -> Localization:
    """Means of per-image shares (N,), overall and by class."""
    return Localization(
        overall=_score(inside, uniform),
        per_class={
            name: _score(inside[targets == k], uniform[targets == k])
            for k, name in enumerate(classes)
            if (targets == k).any()
        },
    )


def _score(inside: NDArray[np.floating], uniform: NDArray[np.floating]) -> LocalizationScore:
    usable = np.isfinite(inside) & (uniform > 0)
    count = int(usable.sum())
    return LocalizationScore(
        images=count,
        inside=float(inside[usable].mean()) if count else float("nan"),
        uniform=float(uniform[usable].mean()) if count else float("nan"),
        left_out=len(inside) - count,
    )
