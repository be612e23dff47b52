"""`pytest benchmarks`: options, one test per group and member, and what the saved JSON holds."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.harness.comparison import Comparison
from benchmarks.harness.device import Device
from benchmarks.harness.machine import describe, rounded
from benchmarks.harness.session import Entry, Recorder, Session
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
    # A GPU has more sizes to measure, and less noise.
    seconds = 0.3 if quick else 6.0 if device == "cpu" else 2.0
    config.stash[_SESSION] = Session(
        Device(device),
        seconds=config.getoption("--seconds") or seconds,
        batches=tuple(int(batch) for batch in batches) or None,
        precisions=tuple(_listed(config, "--precisions")) or None,
        quick=quick,
        autotuned=config.getoption("--max-autotune"),
    )


def _listed(config: pytest.Config, option: str) -> list[str]:
    return [part for part in (config.getoption(option) or "").split(",") if part]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The rows of a module's SUBJECTS, or its own groups."""
    if "entry" not in metafunc.fixturenames:
        return
    session, module = metafunc.config.stash[_SESSION], metafunc.module
    if hasattr(module, "groups"):
        groups = module.groups(session)
    else:
        groups = [Comparison(row) for row in session.rows(module.SUBJECTS)]
    entries = [
        pytest.param(
            Entry(group, member),
            id=f"{group}-{member}",
            marks=pytest.mark.benchmark(group=str(group), timer=session.clock.read),
        )
        for group in groups
        for member in group.members()
    ]
    metafunc.parametrize("entry", entries)


@pytest.fixture
def record(request: pytest.FixtureRequest, benchmark: Any) -> Recorder:
    """The first call for a group measures all its collected members."""
    session = request.config.stash[_SESSION]

    def record(entry: Entry) -> None:
        specs = [getattr(item, "callspec", None) for item in request.session.items]
        entries = [spec.params.get("entry") for spec in specs if spec is not None]
        members = [other.member for other in entries if other and other.group is entry.group]
        outcome = session.outcomes(entry.group, members)[entry.member]
        if outcome.absent is not None:
            pytest.skip(outcome.absent)
        if outcome.error is not None:
            raise outcome.error
        assert outcome.samples is not None
        seconds = iter(outcome.samples.seconds)
        benchmark.pedantic(
            session.clock.advance,
            setup=lambda: ((next(seconds),), {}),
            rounds=len(outcome.samples.seconds),
        )
        benchmark.extra_info.update(outcome.facts, iterations=outcome.samples.iterations)

    return record


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
