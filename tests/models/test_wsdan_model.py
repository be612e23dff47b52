"""WS-DAN: shapes on the published backbones, what it computes, its centers."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F

from magsd.errors import ConfigError
from magsd.methods.wsdan import center_loss, move_centers
from magsd.models import WSDAN
from magsd_kernels import attention_crop

# Backbone, level, channels and side of the pooled map for an input of 224 pixels.
BACKBONES = [
    ("inception_v3", -2, 768, 12),  # mixed_6e
    ("inception_v3", -1, 2048, 5),  # mixed_7c
    ("vgg19", -1, 512, 7),
    ("vgg19_bn", -1, 512, 7),
    ("resnet34", -1, 512, 7),
    ("resnet50", -1, 2048, 7),
    ("resnet101", -1, 2048, 7),
    ("resnet152", -1, 2048, 7),
]


@pytest.mark.parametrize(("backbone", "level", "channels", "side"), BACKBONES)
def test_shapes_on_each_backbone(backbone: str, level: int, channels: int, side: int) -> None:
    model = WSDAN(backbone, 5, attention_maps=8, level=level).eval()
    with torch.no_grad():
        output = model(torch.randn(1, 3, 224, 224))
    assert output.logits.shape == (1, 5)
    assert output.attention.shape == (1, 8, side, side)
    assert output.features.shape == (1, channels, side, side)
    assert output.pooled.shape == (1, 8 * channels)
    assert model.centers.shape == (5, 8 * channels)


@pytest.mark.parametrize("name", ["test_efficientnet", "mobilenetv3_small_050"])
def test_no_layer_runs_after_the_map_that_is_taken(name: str) -> None:
    """A parameter without a gradient is an error where several processes train together."""
    model = WSDAN(name, 3, attention_maps=2, level=-2)
    images = torch.randn(2, 3, 64, 64)
    model(images).logits.sum().backward()
    assert not [key for key, value in model.named_parameters() if value.grad is None]
    whole = timm.create_model(name, features_only=True, pretrained=False).eval()
    loaded = whole.load_state_dict(model.backbone.net.state_dict(), strict=False)
    assert loaded.missing_keys
    assert not loaded.unexpected_keys
    torch.testing.assert_close(model.eval().backbone(images)[-1], whole(images)[-2])


@torch.no_grad()
def test_forward_is_the_published_network() -> None:
    torch.manual_seed(0)
    model = WSDAN("resnet18", 3, attention_maps=4)
    images = torch.randn(2, 3, 64, 96)
    model(images)  # moves the running statistics off their start
    output = model.eval()(images)
    features = model.backbone(images)[0]
    norm = model.attention.norms[0]
    attention = norm(model.attention.projections[0](features)).relu()
    matrix = torch.einsum("bmhw,bchw->bmc", attention, features) / 6
    pooled = F.normalize((matrix.sign() * (matrix.abs() + 1e-12).sqrt()).flatten(1))
    assert norm.eps == 1e-3
    torch.testing.assert_close(output.attention, attention, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output.pooled, pooled, rtol=1e-4, atol=1e-5)
    logits = (100 * pooled) @ model.head.weight.T
    torch.testing.assert_close(output.logits, logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_refined_view_is_the_published_crop() -> None:
    images, saliency = torch.rand(2, 3, 32, 32), torch.rand(2, 1, 4, 4).square()
    expected = attention_crop(
        images, saliency, torch.full((2,), 0.1), padding=0.05, align_corners=True
    )
    torch.testing.assert_close(WSDAN("resnet18", 2).refined_view(images, saliency), expected)


def test_center_loss_by_hand() -> None:
    pooled = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], requires_grad=True)
    centers = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    loss = center_loss(pooled, torch.tensor([0, 1, 0]), centers)
    # To (0.6, 0.8): 0.16 + 0.64; to (0, 0): 1; to (0.6, 0.8): 0.16 + 0.04.
    assert loss.item() == pytest.approx((0.8 + 1.0 + 0.2) / 3)
    loss.backward()
    torch.testing.assert_close(pooled.grad[0], torch.tensor([0.4, -0.8]) * 2 / 3)


def test_centers_move_towards_the_mean_of_their_class() -> None:
    pooled = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 2.0]])
    centers = torch.tensor([[1.0, 1.0], [5.0, 5.0], [0.0, 0.0]])
    labels = torch.tensor([0, 2, 2])
    move_centers(centers, pooled, labels, rate=0.1)
    expected = torch.tensor([[1.0, 0.9], [5.0, 5.0], [0.0, 0.15]])
    torch.testing.assert_close(centers, expected)


def test_many_images_of_a_class_do_not_throw_its_center_out() -> None:
    centers = torch.zeros(1, 4)
    for _ in range(200):
        move_centers(centers, torch.ones(256, 4), torch.zeros(256, dtype=torch.int64))
    torch.testing.assert_close(centers, torch.ones(1, 4), rtol=0, atol=1e-3)


def test_level_must_count_from_the_end() -> None:
    with pytest.raises(ConfigError, match="level"):
        WSDAN("resnet18", 2, level=0)
