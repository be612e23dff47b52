"""The model of docs/scaling.md, its report, and what measures its constants."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from torch.distributed.run import main as torchrun

pytest.importorskip("timm", reason="needs the train extra")
pytest.importorskip("pytest_benchmark", reason="needs the bench extra")

from benchmarks.scaling import Constants, bandwidth_of, predict

ROOT = Path(__file__).parents[2]
DOCUMENTED = {8: 400e9, 64: 50e9, 1024: 50e9}


def documented_rows() -> list[tuple[float, ...]]:
    """The table of predictions in docs/scaling.md, without its last column."""
    lines = (ROOT / "docs" / "scaling.md").read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("| GPUs |"))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append(tuple(float(cell) for cell in line.strip("|").split("|")[:-1]))
    return rows


def test_the_documented_table_is_what_the_model_says() -> None:
    rows = documented_rows()
    assert len(rows) == 9
    for processes, images, *expected in rows:
        constants = Constants(102e6, 5, 7900, DOCUMENTED[int(processes)], 10e-6)
        cost = predict(constants, int(processes), int(images))
        found = (cost.compute, cost.exchange, cost.exposed, cost.step)
        assert [round(1e3 * value, 1) for value in found] == pytest.approx(expected, abs=0.051)


def test_bandwidth_explains_the_exchange_it_was_read_off() -> None:
    constants = Constants(102e6, 5, 100, 3e9, 20e-6)
    exchange = predict(constants, 4, 16).exchange
    assert bandwidth_of(exchange, 4, 102e6, 5, 20e-6) == pytest.approx(3e9)


@pytest.mark.slow
def test_two_processes_measure_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    torchrun(
        [
            *("--standalone", "--nproc-per-node=2", "-m", "benchmarks.scaling", "--device=cpu"),
            *("--images=2", "--backbone=test_resnet", "--side=64", "--rounds=1"),
            f"--out={tmp_path}",
        ]
    )
    saved = json.loads((tmp_path / "scaling.json").read_text())
    assert saved["processes"] == 2
    assert all(value > 0 for value in saved["measured"].values())
    assert predict(Constants(**saved["constants"]), 2, 2).compute == pytest.approx(
        saved["measured"]["alone"]
    )
    assert "| step with exchange |" in (tmp_path / "scaling.md").read_text()
