"""Random augmentation of a batch on its device, and the z-score."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_CROP_TRIES = 10  # as torchvision's RandomResizedCrop


class Part(NamedTuple):
    """Some images of a batch of `total`: those from `first` on.

    Random numbers are drawn for the whole batch and cut to the part, so that an image is treated
    alike however many processes share its batch.
    """

    first: int
    total: int

    def uniform(self, count: int, *shape: int, generator: torch.Generator) -> Tensor:
        """(count, *shape) uniforms in [0, 1) of `count` images, on the generator's device."""
        draws = torch.rand(self.total, *shape, generator=generator, device=generator.device)
        return draws[self.first : self.first + count]


@dataclass(frozen=True)
class AugmentConfig:
    """The published recipe; each of the five changes is drawn with `probability` per image.

    brightness, contrast: factor uniform in 1 -+ the value.
    rotation: degrees to either side; what comes from outside the image is 0.
    crop_scale, crop_ratio: share of the area and width over height of the random resized crop.
    """

    enabled: bool = True
    probability: float = 0.5
    brightness: float = 0.5
    contrast: float = 0.7
    rotation: float = 120.0
    crop_scale: tuple[float, float] = (0.6, 1.0)
    crop_ratio: tuple[float, float] = (0.75, 1.33)
    horizontal_flip: bool = True
    vertical_flip: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.probability <= 1:
            raise ValueError(f"probability must lie in 0..1, not {self.probability}")
        if min(self.brightness, self.contrast, self.rotation) < 0:
            raise ValueError("brightness, contrast and rotation must not be negative")
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise ValueError(f"crop_scale must rise within 0..1, not {self.crop_scale}")
        low, high = self.crop_ratio
        if not 0 < low <= high:
            raise ValueError(f"crop_ratio must rise above 0, not {self.crop_ratio}")


def augment_images(
    images: Tensor, config: AugmentConfig, generator: torch.Generator, part: Part | None = None
) -> Tensor:
    """Augment each image by its own draws.

    images: (B, C, S, S) float in 0..1, of a larger batch where `part` is given. generator: on the
    images' device. Returns the same shape. Jitter comes first, then rotation, crop and flips as
    one sampling grid, so that the image is interpolated once. Nothing is read back to the host.
    """
    if not config.enabled or images.shape[0] == 0:
        return images
    images = jitter(images, config, generator, part)
    matrix = draw_geometry(images.shape[0], config, generator, part)
    return warp(images, matrix)


def jitter(
    images: Tensor, config: AugmentConfig, generator: torch.Generator, part: Part | None = None
) -> Tensor:
    """Brightness and contrast factors per image, in random order, each clamped to 0..1.

    As torchvision's ColorJitter: contrast turns about the mean of the gray image.
    """
    draws = _uniform(images.shape[0], part, generator, 4)[:, :, None, None, None]
    chosen, order = draws[:, 0] < config.probability, draws[:, 1] < 0.5
    brightness = _factor(draws[:, 2], config.brightness)
    contrast = _factor(draws[:, 3], config.contrast)
    bright_first = adjust_contrast(adjust_brightness(images, brightness), contrast)
    contrast_first = adjust_brightness(adjust_contrast(images, contrast), brightness)
    changed = torch.where(order, bright_first, contrast_first)
    return torch.where(chosen, changed, images)


def adjust_brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Images times factor (B, 1, 1, 1), clamped to 0..1."""
    return (images * factor).clamp(0, 1)


def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Images moved from their gray mean by factor (B, 1, 1, 1), clamped to 0..1."""
    if images.shape[1] == 3:
        red, green, blue = images.unbind(1)
        gray = 0.2989 * red + 0.587 * green + 0.114 * blue
        mean = gray.mean((1, 2))[:, None, None, None]
    else:
        mean = images.mean((1, 2, 3), keepdim=True)
    return (mean + factor * (images - mean)).clamp(0, 1)


def draw_geometry(
    batch: int, config: AugmentConfig, generator: torch.Generator, part: Part | None = None
) -> Tensor:
    """(B, 2, 3) affine matrices from output to input coordinates, both in -1..1.

    The image passes rotation, then crop, then flips; a sampling grid runs the other way, so
    the matrix is rotation * crop * flip.
    """
    draws = _uniform(batch, part, generator, 5)
    angle = (2 * draws[:, 0] - 1) * math.radians(config.rotation)
    angle = torch.where(draws[:, 1] < config.probability, angle, 0.0)
    center, half = draw_crop(batch, config, generator, part)
    cropped = (draws[:, 2] < config.probability)[:, None]
    center, half = torch.where(cropped, center, 0.0), torch.where(cropped, half, 1.0)
    flip_x = (draws[:, 3] < config.probability) & config.horizontal_flip
    flip_y = (draws[:, 4] < config.probability) & config.vertical_flip
    scale_x = torch.where(flip_x, -half[:, 0], half[:, 0])
    scale_y = torch.where(flip_y, -half[:, 1], half[:, 1])
    return compose(angle, center, torch.stack([scale_x, scale_y], 1))


def compose(angle: Tensor, center: Tensor, scale: Tensor) -> Tensor:
    """(B, 2, 3) of rotation by angle (B,) radians after the crop x -> center + scale * x.

    center, scale: (B, 2), as (x, y) in -1..1. A positive angle turns the picture
    counter-clockwise, as torchvision's rotate.
    """
    cos, sin = torch.cos(angle), torch.sin(angle)
    # The image's y axis points down: turning the picture counter-clockwise by the angle samples
    # the input at the output point turned clockwise, which reads [cos, -sin; sin, cos] here.
    row_x = torch.stack(
        [cos * scale[:, 0], -sin * scale[:, 1], cos * center[:, 0] - sin * center[:, 1]], 1
    )
    row_y = torch.stack(
        [sin * scale[:, 0], cos * scale[:, 1], sin * center[:, 0] + cos * center[:, 1]], 1
    )
    return torch.stack([row_x, row_y], 1)


def draw_crop(
    batch: int, config: AugmentConfig, generator: torch.Generator, part: Part | None = None
) -> tuple[Tensor, Tensor]:
    """Center and half size (B, 2), as (x, y) in -1..1, of a random resized crop.

    As torchvision's: area uniform in crop_scale, log ratio uniform, ten tries, then the whole
    image; the tries are drawn at once and the first that fits is taken.
    """
    draws = _uniform(batch, part, generator, _CROP_TRIES, 4)
    low, high = config.crop_scale
    area = low + (high - low) * draws[..., 0]
    low, high = math.log(config.crop_ratio[0]), math.log(config.crop_ratio[1])
    ratio = torch.exp(low + (high - low) * draws[..., 1])
    size = torch.stack([torch.sqrt(area * ratio), torch.sqrt(area / ratio)], -1)
    fits = (size <= 1).all(-1)
    first = fits.to(torch.uint8).argmax(1)[:, None, None].expand(-1, 1, 2)
    size = size.gather(1, first)[:, 0]
    place = draws[..., 2:].gather(1, first)[:, 0]
    size = torch.where(fits.any(1)[:, None], size, 1.0)
    return (2 * place - 1) * (1 - size), size


def warp(images: Tensor, matrix: Tensor) -> Tensor:
    """Sample images (B, C, S, S) through matrix (B, 2, 3): bilinear, 0 outside."""
    grid = F.affine_grid(matrix.to(images.dtype), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, "bilinear", "zeros", align_corners=False)


def z_score(images: Tensor, epsilon: float = 1e-6) -> Tensor:
    """Each image less its mean, over its standard deviation, over all pixels and channels.

    images: (B, C, H, W) float. A constant image becomes 0.
    """
    dims = (1, 2, 3)
    centered = images - images.mean(dims, keepdim=True)
    deviation = centered.square().mean(dims, keepdim=True).sqrt()
    return torch.where(deviation > epsilon, centered / deviation.clamp_min(epsilon), 0.0)


def _uniform(batch: int, part: Part | None, generator: torch.Generator, *shape: int) -> Tensor:
    return (part or Part(0, batch)).uniform(batch, *shape, generator=generator)


def _factor(draw: Tensor, spread: float) -> Tensor:
    low, high = max(0.0, 1 - spread), 1 + spread
    return low + (high - low) * draw
