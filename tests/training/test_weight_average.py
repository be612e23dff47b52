"""The moving average of the weights: what it is, what is measured on it, and that it goes on."""

from __future__ import annotations

from collections.abc import Callable
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn
from torch.optim.swa_utils import AveragedModel

from benchmarks.harness.device import HostReads
from magsd.config import Config, load_config
from magsd.data.run_data import open_images, plain_loader
from magsd.errors import ConfigError
from magsd.models import build_model
from magsd.runtime import Runtime
from magsd.training import load_run
from magsd.training.averaging import weight_average
from magsd.training.checkpoint import load_checkpoint
from magsd.training.metrics_log import read_metrics
from magsd.training.run import train_run
from magsd.training.run_folder import RunFolder
from magsd.training.trainer import Trainer
from magsd.training.validation import validate


def small_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


def moved(model: nn.Module, seed: int) -> None:
    """Other weights, and other statistics."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    model(torch.randn(5, 3, generator=generator))


def test_average_of_weights_and_statistics() -> None:
    model = small_net()
    average = weight_average(model, 0.25)
    assert average is not None
    expected = {}
    for step in range(1, 8):
        moved(model, step)
        average.update(model, step)
        decay = min(0.25, (step - 1) / (step + 8))  # (1 + n) / (10 + n), and 0 before
        for name, value in model.state_dict().items():
            before = expected.get(name, torch.zeros_like(value))
            whole = not value.is_floating_point()
            expected[name] = value.clone() if whole else decay * before + (1 - decay) * value
        if step == 1:
            assert all(
                torch.equal(value, average.module.state_dict()[name])
                for name, value in model.state_dict().items()
            )
    assert decay == 0.25
    for name, value in average.module.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-7)
    assert int(average.module[1].num_batches_tracked) == 7
    assert not any(module.training for module in average.module.modules())


def test_no_update_waits_for_the_device() -> None:
    """That of torch's own class would."""
    model = small_net()
    average = weight_average(model, 0.9)
    assert average is not None
    with HostReads() as reads:
        average.update(model, 1)
        average.update(model, 2)
    assert reads.count == 0
    torchs = AveragedModel(model)
    with HostReads() as reads:
        torchs.update_parameters(model)
    assert reads.count > 0


def test_no_average_by_default() -> None:
    assert Config().train.ema == 0
    assert weight_average(small_net(), 0.0) is None


@pytest.mark.parametrize("value", ["1", "-0.1", "nan"])
def test_a_decay_that_is_none_is_refused(value: str) -> None:
    with pytest.raises(ConfigError, match=r"train\.ema=.*expected a number"):
        load_config(None, [f"train.ema={value}"])


def run(
    folder: Path, small_config: Callable[..., Config], console: Console, *overrides: str
) -> dict[str, Any]:
    train_run(small_config(*overrides), folder, console=console)
    return load_checkpoint(folder / "checkpoints" / "last.pt")


def validated(folder: Path) -> tuple[dict[str, float], dict[str, float]]:
    """Figures of the kept model, and those in the metrics of its epoch."""
    loaded = load_run(folder)
    _, cache = open_images(loaded.config, loaded.config.data.source)
    keys = (folder / "split.csv").read_text().splitlines()
    chosen = {line.split(",")[0] for line in keys if line.endswith("validation")}
    indices = [i for i, record in enumerate(cache.records) if record.key in chosen]
    loader = plain_loader(loaded.config, cache, indices, loaded.classes)
    measured = validate(loaded.model, loader, loaded.runtime)
    row = read_metrics(folder / "metrics.csv")[loaded.epoch - 1]
    return measured, {name: float(row[name]) for name in measured}


def test_training_goes_its_way_and_the_average_is_measured(
    tmp_path: Path, small_config, console: Console, same_state
) -> None:
    pairs = ("deterministic=true", "epochs=1", "lr=0.01")
    plain = run(tmp_path / "plain", small_config, console, *pairs)
    with_average = run(tmp_path / "average", small_config, console, *pairs, "ema=0.9")
    average = with_average.pop("ema")
    for name in ("model", "optimizer", "sums"):
        same_state(plain[name], with_average[name])
    assert not torch.equal(average["head.weight"], with_average["model"]["head.weight"])
    best = load_checkpoint(tmp_path / "average" / "checkpoints" / "best.pt")
    assert best.keys() == load_checkpoint(tmp_path / "plain/checkpoints/best.pt").keys()
    same_state(best["model"], average)
    measured, written = validated(tmp_path / "average")
    assert measured == pytest.approx(written, rel=1e-5)
    rows = [read_metrics(tmp_path / name / "metrics.csv") for name in ("plain", "average")]
    assert [row["train_loss"] for row in rows[0]] == [row["train_loss"] for row in rows[1]]
    assert rows[0][-1]["validation_loss"] != rows[1][-1]["validation_loss"]


@pytest.mark.parametrize(
    "overrides",
    [
        ("compile=true", "recompute=true"),
        ("precision=float16", "channels_last=true", "fuse_norm=false"),
        ("model=wsdan", "backbone=test_resnet", "views=separate"),
        ("model.name=plain", "optim.name=adamw"),
    ],
    ids=" ".join,
)
def test_with_other_settings(
    overrides: tuple[str, ...],
    tmp_path: Path,
    small_config,
    console: Console,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The fused, compiled or recomputing copy gives the figures of the model that is loaded."""
    compiled: list[nn.Module] = []
    compile = partialmethod(nn.Module.compile, backend="aot_eager")

    def noted(module: nn.Module, *arguments: Any, **named: Any) -> None:
        compiled.append(module)
        compile.__get__(module, type(module))(*arguments, **named)

    monkeypatch.setattr(nn.Module, "compile", noted)
    run(tmp_path, small_config, console, *overrides, "ema=0.5", "epochs=1")
    assert len(compiled) == (2 if "compile=true" in overrides else 0)
    measured, written = validated(tmp_path)
    assert measured == pytest.approx(written, rel=1e-3)


def test_a_replayed_graph_is_averaged_after_it(tmp_path: Path, small_config) -> None:
    """Nothing of the average is recorded: a graph replays one decay for ever."""
    config = small_config("ema=0.5")
    classes, cache = open_images(config, config.data.source)
    loader = plain_loader(config, cache, list(range(8)), classes)
    trainer = Trainer(
        config,
        build_model(config.model, len(classes)),
        loader,
        loader,
        RunFolder(tmp_path),
        Runtime.from_config(config.train),
    )
    weight = trainer.model.head.weight.data

    def replay(*_: Any) -> None:
        weight.fill_(trainer.step + 1)

    trainer.captured_step = replay  # type: ignore[assignment]
    for _ in range(2):
        trainer._one_step(next(iter(loader)))
    torch.testing.assert_close(
        trainer.measured.head.weight.data, torch.full_like(weight, 1 * 0.1 + 2 * 0.9)
    )


def test_a_run_of_before_has_no_average(tmp_path: Path, small_config, console: Console) -> None:
    """Its configuration lacks the key; it loads, and resumes without one."""
    run(tmp_path, small_config, console, "epochs=1")
    file = tmp_path / "config.yaml"
    text = file.read_text()
    assert "ema: 0.0\n" in text
    file.write_text(text.replace("  ema: 0.0\n", ""))
    assert load_run(tmp_path).config.train.ema == 0
    with pytest.raises(ConfigError, match=r"cannot change: train\.ema was 0\.0, now 0\.9"):
        train_run(small_config("ema=0.9"), tmp_path, resume=True, console=console)
    train_run(small_config(), tmp_path, resume=True, console=console)
    assert "ema" not in load_checkpoint(tmp_path / "checkpoints" / "last.pt")


def test_before_the_first_epoch_the_average_is_what_is_loaded(
    tmp_path: Path, small_config, console: Console
) -> None:
    run(tmp_path, small_config, console, "epochs=1", "ema=0.9")
    (tmp_path / "checkpoints" / "best.pt").unlink()
    last = load_checkpoint(tmp_path / "checkpoints" / "last.pt")
    assert torch.equal(load_run(tmp_path).model.head.weight, last["ema"]["head.weight"])


def test_processes_average_alike(
    torchrun, tmp_path: Path, small_pairs: list[str], small_config, console: Console
) -> None:
    """Figures of both processes' averages are those of the leader's, which is kept."""
    import magsd

    out = tmp_path / "run"
    pairs = [*small_pairs, "ema=0.7", "lr=0.1"]
    done = torchrun(Path(magsd.__file__).with_name("__main__.py"), "train", "--out", out, *pairs)
    assert done.returncode == 0, done.stdout + done.stderr
    measured, written = validated(out)
    assert measured == pytest.approx(written, rel=1e-5)
    last = load_checkpoint(out / "checkpoints" / "last.pt")
    assert not torch.equal(last["ema"]["head.weight"], last["model"]["head.weight"])
