"""Fixtures for every test folder; among them a run small enough to train in a second."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

# The torch of a worker has one thread, and so have the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

SMALL = (
    "data.source=phantom:n=24,size=32",
    "image_size=32",
    "folds=2",
    "backbone=test_resnet",
    "backbone_args={output_stride: 16}",
    "attention_maps=4",
    "pretrained=false",
    "batch_size=4",
    "eval_batch_size=8",
    "epochs=2",
    "lr=1e-3",
    "tensorboard=false",
    "train.device=cpu",
    "log_interval=2",
    "overlays=0",
)


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Run folders of tests on all cores, where pytest-xdist is there and no option forbids it."""
    options = config.option
    if not config.pluginmanager.hasplugin("xdist") or not all(map(os.path.isdir, config.args)):
        return
    if "PYTEST_XDIST_WORKER" in os.environ:  # a worker, or what a test in one has started
        return
    if options.numprocesses is None and not (options.usepdb or options.collectonly):
        options.numprocesses, options.dist = "auto", "worksteal"


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Folder with real radiographs and weights; tests that need it skip where it is absent."""
    path = Path(os.environ.get("MAGSD_SHARED", Path(__file__).parents[2] / "shared"))
    if not (path / "data" / "cxr3" / "labels.csv").is_file():
        pytest.skip(f"real radiographs not found under {path} (set MAGSD_SHARED)")
    return path


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def small_pairs(cache_dir: Path) -> list[str]:
    """key=value pairs of the small run: three steps an epoch."""
    return [*SMALL, f"cache_dir={cache_dir}"]


def _run_python(*arguments: str | Path, **environment: object) -> subprocess.CompletedProcess[str]:
    import magsd  # not where the kernels alone are installed

    variables = {"COLUMNS": "200", "OMP_NUM_THREADS": "1"}
    variables |= {name: str(value) for name, value in environment.items()}
    package = str(Path(magsd.__file__).parents[1])
    paths = [variables.get("PYTHONPATH"), package, os.environ.get("PYTHONPATH")]
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    # -m looks in the current folder first: a checkout there may lack the native kernels that the
    # installed package has, whose last digits are others.
    with tempfile.TemporaryDirectory() as empty:
        return subprocess.run(
            [sys.executable, *map(str, arguments)],
            env={**os.environ, **variables},
            cwd=empty,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )


@pytest.fixture(scope="session")
def run_python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs Python with arguments, and the package under test, in a process of its own.

    Keywords are environment variables; PYTHONPATH comes before the package's folder.
    """
    return _run_python


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> str:
    """A device beside a host without any: tensors there have no numbers, but copies are seen.

    Reading from it fails. Pinned memory is marked as such, and generators claim to be there.
    """
    import torch

    from magsd.data import loader

    pinned: dict[int, torch.Tensor] = {}

    def pin_memory(values: torch.Tensor) -> torch.Tensor:
        copy = values.clone()
        pinned[id(copy)] = copy
        return copy

    class Generator(torch.Generator):
        device = torch.device("meta")

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda values: id(values) in pinned)
    monkeypatch.setattr(torch, "Generator", lambda device: Generator())
    monkeypatch.setattr(torch, "autocast", lambda device, **_: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1 << 40, 1 << 40))
    monkeypatch.setattr(loader, "PINNED_FOR", frozenset(("meta",)))
    return "meta"
