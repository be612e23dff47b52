"""Checkpoints: whole or absent, and never silently wrong."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from magsd.errors import RunError
from magsd.outputs import disk_errors, is_disk_full, remove_leftovers, write_atomically
from magsd.training import checkpoint
from magsd.training.checkpoint import (
    all_finite,
    load_checkpoint,
    load_weights,
    random_state,
    save_checkpoint,
    set_random_state,
)


def payload(value: float = 1.0, size: int = 1000) -> dict[str, object]:
    return {"model": {"w": torch.full((size,), value)}, "epoch": 3, "classes": ["a", "b"]}


def test_round_trip_with_weights_only(tmp_path: Path) -> None:
    path = tmp_path / "c" / "last.pt"
    save_checkpoint(path, payload(2.0))
    loaded = load_checkpoint(path)
    assert torch.equal(loaded["model"]["w"], torch.full((1000,), 2.0))
    assert (loaded["epoch"], loaded["classes"]) == (3, ["a", "b"])
    assert torch.load(path, weights_only=True)["epoch"] == 3
    assert [p.name for p in path.parent.iterdir()] == ["last.pt"]


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no checkpoint at"):
        load_checkpoint(tmp_path / "last.pt")


def truncate(data: bytes) -> bytes:
    return data[: len(data) // 2]


def flip_a_bit_of_a_weight(data: bytes) -> bytes:
    place = data.index(torch.full((8,), 1.0).numpy().tobytes()) + 100
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


@pytest.mark.parametrize(
    "damage",
    [truncate, flip_a_bit_of_a_weight, lambda data: b"", lambda data: b"not a checkpoint" * 99],
    ids=["truncated", "bit flipped", "empty", "other"],
)
def test_corrupt_is_named(tmp_path: Path, damage) -> None:
    path = tmp_path / "last.pt"
    save_checkpoint(path, payload())
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(RunError, match=r"corrupt checkpoint .*last\.pt.*--overwrite"):
        load_checkpoint(path)


def test_someone_elses_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    torch.save({"weights": torch.ones(3)}, path)
    with pytest.raises(RunError, match="not a checkpoint of this project"):
        load_checkpoint(path)


class Harmful:
    """A pickle that would run a command."""

    def __reduce__(self):
        return os.system, ("true",)


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    torch.save({"format": 1, "model": Harmful()}, path)
    with pytest.raises(RunError, match="corrupt checkpoint"):
        load_checkpoint(path)


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="does not fit the run's model"):
        load_weights(nn.Linear(3, 2), nn.Linear(4, 2).state_dict(), tmp_path / "best.pt")


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    save_checkpoint(path, payload(1.0))

    def fail(file) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, fail)
    assert load_checkpoint(path)["model"]["w"][0] == 1.0
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def test_synced_before_it_takes_the_name(tmp_path: Path, monkeypatch) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append("fsync"), fsync(fd))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("replace"), replace(a, b))[1])
    save_checkpoint(tmp_path / "last.pt", payload())
    assert calls[:2] == ["fsync", "replace"]


WRITER = """
import sys, torch
from pathlib import Path
from magsd.training.checkpoint import save_checkpoint
number = 0
while True:
    number += 1
    save_checkpoint(Path(sys.argv[1]), {"model": {"w": torch.full((500_000,), float(number))}})
"""


def test_kill_at_any_instant_leaves_a_loadable_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    for delay in (0.0, 0.013, 0.057):
        packages = Path(checkpoint.__file__).parents[2]
        child = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], cwd=packages)
        try:
            seen = path.stat().st_mtime_ns if path.exists() else 0
            deadline = time.monotonic() + 120
            while not path.exists() or path.stat().st_mtime_ns == seen:
                assert child.poll() is None, "the writer ended by itself"
                assert time.monotonic() < deadline
                time.sleep(0.001)
            time.sleep(delay)
        finally:
            child.send_signal(signal.SIGKILL)
            child.wait()
        weights = load_checkpoint(path)["model"]["w"]
        assert weights[0] >= 1
        assert torch.equal(weights, weights[:1].expand_as(weights))
    remove_leftovers(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def raise_no_space(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_full_disk_while_syncing(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "last.pt"
    save_checkpoint(path, payload(1.0))
    monkeypatch.setattr(os, "fsync", raise_no_space)
    with (
        pytest.raises(RunError, match=r"disk is full.*MiB free under.*make room"),
        disk_errors(tmp_path, "make room"),
    ):
        save_checkpoint(path, payload(2.0))
    monkeypatch.undo()
    assert load_checkpoint(path)["model"]["w"][0] == 1.0
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def test_a_disk_that_is_really_full(small_disk) -> None:
    tiny_disk = small_disk(megabytes=1)
    path = tiny_disk / "last.pt"
    save_checkpoint(path, payload(1.0))
    with (
        pytest.raises(RunError, match="disk is full"),
        disk_errors(tiny_disk, "make room"),
    ):
        save_checkpoint(path, payload(2.0, size=1_000_000))
    assert load_checkpoint(path)["model"]["w"][0] == 1.0
    assert [p.name for p in tiny_disk.iterdir()] == ["last.pt"]


def test_other_errors_pass_unchanged(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), disk_errors(tmp_path, ""):
        raise PermissionError(errno.EACCES, "no")
    with pytest.raises(RuntimeError, match="other"), disk_errors(tmp_path, ""):
        raise RuntimeError("other")


def test_wrapped_no_space_is_recognized() -> None:
    wrapped = RuntimeError("writer failed")
    wrapped.__cause__ = OSError(errno.EDQUOT, "quota")
    assert is_disk_full(wrapped)
    assert not is_disk_full(RuntimeError("writer failed"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_spoilt_values_are_found_in_weights_buffers_and_optimizer(value: float) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.randn(4, 2)).sum().backward()
    optimizer.step()
    assert all_finite(model, optimizer)
    model[1].running_mean[0] = value
    assert not all_finite(model, optimizer)
    model[1].running_mean[0] = 0
    model[0].weight.data[0, 0] = value
    assert not all_finite(model, optimizer)
    model[0].weight.data[0, 0] = 0
    next(iter(optimizer.state.values()))["momentum_buffer"].view(-1)[0] = value
    assert not all_finite(model, optimizer)


def test_random_state_goes_through_a_checkpoint(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "last.pt", {**payload(), "random": random_state()})
    expected = torch.rand(5)
    torch.rand(7)
    set_random_state(load_checkpoint(tmp_path / "last.pt")["random"])
    assert torch.equal(torch.rand(5), expected)
