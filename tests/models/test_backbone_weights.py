"""Pretrained weights from a file, and what happens when they cannot be had."""

from __future__ import annotations

import huggingface_hub
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from magsd.errors import ConfigError, MagsdError
from magsd.models import MAGSD
from magsd.models.backbone import Backbone

IMAGES = (2, 1, 96, 96)


def _whole_model(name: str) -> torch.nn.Module:
    """A timm classifier whose every parameter and statistic differs from a fresh one."""
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False).eval()
    with torch.no_grad():
        for value in model.parameters():
            value.add_(torch.randn_like(value) * 0.01)
        for value in model.buffers():
            if value.is_floating_point():
                value.add_(torch.rand_like(value) * 0.1)
    return model


# A flattened extractor, one that keeps names, one that prefixes them, one with several stem layers.
@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_100", "resnet18d", "densenet121"])
def test_file_of_a_whole_model_fills_the_backbone(name, tmp_path):
    whole = _whole_model(name)
    save_file(whole.state_dict(), tmp_path / "w.safetensors")
    path = str(tmp_path / "w.safetensors")
    gray = Backbone(name, in_channels=1, pretrained=path).eval()
    color = Backbone(name, in_channels=3, pretrained=path).eval()
    images = torch.randn(IMAGES)
    with torch.no_grad():
        expected = whole.forward_features(images.expand(-1, 3, -1, -1))
        torch.testing.assert_close(color(images.expand(-1, 3, -1, -1))[-1], expected)
        torch.testing.assert_close(gray(images)[-1], expected, rtol=1e-4, atol=1e-4)


def test_transformer_backbone_loads(tmp_path):
    whole = _whole_model("vit_tiny_patch16_224")
    save_file(whole.state_dict(), tmp_path / "w.safetensors")
    backbone = Backbone(
        "vit_tiny_patch16_224", in_channels=3, pretrained=str(tmp_path / "w.safetensors")
    )
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        expected = whole.forward_intermediates(
            images, indices=[-1], intermediates_only=True, norm=False
        )
        torch.testing.assert_close(backbone.eval()(images)[-1], expected[-1])


def test_one_channel_stem_equals_three_on_repeated_gray(shared_dir):
    path = shared_dir / "weights" / "tf_efficientnet_lite0.safetensors"
    if not path.is_file():
        pytest.skip(f"no weights at {path}")
    name = "tf_efficientnet_lite0"
    gray = Backbone(name, in_channels=1, scales=3, pretrained=str(path)).eval()
    color = Backbone(name, in_channels=3, scales=3, pretrained=str(path)).eval()
    by_timm = timm.create_model(
        name,
        features_only=True,
        in_chans=1,
        pretrained=True,
        pretrained_cfg_overlay={"file": str(path)},
        out_indices=(2, 3, 4),
    ).eval()
    images = torch.randn(IMAGES)
    with torch.no_grad():
        three = zip(gray(images), color(images.expand(-1, 3, -1, -1)), by_timm(images), strict=True)
        for ours, repeated, theirs in three:
            torch.testing.assert_close(ours, repeated, rtol=1e-4, atol=1e-4)
            assert torch.equal(ours, theirs)


def _saved(tmp_path, change) -> str:
    state = _whole_model("resnet18").state_dict()
    change(state)
    save_file(state, tmp_path / "w.safetensors")
    return str(tmp_path / "w.safetensors")


def test_file_without_classifier_or_counters_is_enough(tmp_path):
    def change(state):
        for key in list(state):
            if key.startswith("fc.") or key.endswith("num_batches_tracked"):
                del state[key]

    path = _saved(tmp_path, change)
    backbone = Backbone("resnet18", in_channels=3, pretrained=path)
    torch.testing.assert_close(
        backbone.state_dict()["net.layer4.1.conv2.weight"],
        load_file(path)["layer4.1.conv2.weight"],
    )


def test_missing_parameter_is_named(tmp_path):
    path = _saved(tmp_path, lambda state: state.pop("layer3.0.conv1.weight"))
    with pytest.raises(MagsdError, match=r"1 of \d+ parameters are missing, e.g. layer3.0.conv1"):
        MAGSD("resnet18", 3, pretrained=path)


def test_wrong_shape_is_named(tmp_path):
    def change(state):
        state["layer2.0.bn1.weight"] = torch.ones(5)

    with pytest.raises(
        MagsdError, match=r"layer2.0.bn1.weight has shape \(5,\), expected \(128,\)"
    ):
        MAGSD("resnet18", 3, pretrained=_saved(tmp_path, change))


def test_weights_of_another_backbone(tmp_path):
    path = _saved(tmp_path, lambda state: None)
    with pytest.raises(MagsdError, match="does not fit backbone 'resnet50'"):
        MAGSD("resnet50", 3, pretrained=path)


def test_missing_and_corrupt_files(tmp_path):
    with pytest.raises(MagsdError, match="not found"):
        MAGSD("resnet18", 3, pretrained=str(tmp_path / "none.safetensors"))
    path = tmp_path / "w.safetensors"
    path.write_bytes(b"not weights")
    with pytest.raises(MagsdError, match="not readable as safetensors"):
        MAGSD("resnet18", 3, pretrained=str(path))
    _saved(tmp_path, lambda state: None)
    path.write_bytes(path.read_bytes()[:100_000])
    with pytest.raises(MagsdError, match="not readable as safetensors"):
        MAGSD("resnet18", 3, pretrained=str(path))


def test_no_network_says_how_to_go_on(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(MagsdError, match=r"model\.pretrained=false.*model\.pretrained=/path/to"):
        MAGSD("resnet18", 3, pretrained=True)


def test_wrong_request_is_not_taken_for_a_failed_download():
    with pytest.raises(ConfigError, match="near names"):
        MAGSD("resnet5", 3, pretrained=True)
    with pytest.raises(ConfigError, match="last 9 feature map"):
        MAGSD("resnet18", 3, scales=9, pretrained=True)
