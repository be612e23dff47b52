"""How the compiled library is built: switches, refusals, and what it may depend on."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from magsd_kernels import native

ROOT = Path(__file__).parents[2]
pytest.importorskip("setuptools", minversion="77")
compiler = os.environ.get("CXX", "c++")
needs_compiler = pytest.mark.skipif(shutil.which(compiler) is None, reason="no C++ compiler")
needs_library = pytest.mark.skipif(
    not native.library("cpu").is_file(), reason="the CPU library is not built"
)


def build(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the build of a copy of the checkout without its operations; results in folder/out."""
    if not (folder / "setup.py").is_file():
        for name in ("setup.py", "pyproject.toml", "README.md"):
            shutil.copy(ROOT / name, folder)
        (folder / "csrc").mkdir(exist_ok=True)
        shutil.copy(ROOT / "csrc" / "toolchain.py", folder / "csrc")
        (folder / "magsd_kernels").mkdir()
        (folder / "magsd_kernels" / "__init__.py").write_text('__version__ = "0"\n')
    clean = {k: v for k, v in os.environ.items() if not k.startswith("MAGSD_")}
    return subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--build-lib", "out", "--build-temp", "objects"],
        cwd=folder,
        env=clean | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def reason_in(folder: Path) -> str:
    lib = folder / "out" / "magsd_kernels" / "lib"
    assert not (lib / "libmagsd_cpu.so").exists()
    reason: str = json.loads((lib / "build.json").read_text())["cpu"]["not built"]
    return reason


def write_source(folder: Path, code: str) -> None:
    (folder / "csrc" / "cpu").mkdir(parents=True, exist_ok=True)
    (folder / "csrc" / "cpu" / "registration.cpp").write_text(code)


def test_build_switched_off(tmp_path: Path):
    result = build(tmp_path, MAGSD_BUILD_CPU="0")
    assert result.returncode == 0, result.stderr
    assert "MAGSD_BUILD_CPU=0" in reason_in(tmp_path)


def test_a_library_of_an_earlier_build_does_not_stay(tmp_path: Path):
    stale = tmp_path / "out" / "magsd_kernels" / "lib" / "libmagsd_cpu.so"
    stale.parent.mkdir(parents=True)
    stale.touch()
    assert build(tmp_path, MAGSD_BUILD_CPU="0").returncode == 0
    assert not stale.exists()


def test_no_compiler_is_said_and_no_failure(tmp_path: Path):
    (tmp_path / "bin").mkdir()
    result = build(tmp_path, PATH=str(tmp_path / "bin"), CXX="")
    assert result.returncode == 0, result.stderr
    assert "no C++ compiler was found" in reason_in(tmp_path)
    assert "no C++ compiler was found" in result.stdout + result.stderr


def test_no_compiler_fails_where_the_library_is_asked_for(tmp_path: Path):
    (tmp_path / "bin").mkdir()
    result = build(tmp_path, PATH=str(tmp_path / "bin"), CXX="", MAGSD_BUILD_CPU="1")
    assert result.returncode != 0
    assert "MAGSD_BUILD_CPU=1, but no C++ compiler was found" in result.stderr


def test_unknown_switch_is_refused(tmp_path: Path):
    result = build(tmp_path, MAGSD_BUILD_CPU="yes")
    assert result.returncode != 0
    assert "MAGSD_BUILD_CPU must be auto, 0 or 1, got 'yes'" in result.stderr


@needs_compiler
@pytest.mark.parametrize("ninja", [True, False], ids=["ninja", "without_ninja"])
def test_failing_compile_fails_with_the_message_of_the_compiler(tmp_path: Path, ninja: bool):
    write_source(tmp_path, "int broken = undeclared_name;\n")
    if ninja and shutil.which("ninja") is None:
        pytest.skip("no ninja")
    if not ninja:
        tools = tmp_path / "bin"
        tools.mkdir()
        for name in (compiler, "as", "ld"):
            (tools / name).symlink_to(str(shutil.which(name)))
    result = build(tmp_path, **({} if ninja else {"PATH": str(tmp_path / "bin")}))
    assert result.returncode != 0
    assert "undeclared_name" in result.stderr
    assert not list(tmp_path.glob("out/**/*.so"))


@needs_compiler
def test_build_writes_down_how_it_was_made(tmp_path: Path):
    write_source(tmp_path, "int nothing() { return 0; }\n")
    result = build(tmp_path)
    assert result.returncode == 0, result.stderr
    lib = tmp_path / "out" / "magsd_kernels" / "lib"
    assert (lib / "libmagsd_cpu.so").is_file()
    report = json.loads((lib / "build.json").read_text())["cpu"]
    assert {"compiler", "torch", "flags", "instruction sets"} <= set(report)


@needs_library
@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm")
def test_library_asks_for_the_stable_interface_of_torch_alone():
    listing = subprocess.run(
        ["nm", "-D", "--undefined-only", str(native.library("cpu"))],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    names = [line.split()[-1] for line in listing.splitlines()]
    assert any(name.startswith("torch_") for name in names)
    unstable = [n for n in names if re.match(r"_ZNK?(2at|3c10|5torch)|_ZN2at|Py|_Py", n)]
    assert not unstable
