"""Stages of the evidence: their order, what they need, and that a small run can be continued."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("pytest_benchmark", reason="needs the bench extra")

from benchmarks import evidence, probe
from benchmarks.evidence import STAGES, Plan
from benchmarks.harness.pieces import AGAIN, Piece
from magsd_kernels import native

ROOT = Path(__file__).parents[2]
#: What a rented machine may lack.
MISSING = ("expecttest", "pydicom", "webdataset")
BLOCKER = f"""
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {MISSING!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocker())
"""


def stage(name: str, tmp_path: Path, *options: str) -> list[Piece]:
    parsed = evidence.parse([f"--out={tmp_path}", *options])
    return STAGES[name](Plan(parsed, tmp_path / "work" / "h100"))


def test_stages_are_in_order_of_worth():
    assert list(STAGES)[:7] == [
        "build",
        "native",
        "triton",
        "sanitizer",
        "step16",
        "central",
        "ncu",
    ]
    assert list(STAGES).index("step16") < list(STAGES).index("step64")


def test_stages_of_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(evidence.shutil, "which", lambda name, path=None: f"/tools/{name}")
    gpu = "--device=cuda"
    files = {piece.name for piece in stage("native", tmp_path, gpu)}
    assert {"test_bilinear_pool", "test_compile", "test_attention_views"} <= files
    for name, target in (("native", "cuda-cuda"), ("triton", "triton-cuda")):
        for piece in stage(name, tmp_path, gpu):
            assert piece.command[-3:-1] == ("-k", target)
            assert piece.limit < 600
    sanitized = stage("sanitizer", tmp_path, gpu)
    assert len(sanitized) == 8
    assert {piece.command[:3] for piece in sanitized} == {
        ("/tools/compute-sanitizer", "--tool", "memcheck"),
        ("/tools/compute-sanitizer", "--tool", "racecheck"),
    }
    assert not any(piece.absent for piece in sanitized)
    assert {piece.command[0] for piece in stage("ncu", tmp_path, gpu)} == {"/tools/ncu"}
    (central, report) = stage("central", tmp_path, gpu)
    assert {"--central", "--batches=256"} <= set(central.command)
    assert "--max-autotune" not in central.command
    assert report.repeated
    assert "--max-autotune" in stage("central", tmp_path, gpu, "--max-autotune")[0].command
    for batch in (16, 64):
        (step,) = stage(f"step{batch}", tmp_path, gpu)
        assert f"--batch={batch}" in step.command
    options = (gpu, "--data=csv:x.csv", "--weights=w.safetensors")
    for name, pretrained in (("lite0", "w.safetensors"), ("resnet50", "false")):
        (piece,) = stage(name, tmp_path, *options)
        wanted = {f"model.pretrained={pretrained}", "precision=bfloat16", "--data=csv:x.csv"}
        assert wanted <= set(piece.command)


def test_what_cannot_run_says_why(tmp_path, monkeypatch):
    for name in ("sanitizer", "ncu"):
        assert {p.absent for p in stage(name, tmp_path, "--device=cpu")} == {"needs a GPU"}
    monkeypatch.setattr(evidence.shutil, "which", lambda name, path=None: None)
    (reason,) = {piece.absent for piece in stage("ncu", tmp_path, "--device=cuda")}
    assert reason == "there is no ncu"
    assert stage("lite0", tmp_path)[0].absent == "--data names no images"


def test_the_command_ends_with_its_deadline_and_goes_on(tmp_path, monkeypatch, capsys):
    count = tmp_path / "count"
    commands = {"quick": "exit 0"}

    def stage(plan: Plan) -> list[Piece]:
        return [Piece("one", name, ("/bin/sh", "-c", text)) for name, text in commands.items()]

    monkeypatch.setattr(evidence, "STAGES", {"one": stage})
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "out"
    command = ["--device=cpu", "--out=out"]
    assert evidence.main([*command, "--deadline=300"]) == 0
    commands["slow"] = f"echo >> {count}; sleep 600"
    assert evidence.main([*command, "--deadline=3"]) == AGAIN
    assert "| one | slow | cut |" in (out / "evidence.md").read_text()
    commands["slow"] = f"echo >> {count}"
    assert evidence.main([*command, "--deadline=300"]) == 0
    assert "| one | slow | passed |" in (out / "evidence.md").read_text()
    assert capsys.readouterr().out.count("one/quick: passed") == 1
    assert count.read_text() == "\n\n"
    assert sorted(path.name for path in out.iterdir()) == ["evidence.md", "evidence.zip"]
    with zipfile.ZipFile(out / "evidence.zip") as packed:
        assert json.loads(packed.read("one/slow.json"))["commit"]


@pytest.mark.slow
def test_the_tests_of_the_operations_need_nothing_that_a_rented_machine_lacks(tmp_path):
    (tmp_path / "blocker.py").write_text(BLOCKER)
    paths = [str(tmp_path), os.environ.get("PYTHONPATH", "")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "blocker", "-p", "no:cacheprovider"]
    done = subprocess.run(  # all are collected, and one that looks into torch is run
        [*command, "tests/kernels", "-k", "opcheck and reference and ::sample_attention"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        timeout=500,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(native.why_not("cpu") is not None, reason="needs the C++ kernels")
def test_a_probe_calls_our_kernel(capfd):
    assert probe.main(["soft_distance_loss", "--device=cpu"]) == 0
    assert capfd.readouterr().out == "soft_distance_loss-magsd-b2-float32-forward+backward: cpu\n"
    assert probe.main(["soft_distance_loss", "--device=cpu", "--backend=reference"]) == 1


@pytest.mark.parametrize("why", [None, "not built"])
def test_a_library_that_does_not_load_is_built_and_looked_at_again(why, tmp_path, monkeypatch):
    monkeypatch.setattr(evidence.native, "why_not", lambda backend: why)
    build, look = stage("build", tmp_path, "--device=cpu")
    assert build.command[1:] == ("setup.py", "build_ext", "--inplace")
    assert build.absent == ("" if why else "the library loads")
    assert build.repeated
    assert look.repeated
    assert not look.absent
