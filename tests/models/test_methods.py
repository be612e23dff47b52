"""The registry of methods, and that one made file adds a method."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

import magsd
from magsd import cli, methods
from magsd.config import load_config
from magsd.errors import ConfigError
from magsd.methods import Method, register_method
from magsd.models import WSDAN, ModelConfig, load_model
from magsd.training.run import load_run

MADE = '''
"""Global maximum pooling, trained with label smoothing on the image and its mirror image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from magsd.config import LossConfig, ViewsConfig
from magsd.methods import register_method
from magsd.models.backbone import Backbone
from magsd.models.classifier import Classifier, ClassifierOutput
from magsd.models.config import ModelConfig
from magsd.schema import between, setting
from magsd.training.step import StepResult


@dataclass
class MadeConfig(ModelConfig):
    name: str = "made"
    hidden: int = 8


@dataclass
class MadeViewsConfig(ViewsConfig):
    axis: Literal["x", "y"] = "x"
    padding: float = 0.0  # a name that other methods have in another meaning


@dataclass
class MadeLossConfig(LossConfig):
    label_smoothing: float = setting(0.1, between(0, 1))


def objective(config, class_weights):
    dim = 3 if config.views.axis == "x" else 2

    def step(model, images, labels, generator, shard=None, /):
        loss = 0
        for view in (images, images.flip(dim)):
            logits = model(view).logits
            loss = loss + nn.functional.cross_entropy(
                logits, labels, class_weights, label_smoothing=config.loss.label_smoothing
            )
        correct = (logits.detach().argmax(1) == labels).sum()
        return StepResult(loss, loss.detach(), torch.zeros_like(loss.detach()), correct)

    return step


@register_method(
    objective=objective,
    model=MadeConfig,
    views=MadeViewsConfig,
    loss=MadeLossConfig,
    variants={"made": {"model.hidden": 8}, "made-wide": {"model.hidden": 32}},
)
class Made(Classifier):
    name = "made"

    def __init__(self, backbone="resnet18", num_classes=2, in_channels=1, hidden=8,
                 pretrained=False, backbone_args=None, classes=None, preprocessing=None):
        net = Backbone(backbone, in_channels=in_channels, scales=1, pretrained=pretrained,
                       backbone_args=backbone_args)
        super().__init__(net, num_classes, classes=classes, preprocessing=preprocessing)
        self.inner = nn.Linear(net.channels[-1], hidden)
        self.head = nn.Linear(hidden, num_classes)

    def forward(self, images):
        features = self.backbone(images)[-1]
        return ClassifierOutput(self.head(self.inner(features.amax((2, 3)))), None, features)

    @torch.no_grad()
    def saliency(self, output):
        return output.features.float().square().mean(1, keepdim=True)
'''


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> dict[str, Method]:
    """A copy, which goes after the test."""
    known = dict(methods._METHODS)
    monkeypatch.setattr(methods, "_METHODS", known)
    return known


@pytest.fixture
def made(
    registry: dict[str, Method], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Method]:
    (tmp_path / "method_of_a_test.py").write_text(MADE)
    monkeypatch.syspath_prepend(tmp_path)
    import method_of_a_test  # noqa: F401

    yield registry["made"]
    del sys.modules["method_of_a_test"]


def run(*arguments: str | Path) -> str:
    result = CliRunner(env={"COLUMNS": "200"}).invoke(cli.app, [str(a) for a in arguments])
    if result.exception is not None:
        raise result.exception
    return result.output


def test_one_file_adds_a_method(made: Method, small_pairs: list[str], tmp_path: Path) -> None:
    """It trains, resumes, is evaluated, saved and loaded, and compared with another one."""
    pairs = [pair for pair in small_pairs if pair != "attention_maps=4"]
    out, own = tmp_path / "run", ["label_smoothing=0.3", "views.axis=y", "padding=0.5"]
    run("train", "--out", out, *pairs, "epochs=1", "model=made-wide", *own)
    loaded = load_run(out)
    assert type(loaded.model).__name__ == "Made"
    assert (loaded.config.model.hidden, loaded.config.views.axis) == (32, "y")
    assert (loaded.config.loss.label_smoothing, loaded.config.views.padding) == (0.3, 0.5)
    run("train", "--out", out, "--resume", "epochs=2")
    run("evaluate", out)
    loaded.model.save_pretrained(tmp_path / "saved")
    assert load_model(tmp_path / "saved").inner.out_features == 32
    models = ["--model", "made", "--model", "magsd", "--folds", "0"]
    more = ["epochs=1", "attention_maps=4", "hidden=6"]
    run("crossval", "--out", tmp_path / "compared", *pairs, *models, *more)
    with pytest.raises(ConfigError, match=r"model\.hidden=3 has no effect: .*only made reads it"):
        load_config(None, ["model=plain", "hidden=3"])
    with pytest.raises(ConfigError, match=r"loss\.label_smoothing=2.*expected 0 to 1"):
        load_config(None, ["model=made", "label_smoothing=2"])
    with pytest.raises(ConfigError, match=r"unknown key 'hiden'; did you mean 'model\.hidden'"):
        load_config(None, ["model=made", "hiden=2"])


def test_what_the_decorator_refuses(registry: dict[str, Method]) -> None:
    def objective(config, class_weights):
        raise NotImplementedError

    class Other(WSDAN):
        name = "other"

    with pytest.raises(ValueError, match=r"ModelConfig\.name: expected 'other', got 'magsd'"):
        register_method(objective=objective)(Other)
    with pytest.raises(ValueError, match="a method or a variant 'wsdan' already"):
        register_method(objective=objective, model=registry["wsdan"].model)(WSDAN)
    assert "other" not in registry


def test_no_other_module_knows_a_method() -> None:
    """But for the default of what a user may choose."""
    root = Path(magsd.__file__).parent
    default = ModelConfig().name
    named = "|".join(name for name in methods.methods() if name != default)
    pattern = re.compile(rf"""["']({named})["']|(==|!=|\bin) \(?["']{default}["']""")
    for path in root.rglob("*.py"):
        if path.parent != root / "methods":
            assert not pattern.findall(path.read_text()), path
