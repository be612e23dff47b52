"""The baseline, and its class activation map."""

from __future__ import annotations

import torch

from magsd.models import PlainClassifier


def test_output_and_head():
    model = PlainClassifier("resnet18", 3).eval()
    with torch.no_grad():
        output = model(torch.randn(2, 1, 96, 64))
        expected = model.head(output.features.mean(dim=(2, 3)))
    assert output.attention is None
    assert output.features.shape == (2, 512, 3, 2)
    torch.testing.assert_close(output.logits, expected)


def test_class_activation_map_averages_to_the_logit():
    """Without the bias and before its negative part is cut, the mean of the CAM is the logit."""
    torch.manual_seed(0)
    model = PlainClassifier("resnet18", 3).eval()
    with torch.no_grad():
        model.head.weight.abs_()  # with ReLU features the map then has no negative part
        output = model(torch.randn(4, 1, 64, 64))
        saliency = model.saliency(output)
    top, predicted = output.logits.max(dim=1)
    torch.testing.assert_close(saliency.mean(dim=(1, 2, 3)), top - model.head.bias[predicted])
    assert saliency.shape == (4, 1, 2, 2)


def test_class_activation_map_is_not_negative():
    torch.manual_seed(0)
    model = PlainClassifier("resnet18", 3).eval()
    with torch.no_grad():
        model.head.weight.copy_(-model.head.weight.abs())
        saliency = model.saliency(model(torch.randn(2, 1, 64, 64)))
    assert saliency.eq(0).all()


def test_saliency_is_float32_under_autocast():
    model = PlainClassifier("resnet18", 3).eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        output = model(torch.randn(2, 1, 64, 64))
        assert output.logits.dtype == torch.bfloat16
        assert model.saliency(output).dtype == torch.float32
