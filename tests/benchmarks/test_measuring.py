"""What is timed was checked, competitors take turns, and the numbers read off are right."""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from benchmarks import comparison, published, run
from benchmarks.comparison import Comparison
from benchmarks.harness import machine
from benchmarks.harness.contender import WrongResult
from benchmarks.harness.device import Device, count_activity
from benchmarks.harness.machine import RESTRICTIONS, describe, restricted
from benchmarks.harness.session import Session
from benchmarks.harness.sizes import MAGSD
from benchmarks.harness.subject import Row
from benchmarks.harness.timing import interleave, quartiles
from benchmarks.operations import SUBJECT

ROOT = Path(__file__).parents[2]
LOSS = SUBJECT["soft_distance_loss"]
#: Thresholds of mix-up, dim and patch.
VIEWS = ((0.4, 0.6), (0.2, 0.5), (0.4, 0.6))
MACHINE = """
import json, sys
from benchmarks.harness.device import Device
from benchmarks.harness.machine import describe
json.dump(describe(Device("cpu"), "a processor"), sys.stdout)
"""


def cpu_session() -> Session:
    return Session(Device("cpu"), seconds=0.01, quick=True)


def row_of(subject, network=MAGSD, batch=2, backward=False) -> Row:
    return Row(subject, network, batch, "float32", "cpu", backward)


@pytest.mark.parametrize("backward", [False, True])
def test_a_wrong_competitor_is_found_and_not_timed(backward):
    def wrong(**arguments):
        loss = published.soft_distance_loss(**arguments)
        # Right, but for its gradient.
        return loss + (loss - loss.detach()) if backward else 1.001 * loss

    subject = replace(LOSS, published=wrong)
    group = Comparison(row_of(subject, backward=backward))
    outcomes = group.measure(("published", "eager", "limit"), cpu_session())
    assert isinstance(outcomes["published"].error, WrongResult)
    assert outcomes["published"].samples is None
    assert outcomes["eager"].error is None
    assert set(outcomes["eager"].facts["speedup"]) == {"limit"}
    assert len(outcomes["eager"].samples.seconds) >= 5


def test_a_competitor_that_gives_nan_is_wrong():
    subject = replace(LOSS, published=lambda **_: torch.tensor(float("nan")))
    outcomes = Comparison(row_of(subject)).measure(("published",), cpu_session())
    assert isinstance(outcomes["published"].error, WrongResult)


def test_the_run_fails_with_a_wrong_competitor(tmp_path, monkeypatch, capsys):
    """Through pytest and pytest-benchmark; what was right is saved and reported."""

    def wrong(**arguments):
        return 1.001 * published.soft_distance_loss(**arguments)

    monkeypatch.setattr(comparison, "SUBJECTS", (replace(LOSS, published=wrong),))
    for name in [n for n in os.environ if n.startswith(("MAGSD_", "PYTEST_XDIST"))]:
        monkeypatch.delenv(name)
    out = tmp_path / "run" / "results.json"
    chosen = "soft_distance_loss-magsd and not compiled"
    options = ["--device=cpu", "--quick", "--seconds=0.01", "-k", chosen, f"--out={out}"]
    assert (
        run.main([*options, "-p", "no:cacheprovider", "-p", "no:unraisableexception"])
        == pytest.ExitCode.TESTS_FAILED
    )
    said = capsys.readouterr().out
    assert "2 failed" in said
    assert "WrongResult: soft_distance_loss-magsd-b4-float32-forward, published" in said
    entries = json.loads(out.read_text())["benchmarks"]
    members = Counter(entry["extra_info"]["member"] for entry in entries)
    assert members["eager"] == members["limit"] == 2
    assert "published" not in members
    for entry in entries:
        assert entry["stats"]["min"] <= entry["stats"]["median"] <= entry["stats"]["q3"]
        assert "data" not in entry["stats"]
    assert "| magsd B 4 float32 | forward+backward |" in (out.parent / "report.md").read_text()
    assert (out.parent / "soft_distance.png").is_file()


def test_competitors_take_turns_in_changing_order():
    called: list[str] = []
    competitors = {
        name: [lambda name=name: called.append(name)] for name in ("first", "second", "third")
    }
    samples = interleave(competitors, lambda: called.append("|"), seconds=0, sample_seconds=0)
    assert {len(s.seconds) for s in samples.values()} == {5}
    # Each sample is one untimed and one timed call, each between two waits for the device.
    turns = [part for part in "".join(c[0] for c in called).split("|") if part][-30:]
    rounds = ["".join(turns[i : i + 6 : 2]) for i in range(0, 30, 6)]
    assert turns[::2] == turns[1::2]
    assert all(sorted(order) == ["f", "s", "t"] for order in rounds)
    assert len(set(rounds)) > 1


def test_input_sets_take_turns():
    used: list[int] = []
    calls = [lambda i=i: used.append(i) for i in range(3)]
    interleave({"one": calls}, lambda: None, seconds=0, sample_seconds=0)
    assert used == [i % 3 for i in range(len(used))]


def test_quartiles():
    assert quartiles([4.0, 1.0, 3.0, 2.0, 5.0]) == (2.0, 3.0, 4.0)
    assert quartiles([7.0]) == (7.0, 7.0, 7.0)


def test_peak_memory_counts_what_is_freed_before_the_end():
    def call():
        scratch = torch.empty(3 << 20, dtype=torch.uint8)
        del scratch
        return torch.empty(1 << 20, dtype=torch.uint8)

    assert 3 << 20 <= Device("cpu").peak_memory(call) < (3 << 20) + 4096


def test_launches_and_waits():
    names = [
        "aten::add",
        "cudaLaunchKernel",
        "cuLaunchKernelEx",
        "cudaMemsetAsync",
        "cudaMemcpyAsync",
        "cudaStreamSynchronize",
        "cudaDeviceSynchronize",  # the profiler's own
        "void at::native::elementwise_kernel",
    ]
    assert count_activity(names) == (4, 1)


def test_bytes_that_must_move():
    subject = SUBJECT["bilinear_attention_pool"]
    features, attention, matrix = 2048 * 49, 32 * 49, 32 * 2048
    for backward, wanted in (
        (False, features + attention + matrix),
        (True, 3 * (features + attention) + 2 * matrix),
    ):
        row = row_of(subject, backward=backward)
        assert row.moved_bytes(row.draw(0), torch.empty(2, matrix)) == 2 * 4 * wanted


def test_only_the_maps_that_an_index_names_must_be_read():
    row = row_of(SUBJECT["attention_boxes"], batch=3)
    index, theta, box = 8, 4, 16
    moved = row.moved_bytes(row.draw(0), torch.empty(3, 4, dtype=torch.int32))
    assert moved == 3 * (4 * 49 + index + theta + box)


@pytest.mark.parametrize(
    ("name", "ranges"), [("attention_views", VIEWS), ("attention_crop", VIEWS[:1])]
)
def test_no_pixel_lies_on_a_threshold(name, ranges):
    (network,) = SUBJECT[name].networks
    arguments = row_of(SUBJECT[name], network, batch=8).draw(0)
    size = (network.side, network.side)
    views = zip(*(arguments[n].view(8, -1).unbind(1) for n in ("index", "theta")), strict=True)
    for (index, theta), (low, high) in zip(views, ranges, strict=True):
        maps = arguments["attention"][torch.arange(8), index]
        upsampled = F.interpolate(
            maps[:, None].double(), size, mode="bilinear", align_corners=network.align_corners
        )
        threshold = theta * maps.amax((1, 2))
        gap = (upsampled[:, 0] / threshold[:, None, None] - 1).abs().amin((1, 2))
        assert gap.min() > 4e-6
        assert low - 0.01 < theta.min() < theta.max() < high + 0.01


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != "AVX512", reason="needs a processor with AVX-512"
)
def test_results_tell_a_restricted_processor_from_a_small_one(run_python):
    whole = describe(Device("cpu"), "a processor")
    assert whole["machine"] == "cpu-avx512"
    assert "instruction set" not in whole
    done = run_python("-c", MACHINE, **RESTRICTIONS["avx2"], PYTHONPATH=ROOT)
    less = json.loads(done.stdout)
    assert less["machine"] == "cpu-avx2"
    assert less["instruction set"].startswith("AVX-512 processor restricted to AVX2 (ATEN_CPU_")
    for name, value in RESTRICTIONS["avx2"].items():
        assert f"{name}={value}" in less["instruction set"]


def test_a_restricted_process_shares_no_compiled_code_and_is_not_restricted_twice(monkeypatch):
    for name in RESTRICTIONS["avx2"]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/cache")
    environment = restricted("avx2")
    assert environment["TORCHINDUCTOR_CACHE_DIR"] == "/cache-avx2"
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert restricted("avx2") is None


@pytest.mark.parametrize("runs", [("AVX2", "avx512"), ("AVX512", "avx2")], ids=str)
def test_one_side_alone_cannot_be_restricted(runs, monkeypatch):
    theirs, ours = runs
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: theirs)
    monkeypatch.setattr(machine.native, "why_not", lambda backend: None)
    monkeypatch.setattr(machine.native, "instruction_set", lambda: ours)
    with pytest.raises(ValueError, match="restrict both or none"):
        describe(Device("cpu"), "a processor")
