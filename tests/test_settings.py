"""Every value of every setting that has few, taken from the configuration's own fields."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from functools import partialmethod
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import cv2
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from magsd import cli
from magsd.config import Config, load_config
from magsd.data import open_source
from magsd.errors import ConfigError
from magsd.methods import methods
from magsd.models import backbone
from magsd.training.run_folder import RunFolder

TINY = (
    "data.source=phantom:n=8,size=32",
    "epochs=1",
    "log_interval=1",
    "overlays=1",
)
# What a value needs besides.
WITH = {
    "model.fusion=cascade": ("scales=3",),
    "data.split=published": ("in_channels=3",),
}
# What is refused here, and how.
REFUSED = {"train.sync_batchnorm=true": "needs GPUs: torch has no synchronized batch norm"}


def values_of(hint: Any) -> list[Any]:
    """All values of a type where they are few; those of a union that it counts up."""
    if hint is bool:
        return [False, True]
    options = get_args(hint)
    if getattr(hint, "__origin__", None) is Literal:
        return list(options)
    if getattr(hint, "__origin__", None) in (list, tuple, dict):
        return []
    return [value for option in options for value in values_of(option)]


def settings(section: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Dotted key, default, and another value, of every setting with few values."""
    hints = get_type_hints(type(section))
    for item in fields(section):
        default = getattr(section, item.name)
        if is_dataclass(default):
            yield from settings(default, f"{prefix}{item.name}.")
        for value in values_of(hints[item.name]):
            yield prefix + item.name, default, value


def cases() -> list[tuple[str, str]]:
    """Method and key=value: the defaults of each method in one run, other values one by one."""
    found = []
    for number, name in enumerate(methods()):
        found.append((name, ""))
        for key, default, value in settings(Config.of(name)):
            # What no method changes is tried with one of them.
            own = key.startswith(("model.", "views.", "loss.")) or key == "train.views"
            readable = key in Config.of(name).flat() or key in Config.of(name).unread()
            if value != default and readable and (own or number == 0):
                found.append((name, f"{key}={str(value).lower()}"))
    return found


def test_all_kinds_of_settings_are_found() -> None:
    keys = {pair.partition("=")[0] for _, pair in cases()}
    assert keys >= {
        *("data.split", "data.clahe", "data.augment.enabled", "optim.name", "optim.schedule"),
        *("optim.nesterov", "model.fusion", "model.pool", "model.regularizer", "model.pretrained"),
        *("loss.name", "loss.class_weights", "train.precision", "train.views", "train.monitor"),
        *("train.recompute", "train.channels_last", "train.images_on_device", "train.compile"),
    }


def needed(name: str, pair: str) -> list[str]:
    """The choices under which the key is read, and those that its value needs."""
    key = pair.partition("=")[0]
    section = key.rpartition(".")[0]
    config, pairs = load_config(None, [f"model.name={name}"]), list(WITH.get(pair, ()))
    if key in config.unread():
        item = next(f for f in fields(getattr(config, section)) if f"{section}.{f.name}" == key)
        other, value, *_ = item.metadata["when"]
        pairs.append(f"{section}.{other}={value}")
    return pairs


def run(*arguments: str | Path) -> str:
    result = CliRunner(env={"COLUMNS": "200"}).invoke(cli.app, [str(a) for a in arguments])
    if result.exception is not None:
        raise result.exception
    return result.output


def birds(root: Path) -> str:
    """A set that publishes a split, in the layout of CUB-200-2011: the source."""
    names = [f"{number % 2}/{number}.jpg" for number in range(8)]
    for number, name in enumerate(names):
        path = root / "CUB_200_2011" / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), np.random.default_rng(number).integers(0, 255, (32, 32, 3)))
    columns = {
        "images": names,
        "image_class_labels": [1 + number % 2 for number in range(8)],
        "train_test_split": [int(number < 4) for number in range(8)],
        "bounding_boxes": ["8 8 16 16"] * 8,
        "classes": ["0", "1"],
    }
    for name, values in columns.items():
        text = "".join(f"{i} {value}\n" for i, value in enumerate(values, 1))
        (root / "CUB_200_2011" / f"{name}.txt").write_text(text)
    return f"cub:{root}"


@pytest.mark.parametrize(("name", "pair"), cases())
def test_trains_evaluates_predicts_and_localizes(
    name: str,
    pair: str,
    small_pairs: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Neither a download nor minutes of a C++ compiler: timm's and torch's own work.
    monkeypatch.setattr(backbone, "_create_pretrained", backbone._create)
    compiled = partialmethod(torch.nn.Module.compile, backend="aot_eager")
    monkeypatch.setattr(torch.nn.Module, "compile", compiled)
    own = [pair] if pair else []
    source = [f"data.source={birds(tmp_path)}"] if pair == "data.split=published" else []
    shared = [*small_pairs, *TINY, *source, *needed(name, pair)]
    config = load_config(None, [f"model.name={name}", *own], shared=shared)
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps(config.to_dict()))  # JSON is YAML
    out = tmp_path / "run"

    if pair in REFUSED:
        with pytest.raises(ConfigError, match=REFUSED[pair]):
            run("train", "--config", file, "--out", out)
        return
    run("train", "--config", file, "--out", out)
    key, _, value = pair.partition("=")
    if pair:
        assert str(RunFolder(out).load_config().flat()[key]).lower() == value
    run("evaluate", out, "--json", tmp_path / "report.json")
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["raw"]["images"] == report["refined"]["images"] > 0
    images = open_source(config.data.source)
    cv2.imwrite(str(tmp_path / "image.png"), images.read_image(images.records[0]))
    run("predict", out, tmp_path / "image.png", "--overlay", tmp_path, "--json", tmp_path / "p")
    [prediction] = json.loads((tmp_path / "p").read_text())
    assert sum(prediction["probabilities"].values()) == pytest.approx(1, abs=1e-5)
    assert Path(prediction["overlay"]).is_file()
    run("localize", out, "--out", tmp_path / "maps", "--overlays", "1")
    assert list((tmp_path / "maps").glob("*.csv"))
