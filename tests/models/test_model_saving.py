"""build_model, save_pretrained, from_pretrained, load_model."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from magsd.config import load_config
from magsd.errors import ConfigError, MagsdError
from magsd.methods import methods
from magsd.methods.magsd import MAGSDConfig
from magsd.models import (
    MAGSD,
    WSDAN,
    ModelConfig,
    PlainClassifier,
    Preprocessing,
    build_model,
    load_model,
)

IMAGES = torch.linspace(-1, 1, 2 * 64 * 64).reshape(2, 1, 64, 64)
CLASSES = ("a", "b", "c")


@pytest.fixture(params=["magsd", "wsdan", "plain"])
def model(request):
    pairs = [f"model.name={request.param}", "backbone=resnet18", "pretrained=false"]
    config = load_config(None, pairs, shared=["attention_maps=4", "scales=3"]).model
    torch.manual_seed(0)
    return build_model(config, 3, classes=CLASSES, preprocessing=Preprocessing(64, (2.0, 8))).eval()


def test_build_model_follows_the_config(model):
    kind = {"magsd": MAGSD, "wsdan": WSDAN, "plain": PlainClassifier}[model.name]
    assert type(model) is kind
    if kind is MAGSD:
        assert model.backbone.channels == [128, 256, 512]
        assert model.head.in_features == 4 * 512
    assert model.in_channels == 1


def test_defaults_are_the_published_ones():
    config = MAGSDConfig()
    assert (config.name, config.backbone, config.attention_maps, config.scales) == (
        "magsd",
        "resnet50",
        32,
        2,
    )
    assert config.pretrained is True


def test_backbone_args_reach_timm():
    config = ModelConfig(
        backbone="resnet18", pretrained=False, backbone_args={"drop_path_rate": 0.5}
    )
    plain = build_model(ModelConfig(backbone="resnet18", pretrained=False), 2)
    dropped = build_model(config, 2)

    def count(built):
        return sum(type(m).__name__ == "DropPath" for m in built.modules())

    assert count(dropped) > count(plain)


def test_round_trip(model, tmp_path):
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(IMAGES).logits
    for loaded in (type(model).from_pretrained(tmp_path), load_model(tmp_path)):
        assert type(loaded) is type(model)
        assert loaded.classes == CLASSES
        assert loaded.preprocessing == Preprocessing(64, (2.0, 8))
        assert not loaded.training
        with torch.no_grad():
            assert torch.equal(loaded(IMAGES).logits, expected)


def test_round_trip_twice_and_after_setting_names(tmp_path):
    model = MAGSD("resnet18", 3, attention_maps=4)
    model.classes = CLASSES
    model.preprocessing = Preprocessing(96, None)
    model.save_pretrained(tmp_path / "one")
    load_model(tmp_path / "one").save_pretrained(tmp_path / "two")
    one, two = (json.loads((tmp_path / n / "config.json").read_text()) for n in ("one", "two"))
    assert one == two
    assert one["classes"] == list(CLASSES)
    assert load_model(tmp_path / "two").preprocessing == Preprocessing(96, None)


def test_channels_last_model_is_saved(model, tmp_path):
    model = model.to(memory_format=torch.channels_last)
    model.save_pretrained(tmp_path)
    state = load_model(tmp_path).state_dict()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_loading_does_not_ask_for_the_pretrained_start(tmp_path):
    """The weights that a model started from may be gone when it is loaded."""
    weights = tmp_path / "start.safetensors"
    model = MAGSD("resnet18", 3)
    state = {key.removeprefix("net."): v for key, v in model.backbone.state_dict().items()}
    save_file(state, weights)
    MAGSD("resnet18", 3, pretrained=str(weights)).save_pretrained(tmp_path / "saved")
    weights.unlink()
    saved = (tmp_path / "saved" / "config.json").read_text()
    assert json.loads(saved)["pretrained"] is False
    assert str(tmp_path) not in saved
    load_model(tmp_path / "saved")


def test_loading_prints_nothing_on_standard_output(model, tmp_path, capsys):
    model.save_pretrained(tmp_path)
    load_model(tmp_path)
    assert capsys.readouterr().out == ""


def test_damaged_folders(model, tmp_path):
    with pytest.raises(MagsdError, match=r"config\.json is missing"):
        load_model(tmp_path)
    model.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    state = load_file(weights)
    save_file({k: v for k, v in state.items() if k != "head.weight"}, weights)
    with pytest.raises(MagsdError, match=r"head\.weight"):
        load_model(tmp_path)
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(MagsdError, match="damaged"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(MagsdError, match="describes no magsd model"):
        load_model(tmp_path)


def test_unknown_model_name():
    with pytest.raises(ConfigError, match=f"'magsdd'; known: {', '.join(methods())}"):
        build_model(ModelConfig(name="magsdd", pretrained=False), 3)


def test_config_imports_without_torch(run_python):
    code = "import sys, magsd.models; magsd.models.ModelConfig(); print('torch' in sys.modules)"
    assert run_python("-c", code).stdout.strip() == "False"
