"""Augmentation against torchvision, and the z-score."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from magsd.data.augment import (
    AugmentConfig,
    adjust_brightness,
    adjust_contrast,
    augment_images,
    compose,
    draw_crop,
    draw_geometry,
    jitter,
    warp,
    z_score,
)

tvf = pytest.importorskip("torchvision.transforms.v2.functional")
NEVER = AugmentConfig(probability=0.0)
ALWAYS = AugmentConfig(probability=1.0)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def smooth_image(size: int = 64, channels: int = 1) -> Tensor:
    """An image without symmetry, smooth so that interpolation hardly matters."""
    ticks = torch.linspace(0, 1, size)
    y, x = torch.meshgrid(ticks, ticks, indexing="ij")
    planes = [0.2 + 0.5 * x * (1 - 0.5 * y) + 0.2 * torch.sin(3 * y + c) for c in range(channels)]
    return torch.stack(planes)[None].clamp(0, 1)


def geometry(
    angle: float = 0.0,
    center: tuple[float, float] = (0.0, 0.0),
    scale: tuple[float, float] = (1.0, 1.0),
) -> Tensor:
    return compose(
        torch.tensor([math.radians(angle)]), torch.tensor([center]), torch.tensor([scale])
    )


@pytest.mark.parametrize("factor", [0.5, 0.8, 1.0, 1.5])
@pytest.mark.parametrize("channels", [1, 3])
def test_jitter_ops_equal_torchvision(factor: float, channels: int) -> None:
    image = smooth_image(channels=channels)
    tensor = torch.full((1, 1, 1, 1), factor)
    expected = tvf.adjust_brightness(image, factor)
    torch.testing.assert_close(adjust_brightness(image, tensor), expected)
    expected = tvf.adjust_contrast(image, factor)
    torch.testing.assert_close(adjust_contrast(image, tensor), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("angle", [-120, -33, 0, 20, 90, 120])
def test_rotation_equals_torchvision(angle: float) -> None:
    image = smooth_image()
    # fill=None is zero padding too; a given fill would blend the border's pixels twice.
    expected = tvf.rotate(image, angle, interpolation=tvf.InterpolationMode.BILINEAR, fill=None)
    torch.testing.assert_close(warp(image, geometry(angle)), expected, atol=1e-4, rtol=0)


def test_crop_equals_torchvision() -> None:
    image = smooth_image(64)
    top, left, height, width = 10, 4, 40, 52
    expected = tvf.resized_crop(
        image, top, left, height, width, [64, 64],
        interpolation=tvf.InterpolationMode.BILINEAR, antialias=False,
    )  # fmt: skip
    center = ((left + width / 2) / 32 - 1, (top + height / 2) / 32 - 1)
    out = warp(image, geometry(center=center, scale=(width / 64, height / 64)))
    # At its border the resized crop repeats the edge pixel; the grid reads on beyond it.
    torch.testing.assert_close(out[..., 2:-2, 2:-2], expected[..., 2:-2, 2:-2], atol=1e-5, rtol=0)


def test_flips_equal_torchvision() -> None:
    image = smooth_image()
    out = warp(image, geometry(scale=(-1.0, 1.0)))
    torch.testing.assert_close(out, tvf.horizontal_flip(image), atol=1e-5, rtol=0)
    out = warp(image, geometry(scale=(1.0, -1.0)))
    torch.testing.assert_close(out, tvf.vertical_flip(image), atol=1e-5, rtol=0)


def test_composition_is_rotation_then_crop_then_flip() -> None:
    image = smooth_image(96)
    top, left, height, width = 20, 12, 60, 66
    steps = tvf.rotate(image, 25, interpolation=tvf.InterpolationMode.BILINEAR, fill=[0.0])
    steps = tvf.resized_crop(
        steps, top, left, height, width, [96, 96],
        interpolation=tvf.InterpolationMode.BILINEAR, antialias=False,
    )  # fmt: skip
    steps = tvf.horizontal_flip(steps)
    center = ((left + width / 2) / 48 - 1, (top + height / 2) / 48 - 1)
    out = warp(image, geometry(25, center, (-width / 96, height / 96)))
    assert (out - steps)[..., 24:-24, 24:-24].abs().max() < 2e-3


def test_probability_zero_changes_nothing() -> None:
    image = smooth_image().expand(5, -1, -1, -1)
    torch.testing.assert_close(augment_images(image, NEVER, generator()), image, atol=1e-6, rtol=0)


def test_disabled_and_empty_batches_pass() -> None:
    image = smooth_image()
    off = dataclasses.replace(ALWAYS, enabled=False)
    assert augment_images(image, off, generator()) is image
    assert augment_images(image[:0], ALWAYS, generator()).shape == (0, 1, 64, 64)


def test_draws_are_per_image_and_repeatable() -> None:
    image = smooth_image(32).expand(6, -1, -1, -1)
    first = augment_images(image, ALWAYS, generator(1))
    assert torch.equal(first, augment_images(image, ALWAYS, generator(1)))
    assert not torch.equal(first, augment_images(image, ALWAYS, generator(2)))
    assert all(not torch.equal(first[0], other) for other in first[1:])
    assert 0 <= float(first.min()) <= float(first.max()) <= 1 + 1e-5


def test_geometry_distribution() -> None:
    config = AugmentConfig(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0))
    matrix = draw_geometry(4000, config, generator())
    flipped = torch.linalg.det(matrix[:, :, :2]) < 0
    assert abs(float(flipped.float().mean()) - 0.5) < 0.03  # exactly one of the two flips
    config = dataclasses.replace(config, horizontal_flip=False, vertical_flip=False)
    matrix = draw_geometry(4000, config, generator())
    angle = torch.rad2deg(torch.atan2(matrix[:, 1, 0], matrix[:, 0, 0]))
    still = angle.abs() < 1e-6
    assert abs(float(still.float().mean()) - 0.5) < 0.03
    turned = angle[~still]
    assert 115 < float(turned.abs().max()) <= 120.001
    assert abs(float(turned.mean())) < 6
    assert abs(float(turned.std()) - 240 / math.sqrt(12)) < 3


def test_crop_distribution_equals_torchvision() -> None:
    from torchvision.transforms import RandomResizedCrop

    center, half = draw_crop(4000, ALWAYS, generator())
    assert float(half.max()) <= 1
    assert float((center.abs() + half).max()) <= 1 + 1e-6
    area, ratio = half.prod(1), half[:, 0] / half[:, 1]
    assert float(area.min()) >= 0.6 - 1e-5
    assert 0.75 - 1e-5 <= float(ratio.min()) < float(ratio.max()) <= 1.33 + 1e-5
    torch.manual_seed(0)
    image = torch.zeros(1, 1000, 1000)
    drawn = torch.tensor(
        [RandomResizedCrop.get_params(image, [0.6, 1.0], [0.75, 1.33]) for _ in range(2000)]
    ).double()
    theirs = drawn[:, 2] * drawn[:, 3] / 1e6
    for share in (0.1, 0.5, 0.9):
        assert abs(float(area.quantile(share)) - float(theirs.quantile(share))) < 0.02
    theirs = drawn[:, 3] / drawn[:, 2]
    for share in (0.1, 0.5, 0.9):
        assert abs(float(ratio.quantile(share)) - float(theirs.quantile(share))) < 0.03
    place = (center[:, 0] + 1 - half[:, 0]) / 2
    theirs = drawn[:, 1] / 1000
    assert abs(float(place.mean()) - float(theirs.mean())) < 0.01


def test_jitter_distribution() -> None:
    flat = torch.full((4000, 1, 2, 2), 0.4)
    value = jitter(flat, AugmentConfig(), generator())[:, 0, 0, 0] / 0.4  # contrast: no effect
    still = (value - 1).abs() < 1e-6
    assert abs(float(still.float().mean()) - 0.5) < 0.03
    assert 0.5 - 1e-5 <= float(value.min()) < 0.52
    assert 1.48 < float(value.max()) <= 1.5 + 1e-5
    halves = torch.tensor([0.45, 0.55]).expand(4000, 1, 1, 2)
    out = jitter(halves, AugmentConfig(probability=1.0, brightness=0.0), generator())
    spread = (out[:, 0, 0, 1] - out[:, 0, 0, 0]) / 0.1
    assert 0.3 - 1e-4 <= float(spread.min()) < 0.33
    assert 1.67 < float(spread.max()) <= 1.7 + 1e-4


@pytest.mark.parametrize(
    "values",
    [
        {"probability": 1.5},
        {"rotation": -1.0},
        {"crop_scale": (0.0, 1.0)},
        {"crop_scale": (0.9, 0.5)},
        {"crop_ratio": (0.0, 1.0)},
    ],
)
def test_config_refuses(values: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(values)) + "|not be negative"):
        AugmentConfig(**values)


@pytest.mark.parametrize("channels", [1, 3])
def test_z_score_is_per_image(channels: int) -> None:
    images = torch.rand(3, channels, 7, 9, generator=generator()) * torch.tensor(
        [1.0, 20.0, 0.01]
    ).reshape(3, 1, 1, 1)
    out = z_score(images)
    torch.testing.assert_close(out.mean((1, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(out.std((1, 2, 3), correction=0), torch.ones(3))
    assert (out[0].mean(1).abs() > 0.01).any()  # columns keep their differences


def test_z_score_of_a_constant_image_is_zero() -> None:
    assert torch.equal(z_score(torch.full((2, 1, 8, 8), 0.7)), torch.zeros(2, 1, 8, 8))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_no_host_synchronization() -> None:
    images = smooth_image().expand(4, -1, -1, -1).cuda()
    draws = torch.Generator("cuda").manual_seed(0)
    augment_images(images, ALWAYS, draws)
    torch.cuda.set_sync_debug_mode("error")
    try:
        z_score(augment_images(images, ALWAYS, draws))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_runs_without_values() -> None:
    """Fake tensors have no values, so anything that reads one back fails."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        images = torch.zeros(4, 3, 16, 16)
        assert z_score(augment_images(images, ALWAYS, generator())).shape == (4, 3, 16, 16)
