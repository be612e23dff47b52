"""The check of csrc/ for two definitions of one name, which the linker does not report."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

#: What each of two files holds, and what the check says.
CASES = {
    "one definition": (
        ("struct Part { int size; };\nnamespace { struct Own { int a; }; }\n",) * 2,
        None,
    ),
    "two types": (
        ("struct Part { int size; };\n", "struct Part { long first, last; };\n"),
        "struct Part.* violates the C.. One Definition Rule",
    ),
    "two functions": (
        (
            "struct Part { int size; };\ninline int check(int i) { return i; }\n",
            "struct Part { int size; };\n\n\ninline int check(int i) { return i > 1 ? i : 7; }\n",
        ),
        r"symbol 'check\(int\)' defined in multiple places",
    ),
}
USE = "int check_{0}(Part part) {{ return static_cast<int>(sizeof(part)){1}; }}\n"


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("g++") is None or shutil.which("ld.gold") is None, reason="no g++ with gold"
)
@pytest.mark.parametrize("case", CASES)
def test_two_definitions_of_one_name_are_found(case: str, tmp_path: Path):
    pytest.importorskip("setuptools", minversion="77")
    if not (ROOT / ".ci").is_dir():
        pytest.skip("this checkout holds no .ci")
    for folder in (".ci", "csrc"):
        (tmp_path / folder).mkdir()
        for path in (ROOT / folder).glob("*.py"):
            shutil.copy(path, tmp_path / folder)
    (tmp_path / "csrc" / "cuda").mkdir()
    definitions, message = CASES[case]
    for name, code in zip(("one", "two"), definitions, strict=True):
        call = " + check(2)" if "check" in code else ""
        (tmp_path / "csrc" / "cuda" / f"{name}.cu").write_text(code + USE.format(name, call))
    result = subprocess.run(
        [sys.executable, ".ci/compile.py", "objects", "--odr", "cuda_emulated"],
        cwd=tmp_path, env=os.environ | {"CXX": "g++"}, capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    said = result.stdout + result.stderr
    if message is None:
        assert result.returncode == 0, said
    else:
        assert result.returncode != 0, said
        assert re.search(message, said), said
