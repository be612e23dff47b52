"""MAGSD: shapes on every named backbone, what it computes, what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from magsd.errors import ConfigError
from magsd.models import MAGSD, ClassifierOutput
from magsd_kernels import bilinear_attention_pool

# Side of each of the last three maps for an input of 224 pixels, and their channels.
BACKBONES = {
    "resnet50": ((28, 14, 7), [512, 1024, 2048]),
    "resnet18": ((28, 14, 7), [128, 256, 512]),
    "vgg16": ((28, 14, 7), [512, 512, 512]),
    "inception_v3": ((25, 12, 5), [288, 768, 2048]),
    "densenet121": ((28, 14, 7), [512, 1024, 1024]),
    "tf_efficientnet_lite0": ((28, 14, 7), [40, 112, 320]),
    # This one gives its maps as (B, H, W, C).
    "swin_tiny_patch4_window7_224": ((28, 14, 7), [192, 384, 768]),
}


@pytest.mark.parametrize("backbone", BACKBONES)
def test_shapes_on_each_backbone(backbone):
    sides, channels = BACKBONES[backbone]
    model = MAGSD(backbone, 4, scales=3).eval()
    images = torch.randn(1, 1, 224, 224)
    with torch.no_grad():
        maps = model.backbone(images)
        output = model(images)
    assert model.backbone.channels == channels
    assert [tuple(m.shape) for m in maps] == [
        (1, c, s, s) for c, s in zip(channels, sides, strict=True)
    ]
    assert output.logits.shape == (1, 4)
    assert output.attention.shape == (1, 32, sides[-1], sides[-1])
    assert output.features.shape == (1, channels[-1], sides[-1], sides[-1])
    assert model.saliency(output).shape == (1, 1, sides[-1], sides[-1])


@pytest.mark.parametrize("scales", [1, 2, 3])
def test_non_square_image(scales):
    model = MAGSD("resnet18", 3, scales=scales, attention_maps=5).eval()
    with torch.no_grad():
        output = model(torch.randn(2, 1, 160, 224))
    assert output.logits.shape == (2, 3)
    assert output.attention.shape == (2, 5, 5, 7)
    assert output.features.shape == (2, 512, 5, 7)


def test_forward_is_the_published_network():
    """Spelt out with plain PyTorch from the paper's equations."""
    torch.manual_seed(0)
    model = MAGSD("resnet18", 3, scales=2, attention_maps=4)
    images = torch.randn(3, 1, 96, 96)
    model(images)  # moves the running statistics off their start
    model.eval()
    with torch.no_grad():
        output = model(images)
        maps = model.backbone(images)
        projections = [m for m in model.attention.modules() if isinstance(m, torch.nn.Conv2d)]
        norms = [m for m in model.attention.modules() if isinstance(m, torch.nn.BatchNorm2d)]
        assert [norm.eps for norm in norms] == [1e-3, 1e-3]
        scales = [
            norm(projection(m)).relu()
            for m, projection, norm in zip(maps, projections, norms, strict=True)
        ]
        attention = F.adaptive_avg_pool2d(scales[0], scales[1].shape[-2:]) + scales[1]
        h, w = attention.shape[-2:]
        pooled = torch.einsum("bmhw,bchw->bmc", attention, maps[-1]) / (h * w)
        pooled = F.normalize((pooled.sign() * (pooled.abs() + 1e-12).sqrt()).flatten(1))
        logits = 100 * pooled @ model.head.weight.T
    torch.testing.assert_close(output.attention, attention, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output.logits, logits, rtol=1e-4, atol=1e-4)
    assert model.head.bias is None


def test_every_parameter_is_trained():
    """The released code optimizes a module that no output depends on; here each has a gradient."""
    model = MAGSD("resnet18", 3, scales=3, attention_maps=4)
    model(torch.randn(2, 1, 64, 64)).logits.square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_pooled_vector_has_length_100():
    model = MAGSD("resnet18", 2, attention_maps=3).eval()
    with torch.no_grad():
        output = model(torch.randn(2, 1, 64, 64))
        pooled = bilinear_attention_pool(output.features, output.attention, scale=100.0)
        torch.testing.assert_close(pooled.norm(dim=1), torch.full((2,), 100.0))
        torch.testing.assert_close(output.logits, model.head(pooled))


def test_saliency_is_the_mean_map():
    model = MAGSD("resnet18", 2, attention_maps=3)
    attention = torch.rand(2, 3, 2, 2, dtype=torch.bfloat16, requires_grad=True)
    saliency = model.saliency(ClassifierOutput(torch.zeros(2, 2), attention, torch.zeros(2, 1)))
    torch.testing.assert_close(saliency[:, 0], attention.detach().float().mean(1))
    assert saliency.dtype == torch.float32
    assert not saliency.requires_grad


def test_bfloat16_autocast_agrees_with_float32():
    torch.manual_seed(0)
    model = MAGSD("resnet18", 3, attention_maps=8).eval()
    images = torch.randn(2, 1, 96, 96).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        exact = model(images).logits
        with torch.autocast("cpu", torch.bfloat16):
            half = model(images).logits
    torch.testing.assert_close(half.float(), exact, rtol=0.1, atol=0.1)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"backbone": "resnet5"}, ConfigError, "resnet5.*near names: resnet50"),
        ({"scales": 6}, ConfigError, "last 6 feature map"),
        ({"scales": 0}, ConfigError, "scales"),
        ({"in_channels": 0}, ConfigError, "in_channels"),
        ({"backbone_args": {"no_such": 1}}, ConfigError, "no_such"),
        ({"attention_maps": 0}, ValueError, "attention_maps"),
        ({"num_classes": 1}, ValueError, "num_classes"),
        ({"num_classes": 3, "classes": ["a", "b"]}, ValueError, "classes"),
    ],
)
def test_refusals(arguments, error, message):
    with pytest.raises(error, match=message):
        MAGSD(**({"backbone": "resnet18"} | arguments))
