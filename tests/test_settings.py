"""Every value of every setting that has few, taken from the configuration's own fields.

A run takes as many values of different settings as go together.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from functools import partialmethod
from math import isfinite
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
from magsd.training.checkpoint import load_checkpoint
from magsd.training.metrics_log import read_metrics
from magsd.training.run_folder import RunFolder

TINY = (
    "data.source=phantom:n=8,size=32",
    "data.test=none",
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


def values() -> list[tuple[str, str]]:
    """Method and key=value, of every value that is not the method's default."""
    found = []
    for number, name in enumerate(methods()):
        for key, default, value in settings(Config.of(name)):
            # What no method changes is tried with one of them.
            own = key.startswith(("model.", "views.", "loss.")) or key == "train.views"
            readable = key in Config.of(name).flat() or key in Config.of(name).unread()
            if value != default and readable and (own or number == 0):
                found.append((name, f"{key}={str(value).lower()}"))
    return found


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


def overrides(name: str, pairs: Sequence[str]) -> list[str]:
    """All that the values need, and the values."""
    return [f"model.name={name}", *(each for pair in pairs for each in (*needed(name, pair), pair))]


def go_together(name: str, pairs: Sequence[str]) -> bool:
    """Whether a configuration can have all these values, and reads every one."""
    try:
        config = load_config(None, overrides(name, pairs))
    except ConfigError:
        return False
    return set(pairs) <= {f"{key}={str(value).lower()}" for key, value in config.flat().items()}


def cases() -> list[tuple[str, tuple[str, ...]]]:
    """Method and values: the defaults of each method in one run, the others in as few as can be."""
    found = []
    for name in methods():
        runs: list[tuple[str, ...]] = []
        for pair in (pair for method, pair in values() if method == name):
            fitting = [
                i
                for i, pairs in enumerate(runs)
                if not {pair, *pairs} & REFUSED.keys() and go_together(name, (*pairs, pair))
            ]
            if fitting:
                runs[fitting[0]] += (pair,)
            else:
                runs.append((pair,))
        found += [(name, pairs) for pairs in [(), *runs]]
    return found


def test_all_kinds_of_settings_are_found() -> None:
    found = values()
    assert sorted((name, pair) for name, pairs in cases() for pair in pairs) == sorted(found)
    assert {pair.partition("=")[0] for _, pair in found} >= {
        *("data.split", "data.clahe", "data.augment.enabled", "optim.name", "optim.schedule"),
        *("optim.nesterov", "model.fusion", "model.pool", "model.regularizer", "model.pretrained"),
        *("loss.name", "loss.class_weights", "train.precision", "train.views", "train.monitor"),
        *("train.recompute", "train.channels_last", "train.images_on_device", "train.compile"),
    }


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


@pytest.mark.parametrize(("name", "pairs"), cases(), ids=str)
def test_trains_evaluates_predicts_and_localizes(
    name: str,
    pairs: tuple[str, ...],
    small_pairs: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Neither a download nor minutes of a C++ compiler: timm's and torch's own work.
    monkeypatch.setattr(backbone, "_create_pretrained", backbone._create)
    compiled = partialmethod(torch.nn.Module.compile, backend="aot_eager")
    monkeypatch.setattr(torch.nn.Module, "compile", compiled)
    source = [f"data.source={birds(tmp_path)}"] if "data.split=published" in pairs else []
    config = load_config(None, overrides(name, pairs), shared=[*small_pairs, *TINY, *source])
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps(config.to_dict()))  # JSON is YAML
    out = tmp_path / "run"

    if pairs and pairs[0] in REFUSED:
        with pytest.raises(ConfigError, match=REFUSED[pairs[0]]):
            run("train", "--config", file, "--out", out)
        return
    run("train", "--config", file, "--out", out)
    stored = RunFolder(out).load_config().flat().items()
    assert set(pairs) <= {f"{key}={str(value).lower()}" for key, value in stored}
    assert all(isfinite(float(row["train_loss"])) for row in read_metrics(out / "metrics.csv"))
    scaler = load_checkpoint(out / "checkpoints" / "last.pt")["scaler"]
    assert bool(scaler) == (config.train.precision == "float16")
    run("evaluate", out, "--json", tmp_path / "report.json")
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["raw"]["images"] == report["refined"]["images"] > 0
    images = open_source(config.data.source)
    cv2.imwrite(str(tmp_path / "image.png"), images.read_image(images.records[0]))
    overlays = tmp_path / "overlays"
    run("predict", out, tmp_path / "image.png", "--overlay", overlays, "--json", tmp_path / "p")
    [prediction] = json.loads((tmp_path / "p").read_text())
    assert sum(prediction["probabilities"].values()) == pytest.approx(1, abs=1e-5)
    assert Path(prediction["overlay"]).is_file()
    run("localize", out, "--out", tmp_path / "maps", "--overlays", "1")
    assert list((tmp_path / "maps").glob("*.csv"))
    # None where all maps are zero everywhere, as they may be after one step.
    means = json.loads((tmp_path / "maps" / "localization.json").read_text())["overall"]["means"]
    assert means is None or 0 < means["values"]["inside"] < 1
