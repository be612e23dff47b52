"""Variants of MAG-SD: shapes on the named backbones, and what each computes."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from magsd.config import load_config
from magsd.errors import ConfigError
from magsd.models import MAGSD, build_model
from magsd.models.fusion import FinestAttention, SelfAttention
from magsd.models.pooling import AttentionPool
from magsd_kernels import bilinear_attention_pool

# Side of the attention for an input of 224 pixels, by backbone: finest and coarsest.
SIDES = {"resnet50": (28, 7), "inception_v3": (25, 5)}
VARIANTS = {
    "magsd-1-scale": "coarse",
    "magsd": "coarse",
    "magsd-3-scales": "coarse",
    "magsd-up": "fine",
    "magsd-shuffle": "fine",
    "magsd-cascade": "coarse",
    "magsd-dropout": "coarse",
    "magsd-crop": "coarse",
    "magsd-max": "coarse",
}


def build(name: str, backbone: str, **values: object) -> MAGSD:
    pairs = [f"model={name}", f"backbone={backbone}", "pretrained=false"]
    config = load_config(None, pairs + [f"{key}={value}" for key, value in values.items()])
    model = build_model(config.model, 3)
    assert isinstance(model, MAGSD)
    return model


@pytest.mark.parametrize("backbone", SIDES)
@pytest.mark.parametrize("name", VARIANTS)
def test_shapes(name: str, backbone: str) -> None:
    model = build(name, backbone).eval()
    with torch.no_grad():
        output = model(torch.randn(1, 1, 224, 224))
    side = SIDES[backbone][0 if VARIANTS[name] == "fine" else 1]
    assert output.logits.shape == (1, 3)
    assert output.attention.shape == (1, 32, side, side)
    assert model.saliency(output).shape == (1, 1, side, side)


@pytest.mark.parametrize("name", VARIANTS)
def test_non_square_image_and_gradients(name: str) -> None:
    """Every parameter is trained, self-attention's too once its share has left 0."""
    model = build(name, "resnet18", attention_maps=5)
    if name == "magsd-cascade":
        torch.nn.init.ones_(model.attention.context.share)
    output = model(torch.randn(2, 1, 96, 128))
    assert output.attention.shape[2:] == ((12, 16) if VARIANTS[name] == "fine" else (3, 4))
    output.logits.square().sum().backward()
    assert [key for key, p in model.named_parameters() if p.grad is None] == []


def sqrt_of(pooled: Tensor) -> Tensor:
    return pooled.sign() * (pooled.abs() + 1e-12).sqrt()


def parts_of(layer: torch.nn.Module, maps: list[Tensor]) -> list[Tensor]:
    """Each scale's rectified, normalized projection."""
    return [
        norm(projection(m)).relu()
        for m, projection, norm in zip(maps, layer.projections, layer.norms, strict=True)
    ]


def settled(name: str, **values: object) -> tuple[MAGSD, Tensor]:
    """A model with running statistics off their start, in evaluation mode, and its images."""
    torch.manual_seed(0)
    model = build(name, "resnet18", attention_maps=4, **values)
    images = torch.randn(3, 1, 96, 96)
    model(images)
    return model.eval(), images


@pytest.mark.parametrize("pool", ["avg", "max"])
@torch.no_grad()
def test_up_is_pooling_of_upsampled_features(pool: str) -> None:
    model, images = settled("magsd-up", pool=pool)
    maps = model.backbone(images)
    scales = parts_of(model.attention, maps)
    attention = sum(
        F.interpolate(m, (12, 12), mode="bilinear", align_corners=False) for m in scales
    )
    features = F.interpolate(maps[-1], (12, 12), mode="bilinear", align_corners=False)
    products = attention[:, :, None] * features[:, None]
    pooled = products.mean((3, 4)) if pool == "avg" else products.amax((3, 4))
    pooled = F.normalize(sqrt_of(pooled.flatten(1)))
    output = model(images)
    torch.testing.assert_close(output.attention, attention, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        output.logits, 100 * pooled @ model.head.weight.T, rtol=1e-4, atol=1e-4
    )


def test_pooling_under_finer_attention_has_the_gradients_of_upsampled_features() -> None:
    torch.manual_seed(0)
    features = torch.randn(2, 6, 3, 5, requires_grad=True)
    attention = torch.rand(2, 4, 7, 10, requires_grad=True)
    up = F.interpolate(features, (7, 10), mode="bilinear", align_corners=False)
    expected = bilinear_attention_pool(up, attention, scale=10.0)
    weights = torch.randn_like(expected)
    wanted = torch.autograd.grad((expected * weights).sum(), (features, attention))
    result = AttentionPool(length=10.0)(features, attention)
    torch.testing.assert_close(result, expected)
    for mine, other in zip(
        torch.autograd.grad((result * weights).sum(), (features, attention)), wanted, strict=True
    ):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_shuffle_places_the_channels_of_a_coarse_pixel() -> None:
    """Each coarse pixel's channels become its block of fine pixels; a ratio that is not whole is
    resampled.
    """
    torch.manual_seed(0)
    layer = FinestAttention([4, 6, 8], 2, reductions=[8, 16, 32], shuffle=True).eval()
    maps = [torch.randn(1, c, s, s) for c, s in ((4, 25), (6, 12), (8, 5))]
    expected = torch.zeros(1, 2, 25, 25)
    for m, projection, norm in zip(maps, layer.projections, layer.norms, strict=True):
        convolution = projection if isinstance(projection, torch.nn.Conv2d) else projection[0]
        ratio = math.isqrt(convolution.out_channels // 2)
        flat = torch.einsum("bchw,oc->bohw", m, convolution.weight[:, :, 0, 0])
        side = m.shape[-1]
        blocks = flat.reshape(1, 2, ratio, ratio, side, side).permute(0, 1, 4, 2, 5, 3)
        fine = norm(blocks.reshape(1, 2, side * ratio, side * ratio)).relu()
        expected += F.interpolate(fine, (25, 25), mode="bilinear", align_corners=False)
    torch.testing.assert_close(layer(maps), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_cascade_pools_each_scale_under_the_one_before() -> None:
    model, images = settled("magsd-cascade")
    model.attention.context.share.fill_(0.7)
    maps = model.backbone(images)
    context = model.attention.context(maps[0])
    a1, a2, a3 = (
        parts_of(layer, [m])[0]
        for layer, m in zip(model.attention.scales, (context, maps[1], maps[2]), strict=True)
    )
    a1, a2 = F.adaptive_avg_pool2d(a1, 6), F.adaptive_avg_pool2d(a2, 3)
    pooled = []
    for features, attention in ((maps[1], a1), (maps[2], a2), (maps[2], a3)):
        h, w = features.shape[2:]
        matrix = torch.einsum("bmhw,bchw->bmc", attention, features) / (h * w)
        pooled.append(F.normalize(sqrt_of(matrix.flatten(1))))
    vector = 100 / math.sqrt(3) * torch.cat(pooled, 1)
    output = model(images)
    torch.testing.assert_close(
        output.attention, F.adaptive_avg_pool2d(a1, 3) + a2 + a3, rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(output.logits, vector @ model.head.weight.T, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_self_attention_mixes_pixels_by_their_likeness() -> None:
    torch.manual_seed(0)
    layer = SelfAttention(16)
    features = torch.randn(2, 16, 3, 4)
    assert torch.equal(layer(features), features)
    layer.share.fill_(0.5)
    pixels = features.flatten(2).transpose(1, 2)
    query, key, value = (
        pixels @ weight[:, :, 0, 0].T
        for weight in (layer.query.weight, layer.key.weight, layer.value.weight)
    )
    mixed = (query @ key.transpose(1, 2) / math.sqrt(2)).softmax(2) @ value
    expected = features + 0.5 * mixed.transpose(1, 2).reshape(features.shape)
    torch.testing.assert_close(layer(features), expected, rtol=1e-4, atol=1e-5)


def test_dropout_replaces_the_normalization() -> None:
    model, images = settled("magsd-dropout", dropout=0.25)
    with torch.no_grad():
        output = model(images)
        pooled = bilinear_attention_pool(output.features, output.attention, normalize=False)
        torch.testing.assert_close(output.logits, model.head(pooled))
    seen: list[Tensor] = []
    model.head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model.train()
    model(images)
    zeros = (seen[0] == 0).float().mean()
    assert 0.15 < float(zeros) < 0.6  # a quarter is dropped; some features are 0 by themselves


@torch.no_grad()
def test_crop_is_refined_by_the_crop_alone() -> None:
    images = torch.rand(1, 1, 32, 32)
    saliency = torch.zeros(1, 1, 8, 8)
    saliency[..., 2:4, 2:4] = 1
    view = build("magsd-crop", "resnet18").refined_view(images, saliency)
    mixed = build("magsd", "resnet18").refined_view(images, saliency)
    torch.testing.assert_close(mixed, 0.6 * images + 0.4 * view)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fusion": "sideways"}, "fusion 'sideways'; known: down, up"),
        ({"regularizer": "L2"}, "regularizer 'L2'; known: l2, dropout"),
        ({"fusion": "cascade", "scales": 2}, "cascade needs scales=3, got scales=2"),
    ],
)
def test_refusals(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MAGSD("resnet18", **arguments)
