"""Every stage of the evidence runs, whatever became of the others, and leaves what it should."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("pytest_benchmark", reason="needs the bench extra")

from benchmarks import evidence
from benchmarks.evidence import Stage


def test_a_failed_stage_does_not_take_the_others_with_it(tmp_path: Path, monkeypatch) -> None:
    made, kept = tmp_path / "made.csv", tmp_path / "out" / "kept.csv"
    stages = [
        Stage("bad", ["-c", "raise SystemExit(3)"], {tmp_path / "never": tmp_path / "nowhere"}),
        Stage("good", ["-c", f"open({str(made)!r}, 'w').write('1')"], {made: kept}),
    ]
    monkeypatch.setattr(evidence, "stages", lambda options, out: stages)
    assert evidence.main(["--device=cpu", f"--out={tmp_path / 'out'}"]) == 1
    saved = json.loads((tmp_path / "out" / "evidence.json").read_text())
    assert [(s["name"], s["status"]) for s in saved["stages"]] == [("bad", 3), ("good", 0)]
    assert saved["stages"][0]["command"].startswith("python -c")
    assert kept.read_text() == "1"
    assert not (tmp_path / "nowhere").exists()
    assert evidence.main(["--device=cpu", f"--out={tmp_path}", "--only", "good"]) == 0


def test_stages_of_a_gpu_train_in_bfloat16_at_both_sizes(tmp_path: Path) -> None:
    options = evidence._options(["--device=cuda", "--data=csv:x.csv", "--weights=w.safetensors"])
    commands = {stage.name: stage.command for stage in evidence.stages(options, tmp_path)}
    assert list(commands) == ["operations", "training", "benchmarks", "step", "lite0", "resnet50"]
    assert commands["step"][-3:] == ["--batch", "16", "64"]
    for name, pretrained in (("lite0", "w.safetensors"), ("resnet50", "false")):
        assert {f"model.pretrained={pretrained}", "precision=bfloat16", "--data=csv:x.csv"} <= set(
            commands[name]
        )
