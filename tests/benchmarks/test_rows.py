"""Rows are saved one by one, each whole, and what is saved is not measured again."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib", reason="needs the bench extra")
pytest.importorskip("pytest_benchmark", reason="needs the bench extra")

from benchmarks import call_overhead, comparison, conftest, growth, report, run
from benchmarks.harness.device import Device
from benchmarks.harness.pieces import AGAIN
from benchmarks.harness.session import Outcome, Session
from benchmarks.harness.timing import Samples


class Group:
    """Two members; ours takes a second, or fails."""

    def __init__(self, name: str, error: Exception | None = None) -> None:
        self.name = name
        self.error = error
        self.measured = 0

    def __str__(self) -> str:
        return self.name

    def members(self):
        return ("eager", "cpu")

    def measure(self, members, session):
        self.measured += 1
        return {member: self._outcome(member) for member in members}

    def _outcome(self, member: str) -> Outcome:
        facts: dict[str, Any] = {
            "kind": "comparison", "function": self.name, "operation": "soft_distance",
            "network": "magsd", "batch": 16, "precision": "float32", "direction": "forward",
            "member": member, "ours": member == "cpu",
        }  # fmt: skip
        if member == "cpu":
            facts["speedup"] = {"eager": (2.0, 2.0, 2.0)}
            if self.error is not None:
                return Outcome(facts, error=self.error)
        return Outcome(facts, Samples([1.0, 2.0, 3.0], 1))


def measure(monkeypatch, rows, groups: list[Group], *options: str) -> int:
    """`python -m benchmarks.run`, were these groups all that there is."""
    monkeypatch.delenv("MAGSD_BACKEND", raising=False)
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    monkeypatch.setattr(comparison, "groups", lambda session: groups)
    # The plugin collects garbage again and again.
    fast = ["-p", "no:cacheprovider", "-p", "no:unraisableexception"]
    return run.main(["--device=cpu", f"--rows={rows}", "-k", "test_comparison", *fast, *options])


def test_rows_are_saved_and_not_measured_again(tmp_path, monkeypatch, capsys):
    first, second = Group("z"), Group("a")
    assert measure(monkeypatch, tmp_path / "rows", [first]) == 0
    (tmp_path / "rows" / "a.json.begun").write_text("half")
    assert measure(monkeypatch, tmp_path / "rows", [first, second]) == 0
    assert (first.measured, second.measured) == (1, 1)
    assert sorted(p.name for p in (tmp_path / "rows").iterdir()) == ["a.json", "z.json"]
    assert report.main([str(tmp_path / "rows"), f"--out={tmp_path / 'report'}"]) == 0
    text = (tmp_path / "report" / "report.md").read_text()
    assert "| magsd B 16 float32 | forward | 2x (2 to 2) |" in text
    assert text.index("### z") < text.index("### a")
    assert text.count("| run |") == 1


def test_a_file_with_nothing_to_measure_does_not_stop_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(growth, "groups", lambda session: [])
    chosen = ("-k", "test_comparison or test_growth")
    assert measure(monkeypatch, tmp_path, [Group("alone")], *chosen) == 0
    assert (tmp_path / "alone.json").is_file()


def test_a_competitor_that_failed_is_told_and_measured_again_on_request(tmp_path, monkeypatch):
    bad = Group("bad", ValueError("wrong by far"))
    for _ in range(2):
        assert measure(monkeypatch, tmp_path, [bad]) == 1
    assert bad.measured == 1
    saved = json.loads((tmp_path / "bad.json").read_text())
    assert saved["failed"] == {"cpu": "ValueError: wrong by far"}
    assert [entry["name"] for entry in saved["benchmarks"]] == ["eager"]
    bad.error = None
    assert measure(monkeypatch, tmp_path, [bad], "--again") == 0
    assert json.loads((tmp_path / "bad.json").read_text())["failed"] == {}


def test_after_an_error_of_the_device_another_process_goes_on(tmp_path, monkeypatch):
    broken = Group("broken", RuntimeError("CUDA error: an illegal memory access"))
    after = Group("after")
    assert measure(monkeypatch, tmp_path, [broken, after]) == AGAIN
    assert after.measured == 0
    assert measure(monkeypatch, tmp_path, [broken, after]) == 1
    assert (broken.measured, after.measured) == (1, 1)


@pytest.mark.parametrize("central", [False, True])
def test_central_rows_are_those_of_magsd(central):
    session = Session(Device("cpu"), 1.0, central=central)
    assert bool(growth.groups(session)) == bool(call_overhead.groups(session)) == (not central)
    found = set(map(str, comparison.groups(session)))
    assert {"bilinear_attention_pool-magsd-b16-float32-forward"} <= found
    others = {name for name in found if "wsdan" in name or "max" in name}
    assert bool(others) == (not central)


def test_what_pytest_collects_needs_no_train_extra():
    """Of what is imported by way of others, those that need it are kept out as well."""
    needing = {"timm", "magsd", *(Path(name).stem for name in conftest.collect_ignore)}
    needing = needing - {"harness", "reporting"} | {"steps"}
    for path in sorted(Path(conftest.__file__).parent.glob("*.py")):
        if path.name not in conftest.collect_ignore:
            words = re.findall(r"^(?:from|import) (.*)$", path.read_text(), re.MULTILINE)
            assert not needing & set(re.findall(r"\w+", " ".join(words))), path
