"""`pytest benchmarks`: options, one test per group and member, and what the saved JSON holds."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.harness.device import Device
from benchmarks.harness.machine import describe
from benchmarks.harness.recording import Entry, Recorder, rounded
from benchmarks.harness.session import Session
from benchmarks.harness.sizes import PRECISIONS
from magsd_kernels import environment

_SESSION = pytest.StashKey[Session]()
#: Not for pytest, and with needs of their own: the train extra.
collect_ignore = ["published_step.py", "train_step.py"]
_STATISTICS = ("min", "q1", "median", "q3", "rounds")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("magsd", "benchmarks of magsd_kernels")
    group.addoption("--device", choices=("auto", "cpu", "cuda"), default="auto")
    group.addoption("--quick", action="store_true", help="small sizes, few rounds: does it work?")
    group.addoption(
        "--seconds", type=float, help="of timing per group (default: 6 on a CPU, 2 on a GPU)"
    )
    group.addoption("--batches", help="such as 16,64,256, instead of the default ones")
    group.addoption("--precisions", help=f"of {','.join(PRECISIONS)}")
    group.addoption(
        "--max-autotune", action="store_true", help="on a GPU, of the central rows: takes minutes"
    )


def pytest_configure(config: pytest.Config) -> None:
    if environment.value(environment.BACKEND):
        raise pytest.UsageError(f"{environment.BACKEND} is set: benchmarks name their backends")
    device = config.getoption("--device")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    quick = config.getoption("--quick")
    batches = _listed(config, "--batches") or (["4"] if quick else [])
    config.stash[_SESSION] = Session(
        Device(device),
        seconds=config.getoption("--seconds") or _seconds(device, quick),
        batches=tuple(int(batch) for batch in batches) or None,
        precisions=tuple(PRECISIONS[name] for name in _listed(config, "--precisions")) or None,
        quick=quick,
        autotuned=config.getoption("--max-autotune"),
    )


def _listed(config: pytest.Config, option: str) -> list[str]:
    return [part for part in (config.getoption(option) or "").split(",") if part]


def _seconds(device: str, quick: bool) -> float:
    """A GPU has more sizes to measure, and less noise."""
    if quick:
        return 0.3
    return 6.0 if device == "cpu" else 2.0


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "entry" not in metafunc.fixturenames:
        return
    session = metafunc.config.stash[_SESSION]
    entries = [
        pytest.param(
            Entry(group, member),
            id=f"{group}-{member}",
            marks=pytest.mark.benchmark(group=str(group), timer=session.clock.read),
        )
        for group in metafunc.module.groups(session)
        for member in group.members()
    ]
    metafunc.parametrize("entry", entries)


@pytest.fixture
def record(request: pytest.FixtureRequest, benchmark: Any) -> Recorder:
    """Call it with the test's entry."""
    return Recorder(request.config.stash[_SESSION], benchmark, request.session.items)


def pytest_benchmark_update_machine_info(
    config: pytest.Config, machine_info: dict[str, Any]
) -> None:
    processor = machine_info.get("cpu", {}).get("brand_raw", machine_info.get("machine", ""))
    machine_info.clear()
    machine_info.update(describe(config.stash[_SESSION].device, processor))


def pytest_benchmark_update_json(output_json: dict[str, Any]) -> None:
    """Statistics, not samples; what is said once is not said per entry."""
    output_json["commit_info"] = {k: output_json["commit_info"].get(k) for k in ("id", "dirty")}
    output_json["benchmarks"] = [
        {
            "name": bench["name"],
            "stats": rounded({name: bench["stats"][name] for name in _STATISTICS}),
            "extra_info": rounded(bench["extra_info"]),
        }
        for bench in output_json["benchmarks"]
    ]
