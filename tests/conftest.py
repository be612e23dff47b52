"""Fixtures for every test folder; among them a run small enough to train in a second."""

from __future__ import annotations

import contextlib
import fcntl
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

# The torch of a worker has one thread, and so have the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

SMALL = (
    "data.source=phantom:n=48,size=32",
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


def pytest_collection_finish() -> None:
    """What is alive now stays: looking for garbage among it takes a tenth of the tests' time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Folder with real radiographs and weights; tests that need it skip where it is absent."""
    path = Path(os.environ.get("MAGSD_SHARED", Path(__file__).parents[2] / "shared"))
    if not (path / "data" / "cxr3" / "labels.csv").is_file():
        pytest.skip(f"real radiographs not found under {path} (set MAGSD_SHARED)")
    return path


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A folder by a name, which `make(folder)` fills in one of all workers; the others wait."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent

    def folder_of(name: str, make: Callable[[Path], object]) -> Path:
        folder, done = root / name, root / f"{name}.done"
        with open(root / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)  # of a try that failed
                folder.mkdir()
                make(folder)
                done.touch()
        return folder

    return folder_of


@pytest.fixture(scope="session")
def cache_dir(made_once: Callable[..., Path]) -> Path:
    return made_once("cache", lambda folder: None)


@pytest.fixture(scope="session")
def small_pairs(cache_dir: Path) -> list[str]:
    """key=value pairs of the small run: three steps an epoch."""
    return [*SMALL, f"cache_dir={cache_dir}"]


Completed = subprocess.CompletedProcess[str]


def _environment(**variables: object) -> dict[str, str]:
    """Variables of a process that imports the package under test."""
    import magsd  # not where the kernels alone are installed

    given = {"COLUMNS": "200", "OMP_NUM_THREADS": "1"}
    given |= {name: str(value) for name, value in variables.items()}
    package = str(Path(magsd.__file__).parents[1])
    paths = [given.get("PYTHONPATH"), package, os.environ.get("PYTHONPATH")]
    return os.environ | given | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


@pytest.fixture(scope="session")
def run_python() -> Callable[..., Completed]:
    """Runs Python with arguments, and the package under test, in a process of its own.

    Keywords are environment variables; PYTHONPATH comes before the package's folder.
    """

    def run(*arguments: str | Path, **environment: object) -> Completed:
        # -m looks in the current folder first: a checkout there may lack the native kernels that
        # the installed package has, whose last digits are others.
        with tempfile.TemporaryDirectory() as empty:
            return subprocess.run(
                [sys.executable, *map(str, arguments)],
                env=_environment(**environment),
                cwd=empty,
                capture_output=True,
                text=True,
                timeout=300,
                check=False,
            )

    return run


class WarmPython:
    """Runs Python as `run_python` does, in forks of one process that has imported the package."""

    def __init__(self) -> None:
        self._server: subprocess.Popen[str] | None = None

    def __call__(self, *arguments: str | Path, **environment: object) -> Completed:
        if self._server is None:
            self._server = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("warm_python.py"))],
                env=_environment(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        with tempfile.TemporaryDirectory() as folder:
            outputs = {name: Path(folder, name) for name in ("stdout", "stderr")}
            empty = Path(folder, "empty")
            empty.mkdir()
            request = {
                "arguments": [*map(str, arguments)],
                "environment": {name: str(value) for name, value in environment.items()},
                "folder": str(empty),
                **{name: str(path) for name, path in outputs.items()},
            }
            try:
                print(json.dumps(request), file=self._server.stdin, flush=True)
                status = int(self._server.stdout.readline())
            except BaseException:  # a time limit, too
                self.stop()
                raise
            written = (outputs[name].read_text() for name in ("stdout", "stderr"))
            return subprocess.CompletedProcess([*arguments], status, *written)

    def stop(self) -> None:
        if self._server is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._server.pid, signal.SIGKILL)
            self._server.wait()
            self._server = None


@pytest.fixture(scope="session")
def warm_python() -> Iterator[WarmPython]:
    """Runs Python as `run_python` does, without the seconds of its imports."""
    python = WarmPython()
    yield python
    python.stop()


@pytest.fixture(scope="session")
def torchrun(warm_python: WarmPython) -> Callable[..., Completed]:
    """Runs a script in two processes; the options are torchrun's."""

    def run(
        script: str | Path, *arguments: str | Path, options: Sequence[str] = (), **variables: object
    ) -> Completed:
        launch = "from torch.distributed.run import main; main()"
        two = ["--standalone", "--nproc-per-node=2", "--run-path", "--start-method=fork"]
        return warm_python("-c", launch, *two, *options, script, *arguments, **variables)

    return run


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
