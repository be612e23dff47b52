"""What csrc/cuda keeps to without an operator that shows it: operands, counters, shared memory."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from torch.utils import cpp_extension

FOLDER = Path(__file__).parent
SOURCES = FOLDER.parents[2] / "csrc"
CASES = FOLDER / "rules.cu"
HOLD = (
    "product",
    "values_are_cut_in_two",
    "the_last_block_adds_up",
    "calls_that_may_meet_share_no_counter",
    "parts_have_equal_loads",
    "parts_cover_every_map",
    "shared_memory_is_asked_for",
    "clusters_run_where_they_are_compiled_and_find_room",
    "clusters_of_each_size_are_asked_for",
)
REFUSED = {"product_of_longer_numbers": "more than the 11 significant bits of TF32"}


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=300, check=False
    )


@pytest.fixture(scope="module")
def program(made_once: Callable[..., Path]) -> Path:
    """rules.cu and the shim, compiled."""
    compiler = next((c for c in ("g++", "clang++") if shutil.which(c)), None)
    if not (SOURCES / "simt").is_dir():
        pytest.skip("this checkout holds no csrc/simt")
    if compiler is None:
        pytest.skip("no C++ compiler")
    return made_once("rules", lambda folder: compile_into(folder, compiler)) / "rules"


def compile_into(folder: Path, compiler: str) -> None:
    result = run(
        compiler, "-std=c++20", "-O1", "-Wall", "-Wextra", "-Wno-unknown-pragmas",
        "-fvisibility=hidden", "-DMAGSD_SIMT", "-DMAGSD_ISA=cuda",
        "-DTORCH_TARGET_VERSION=0x020a000000000000",
        f"-I{SOURCES}", f"-I{FOLDER / 'driver'}",
        *(f"-isystem{path}" for path in cpp_extension.include_paths()),
        "-x", "c++", CASES, *sorted((SOURCES / "simt").glob("*.cpp")), "-o", folder / "rules",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("name", HOLD)
def test_a_rule_holds(program: Path, name: str):
    result = run(program, name)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("name", REFUSED)
def test_a_breach_is_refused(program: Path, name: str):
    result = run(program, name)
    assert result.returncode == 11
    assert re.search(REFUSED[name], result.stderr), result.stderr


def test_every_rule_is_run():
    assert {*re.findall(r"\{\"(\w+)\",\s", CASES.read_text())} == {*HOLD, *REFUSED}
