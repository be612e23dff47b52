"""`pytest benchmarks`: options, and one test per group and member."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import SkipTest

import pytest
import torch

from benchmarks.harness.device import Device
from benchmarks.harness.pieces import AGAIN
from benchmarks.harness.session import Entry, Recorder, Session
from benchmarks.harness.sizes import PRECISIONS
from magsd_kernels import environment

_SESSION = pytest.StashKey[Session]()
#: Not for pytest, and some with needs of their own: the train extra.
collect_ignore = ["harness", "reporting", "published_step.py", "scaling.py", "train_step.py"]


def pytest_addoption(parser: pytest.Parser) -> None:
    add = parser.getgroup("magsd", "benchmarks of magsd_kernels").addoption
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--quick", action="store_true", help="small sizes, few rounds: does it work?")
    add("--seconds", type=float, help="of timing per group (default: 6 on a CPU, 2 on a GPU)")
    add("--batches", type=_listed, default=[], help="such as 16,64,256, not the default ones")
    add("--precisions", type=_listed, default=[], help=f"of {','.join(PRECISIONS)}")
    add("--max-autotune", action="store_true", help="on a GPU, of the central rows: takes minutes")
    add("--rows", type=Path, metavar="FOLDER", help="a file per row; rows with one are left out")
    add("--again", action="store_true", help="measure rows that failed once more")
    add("--central", action="store_true", help="MAG-SD's central operations alone")


def _listed(text: str) -> list[str]:
    return [part for part in text.split(",") if part]


def pytest_configure(config: pytest.Config) -> None:
    if environment.value(environment.BACKEND):
        raise pytest.UsageError(f"{environment.BACKEND} is set: benchmarks name their backends")
    option = config.option
    device = option.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    # A GPU has more sizes to measure, and less noise.
    seconds = 0.3 if option.quick else 6.0 if device == "cpu" else 2.0
    config.stash[_SESSION] = Session(
        Device(device),
        seconds=option.seconds or seconds,
        batches=[int(batch) for batch in option.batches] or ([4] if option.quick else []),
        precisions=option.precisions,
        quick=option.quick,
        autotuned=option.max_autotune,
        folder=option.rows,
        again=option.again,
        central=option.central,
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test for each member of the groups that have no file yet."""
    if "entry" not in metafunc.fixturenames:
        return
    session = metafunc.config.stash[_SESSION]
    entries = [
        pytest.param(
            Entry(group, member),
            id=f"{group}-{member}",
            marks=pytest.mark.benchmark(group=str(group), timer=session.clock.read),
        )
        for group in filter(session.wants, metafunc.module.groups(session))
        for member in group.members()
    ]
    metafunc.parametrize("entry", entries)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Rows first, in the order of worth, then the rest."""
    items.sort(key=lambda item: item.path.stem != "comparison")


@pytest.fixture
def record(request: pytest.FixtureRequest, benchmark: Any) -> Recorder:
    """The first call for a group measures all its collected members."""
    session = request.config.stash[_SESSION]

    def record(entry: Entry) -> None:
        specs = [item.callspec for item in request.session.items if hasattr(item, "callspec")]
        entries = [spec.params.get("entry") for spec in specs]
        # pytest makes an item without an entry where a file has none to measure.
        others = [e for e in entries if isinstance(e, Entry) and e.group is entry.group]
        outcome = session.outcomes(entry.group, [e.member for e in others])[entry.member]
        if isinstance(outcome.error, SkipTest):
            pytest.skip(str(outcome.error))
        if outcome.error is not None:
            if session.folder is not None and _broke_the_device(outcome.error):
                pytest.exit(str(outcome.error), AGAIN)
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


def _broke_the_device(error: Exception) -> bool:
    """After an error of a kernel nothing runs on the device in the same process."""
    text = str(error)
    broken = "CUDA error" in text or "Triton Error [CUDA]" in text
    return broken and "out of memory" not in text
