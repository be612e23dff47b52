"""From saved JSON to a report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib", reason="needs the bench extra")

from benchmarks import report, run
from benchmarks.harness.sizes import RESNET50
from benchmarks.reporting.tables import fit
from benchmarks.reporting.text import memory, seconds

MACHINE = {"machine": "cpu-avx2", "processor": "a processor", "threads": "2", "torch": "2.14"}
GPU = {**MACHINE, "machine": "h200", "gpu": "a GPU"}


def entry(median: float, **facts: Any) -> dict[str, Any]:
    stats = {"min": 0.9 * median, "q1": 0.95 * median, "median": median, "q3": 1.1 * median}
    return {"name": "-", "stats": {**stats, "rounds": 5}, "extra_info": facts}


def competitor(member: str, median: float, ours: bool = False, **facts: Any) -> dict[str, Any]:
    settings = {
        "kind": "comparison",
        "function": "attention_views",
        "operation": "attention_augment",
        "network": "magsd",
        "batch": 16,
        "precision": "float32",
        "direction": "forward",
    }
    return entry(median, member=member, ours=ours, **(settings | facts))


def save(
    path: Path, *entries: dict[str, Any], machine: dict[str, str] = MACHINE, second: int = 5
) -> Path:
    saved = {
        "machine_info": machine,
        "commit_info": {"id": "0123456789abcdef", "dirty": False},
        "datetime": f"2026-01-02T03:04:{second:02}",
        "benchmarks": list(entries),
    }
    path.write_text(json.dumps(saved))
    return path


def lines(tmp_path: Path, *paths: Path) -> list[str]:
    return report.write(paths, tmp_path / "out").read_text().splitlines()


def test_ratios_targets_and_charts(tmp_path):
    speedup = {"published": [19, 20, 21], "eager": [9, 10, 11], "limit": [0.4, 0.5, 0.6]}
    growth = [
        entry(
            1e-3 + 2e-3 * batch,
            kind="growth",
            function="attention_views",
            direction="forward",
            axis="batch",
            amount=batch,
            member=str(batch),
            memory=1024 * batch,
        )
        for batch in (8, 1, 2, 4)
    ]
    overhead = [
        entry(2e-6, kind="overhead", direction="forward", member="torch.lerp"),
        entry(
            2e-5,
            kind="overhead",
            direction="forward",
            member="sample_attention",
            times_baseline=[9, 10, 11],
        ),
    ]
    saved = save(
        tmp_path / "a.json",
        competitor("published", 0.1, memory=3 << 20),
        competitor("eager", 0.05),
        competitor("cpu", 0.005, ours=True, memory=1 << 20, speedup=speedup),
        competitor("limit", 0.0025),
        *overhead,
        *growth,
    )
    found = lines(tmp_path, saved)
    work = "| attention_views forward, magsd B 16 float32"
    assert f"{work} | >= 15x published | 20x (19 to 21) | met |" in found
    assert f"{work} | >= 15x eager | 10x (9 to 11) | **not met** |" in found
    assert any("soft_distance" in line and "not measured" in line for line in found)
    assert (
        "| magsd B 16 float32 | forward | 100 ms, 3 MiB | 50 ms | **5 ms, 1 MiB** | 2.5 ms |"
        in found
    )
    assert "| magsd B 16 float32 | forward | 20x (19 to 21) | 10x (9 to 11) | 50% |" in found
    assert any(line.startswith("| sample_attention | 20 µs | 10x (9 to 11)") for line in found)
    assert not any("torch.lerp" in line and "met" in line for line in found)  # no target
    line = "| attention_views | forward | B 1 to 8 | 1 ms + 2 ms per image | 0% "
    assert f"{line}| 1 KiB per image | 0% |" in found
    text = "\n".join(found)
    for fact in ("a processor", "2.14", "2026-01-02, commit 0123456789ab"):
        assert fact in text
    for chart in ("attention_augment.png", "growth.png"):
        assert f"({chart})" in text
        assert (tmp_path / "out" / chart).read_bytes().startswith(b"\x89PNG")


def row(tmp_path: Path, **speedup: list[float]) -> Path:
    ours = competitor("cpu", 1.0, ours=True, speedup=speedup)
    others = [competitor(name, 2.0) for name in speedup]
    return save(tmp_path / "row.json", ours, *others)


def test_strictly_every_rival_counts_by_its_lower_quartile(tmp_path, capsys):
    near = row(tmp_path, eager=[1.1, 1.2, 1.3], grid_sample=[1.09, 1.5, 2.0], limit=[0.1] * 3)
    assert report.main([str(near)]) == 0
    capsys.readouterr()
    assert report.main([str(near), "--strict"]) == 1
    (line,) = (x for x in capsys.readouterr().out.splitlines() if x.startswith("short"))
    size = "attention_views forward, magsd B 16 float32"
    assert line == f"short of 1.1x: {size}: 1.5x (1.09 to 2) grid_sample"
    work = "| every row | >= 1.1x every rival (lower quartile) | 0 of 1 rows; least: "
    found = lines(tmp_path, near)
    assert f"{work}{size}: 1.5x (1.09 to 2) grid_sample | **not met** |" in found
    # Another backend of ours is no rival, nor is the limit.
    ahead = row(tmp_path, eager=[1.1, 1.2, 1.3], triton=[0.5] * 3, limit=[0.1] * 3)
    assert report.main([str(ahead), "--strict"]) == 0
    assert any(" | 1 of 1 rows; " in line and line.endswith("| met |") for line in
               lines(tmp_path, ahead))  # fmt: skip


@pytest.mark.parametrize(
    ("stem", "text"), [(2, "2x | met"), (0.5, "1.25x | **not met**"), (None, " | not measured")]
)
def test_batch_norms_count_as_often_as_the_network_has_them(stem, text, tmp_path):
    """Twice as long each; that of the stem takes ours as long as all others together."""
    facts = {"operation": "batch_norm_act", "direction": "forward+backward", "ours": True}
    entries = []
    for after, norms in RESNET50.items():
        for network, count in norms.items():
            first = network.name == "resnet50-64x112"
            times = stem if first else 2
            size = {"function": f"batch_norm_act {after}", "network": network.name}
            speedup = {"published": [times] * 3}
            seconds = 15.0 if first else 1 / count
            if times is not None:
                entries.append(competitor("cpu", seconds, **facts, **size, speedup=speedup))
    found = lines(tmp_path, save(tmp_path / "a.json", *entries))
    work = "| batch_norm_act forward+backward, ResNet-50's, B 16 float32 | >= 1.5x published |"
    assert [line for line in found if line.startswith(f"{work} {text} |")]


@pytest.mark.parametrize("entries", [[], [competitor("eager", 1.0)]], ids=["no row", "not ours"])
def test_strictly_something_must_have_been_compared(entries, tmp_path):
    assert report.main([str(save(tmp_path / "a.json", *entries)), "--strict"]) == 1


def test_on_a_gpu_kernel_time_and_launches_decide(tmp_path):
    def kernel(microseconds: float) -> list[float]:
        return [microseconds * 1e-6] * 3

    views = {"batch": 256}
    pool = {
        "function": "bilinear_attention_pool",
        "operation": "bilinear_pool",
        "batch": 256,
        "precision": "bfloat16",
    }
    both = pool | {"direction": "forward+backward"}
    saved = save(
        tmp_path / "gpu.json",
        competitor("compiled", 1e-3, kernel=kernel(300), launches=6, waits=0, **views),
        competitor(
            "cuda", 1e-3, ours=True, kernel=kernel(100), launches=1, waits=0,
            speedup={"published": [900, 950, 1100]}, **views,
        ),
        competitor("limit", 90e-6, **views),
        competitor("compiled", 1e-3, kernel=kernel(100), launches=6, waits=0, **pool),
        competitor("cuda", 1e-3, ours=True, kernel=kernel(50), launches=1, waits=0, **pool),
        competitor("compiled", 1e-3, kernel=kernel(250), launches=6, waits=0, **both),
        competitor("cuda", 1e-3, ours=True, kernel=kernel(150), launches=1, waits=0, **both),
        machine=GPU,
    )  # fmt: skip
    found = lines(tmp_path, saved)
    work = "| attention_views forward, magsd B 256 float32"
    assert f"{work} | >= 85% of the limit | 90% | met |" in found
    assert f"{work} | >= 1000x published | 950x (900 to 1.1e+03) | **not met** |" in found
    assert f"{work} | >= 2x compiled (kernel time) | 3x | met |" in found
    backward = "| bilinear_attention_pool backward, magsd B 256 bfloat16"
    assert f"{backward} | >= 2x compiled (kernel time) | 1.5x | **not met** |" in found
    assert "| magsd B 256 float32 | forward | cuda | 100 µs | 90% | 1 | 0 |" in found


def test_runs_of_one_machine_are_joined_and_the_last_counts(tmp_path):
    first = save(tmp_path / "1.json", competitor("cpu", 1.0, ours=True), competitor("eager", 3.0))
    second = save(tmp_path / "2.json", competitor("cpu", 2.0, ours=True))
    assert "| magsd B 16 float32 | forward | **2 s** | 3 s |" in lines(tmp_path, first, second)
    other = save(tmp_path / "3.json", competitor("cpu", 2.0), machine=GPU)
    with pytest.raises(ValueError, match="another machine"):
        lines(tmp_path, first, other)


def test_fit_and_how_far_the_farthest_point_is():
    fixed, slope, off = fit([1, 2, 4, 8], [3.0, 5.0, 9.0, 17.0])
    assert (fixed, slope) == (pytest.approx(1), pytest.approx(2))
    assert off < 1e-9
    # Quadratic growth shows.
    assert fit([1, 2, 4, 8, 16], [1.0, 4.0, 16.0, 64.0, 256.0])[2] > 0.5


@pytest.mark.parametrize(
    ("value", "text"), [(1.2345, "1.23 s"), (0.9999, "1000 ms"), (3e-5, "30 µs"), (5e-8, "50 ns")]
)
def test_seconds(value, text):
    assert seconds(value) == text


@pytest.mark.parametrize(("value", "text"), [(12, "12 B"), (1536, "1.5 KiB"), (3 << 20, "3 MiB")])
def test_memory(value, text):
    assert memory(value) == text


@pytest.mark.parametrize("part", [False, True])
def test_a_part_does_not_replace_the_whole(part, tmp_path, monkeypatch, capsys):
    entries = [competitor("eager", 3.0), competitor("cpu", 1.0, ours=True)]

    def measure(arguments):
        (rows,) = (Path(a.partition("=")[2]) for a in arguments if a.startswith("--rows="))
        save(rows / "b.json", entries[0], second=1)
        save(rows / "a.json", entries[1], second=2)
        return 0

    monkeypatch.setattr(run, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(run, "folder", lambda device: "cpu-avx2")
    monkeypatch.setattr(run.pytest, "main", measure)
    assert run.main(["--device=cpu", *(["-k", "views"] if part else [])]) == 0
    results = tmp_path / "results" / "cpu-avx2"
    assert (results / "report.md").is_file() == (not part)
    if not part:
        found = json.loads((results / "results.json").read_text())
        assert found["machine_info"] == MACHINE
        assert found["benchmarks"] == entries
    assert ("# Benchmarks: cpu-avx2" in capsys.readouterr().out) == part
