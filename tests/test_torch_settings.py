"""Settings of the whole process hold within their context and are put back after it."""

from __future__ import annotations

import contextlib
import itertools
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from magsd import cli
from magsd.torch_settings import (
    cudnn_benchmark,
    deterministic_algorithms,
    tf32_products,
)

CUDNN: Any = torch.backends.cudnn
MATMUL: Any = torch.backends.cuda.matmul
NEWER = (MATMUL, CUDNN.conv, CUDNN.rnn, torch.backends.mkldnn.matmul)

#: What a program may have set before, by older names, by newer ones, or by both.
BEFORE: dict[str, Callable[[], None]] = {
    "nothing": lambda: None,
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "allowed, older": lambda: _allow(True),
    "refused, older": lambda: _allow(False),
    "allowed, newer": lambda: _set_newer("tf32"),
    "refused, newer": lambda: _set_newer("ieee"),
    "high, products refused by the newer": lambda: (
        torch.set_float32_matmul_precision("high"),
        _set_newer("ieee"),
    )[1],
    "convolutions refused by the older, allowed by the newer": lambda: (
        _allow(False),
        _set_newer("tf32"),
    )[1],
    "convolutions alone": lambda: setattr(CUDNN.conv, "fp32_precision", "ieee"),
}


def _allow(allowed: bool) -> None:
    MATMUL.allow_tf32 = CUDNN.allow_tf32 = allowed


def _set_newer(precision: str) -> None:
    for setting in NEWER[:3]:
        setting.fp32_precision = precision


def answers() -> list[object]:
    """Everything that torch says of its settings; where it refuses to say, that."""
    questions: list[Callable[[], object]] = [
        torch.get_float32_matmul_precision,
        lambda: MATMUL.allow_tf32,
        lambda: CUDNN.allow_tf32,
        *(lambda s=setting: s.fp32_precision for setting in NEWER),
    ]
    found: list[object] = []
    for question in questions:
        try:
            found.append(question())
        except RuntimeError:
            found.append("refused")
    return found


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    start = [setting.fp32_precision for setting in NEWER]
    yield
    torch.set_float32_matmul_precision("highest")
    CUDNN.allow_tf32 = True
    for setting, value in zip(NEWER, start, strict=True):
        setting.fp32_precision = value


@pytest.mark.parametrize("before", BEFORE)
def test_tf32_holds_by_every_name_and_is_put_back(before: str) -> None:
    BEFORE[before]()
    found = answers()
    mkldnn = NEWER[3].fp32_precision
    with tf32_products(True):
        level = "medium" if before == "medium" else "high"
        assert answers() == [level, True, True, "tf32", "tf32", "tf32", mkldnn]
    assert answers() == found
    with contextlib.suppress(KeyError), tf32_products(True):
        raise KeyError
    assert answers() == found


@pytest.mark.parametrize("before", BEFORE)
def test_what_is_hidden_by_the_newer_settings_is_put_back_as_well(before: str) -> None:
    """The older ones show once nothing disagrees."""

    def hidden(within: bool) -> list[object]:
        BEFORE[before]()
        with tf32_products(within):
            pass
        found: list[object] = []
        for precision in ("ieee", "tf32"):
            for setting in NEWER:
                setting.fp32_precision = precision
            found += answers()
        return found

    assert hidden(True) == hidden(False)


def test_float32_changes_no_setting() -> None:
    found = answers()
    with tf32_products(False):
        assert answers() == found


def test_torch_compiles_under_tf32() -> None:
    """Its guards and its choice of kernels read the settings."""
    torch._dynamo.reset()
    with tf32_products(True):
        x = torch.randn(4, 4)
        torch.testing.assert_close(torch.compile(torch.mm, backend="aot_eager")(x, x), x @ x)
    torch._dynamo.reset()


def test_a_run_in_tf32_ends_with_its_evaluation(
    small_pairs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what evaluates it later runs in it, too."""
    seen: list[bool] = []
    forward = torch.nn.Conv2d.forward

    def noted(self: torch.nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
        seen.append(MATMUL.allow_tf32 and torch.get_float32_matmul_precision() == "high")
        return forward(self, x)

    monkeypatch.setattr(torch.nn.Conv2d, "forward", noted)
    out = tmp_path / "run"
    image = tmp_path / "image.png"
    _write_image(image)
    pairs = [*small_pairs, "epochs=1", "overlays=2", "precision=tf32"]
    for command in (
        ["train", "--out", out, *pairs],
        ["evaluate", out],
        ["predict", out, image],
        ["localize", out, "--out", tmp_path / "maps"],
    ):
        seen.clear()
        result = CliRunner().invoke(cli.app, [str(word) for word in command])
        assert result.exit_code == 0, (result.output, result.exception)
        assert seen, command
        assert all(seen), command
    assert (out / "evaluation.json").is_file()
    assert not MATMUL.allow_tf32


def _write_image(path: Path) -> None:
    import cv2
    import numpy as np

    cv2.imwrite(str(path), np.random.default_rng(0).integers(0, 255, (40, 40), dtype=np.uint8))


@pytest.mark.parametrize(
    ("before", "algorithms", "cudnn"), list(itertools.product([False, True], repeat=3))
)
def test_convolutions_are_timed_unless_determinism_is_asked_for(
    before: bool, algorithms: bool, cudnn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CUDNN, "benchmark", before)
    monkeypatch.setattr(CUDNN, "deterministic", cudnn)
    with deterministic_algorithms(algorithms):
        assert torch.are_deterministic_algorithms_enabled() == algorithms
        with cudnn_benchmark():
            assert CUDNN.benchmark == (not algorithms and not cudnn)
        assert CUDNN.benchmark == before
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_run_times_its_convolutions(
    deterministic: bool, small_pairs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = set()
    forward = torch.nn.Conv2d.forward

    def noted(self: torch.nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            seen.add(CUDNN.benchmark)
        return forward(self, x)

    monkeypatch.setattr(torch.nn.Conv2d, "forward", noted)
    pairs = [*small_pairs, "epochs=1", f"deterministic={deterministic}"]
    result = CliRunner().invoke(cli.app, ["train", "--out", str(tmp_path / "run"), *pairs])
    assert result.exit_code == 0, result.output
    assert seen == {not deterministic}
    assert not CUDNN.benchmark


FAULTS = """
import resource, torch
from magsd.torch_settings import kept_memory

def faults(megabytes):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(megabytes << 20, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

outside = faults(64)
with kept_memory(torch.device("cpu")):
    faults(256)
    inside = faults(64)
print(outside, inside, faults(64))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc alone is told")
def test_memory_is_kept_for_the_next_tensor() -> None:
    """Pages that a tensor frees are not asked for again, and are after the context."""
    shown = subprocess.run(
        [sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True
    ).stdout
    outside, inside, after = map(int, shown.split())
    assert inside < 50
    assert min(outside, after) > 2 * inside


def test_a_run_keeps_its_memory(
    small_pairs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices = []

    @contextlib.contextmanager
    def noticed(device: torch.device) -> Iterator[None]:
        devices.append(device.type)
        yield

    monkeypatch.setattr("magsd.training.run.kept_memory", noticed)
    pairs = [*small_pairs, "epochs=1"]
    result = CliRunner().invoke(cli.app, ["train", "--out", str(tmp_path / "run"), *pairs])
    assert result.exit_code == 0, result.output
    assert devices == ["cpu"]
