"""How the compiled libraries are built: switches, refusals, and what they may depend on."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

from magsd_kernels import native

ROOT = Path(__file__).parents[2]
compiler = os.environ.get("CXX", "c++").split()[-1]
needs_compiler = pytest.mark.skipif(shutil.which(compiler) is None, reason="no C++ compiler")
needs_nm = pytest.mark.skipif(shutil.which("nm") is None, reason="no nm")


def needs_library(name: str) -> pytest.MarkDecorator:
    missing = not (native._FOLDER / f"libmagsd_{name}.so").is_file()
    return pytest.mark.skipif(missing, reason=f"the {name} library is not built")


# ---------------------------------------------------------------- setup.py


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout without operations; its path has a space in it."""
    pytest.importorskip("setuptools", minversion="77")
    folder = tmp_path / "check out"
    for name in ("csrc", "magsd_kernels"):
        (folder / name).mkdir(parents=True)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, folder)
    for path in (ROOT / "csrc").glob("*.py"):
        shutil.copy(path, folder / "csrc")
    (folder / "magsd_kernels" / "__init__.py").write_text('__version__ = "0"\n')
    return folder


def write(folder: Path, path: str, code: str) -> None:
    (folder / "csrc" / path).parent.mkdir(exist_ok=True)
    (folder / "csrc" / path).write_text(code)


def setup(folder: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run setup.py; without the CUDA library unless told otherwise."""
    return subprocess.run(
        [sys.executable, "setup.py", *command],
        cwd=folder,
        env=os.environ | {"MAGSD_BUILD_CUDA": "0"} | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def build(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Build into folder/out, with the objects in folder/objects."""
    command = ("build_ext", "--build-lib", "out", "--build-temp", "objects")
    return setup(folder, *command, **environment)


def lib(folder: Path) -> Path:
    return folder / "out" / "magsd_kernels" / "lib"


def report_in(folder: Path, name: str) -> dict[str, str]:
    report: dict[str, str] = json.loads((lib(folder) / "build.json").read_text())[name]
    assert (lib(folder) / f"libmagsd_{name}.so").exists() == ("not built" not in report)
    return report


@pytest.mark.parametrize("name", ["CPU", "CUDA"])
def test_build_switched_off(checkout: Path, name: str):
    result = build(checkout, MAGSD_BUILD_CPU="0", MAGSD_BUILD_CUDA="0")
    assert result.returncode == 0, result.stderr
    assert f"MAGSD_BUILD_{name}=0" in report_in(checkout, name.lower())["not built"]


def test_files_of_an_earlier_build_do_not_stay(checkout: Path):
    lib(checkout).mkdir(parents=True)
    stale = ("libmagsd_cpu.so", "libmagsd_cuda.so", "libmagsd_cuda_emulated.so")
    for name in (*stale, "cuda_resources.json"):
        (lib(checkout) / name).touch()
    assert build(checkout, MAGSD_BUILD_CPU="0").returncode == 0
    assert [path.name for path in lib(checkout).iterdir()] == ["build.json"]


def test_no_compiler_is_said_and_no_failure(checkout: Path):
    (checkout / "bin").mkdir()
    result = build(checkout, PATH=str(checkout / "bin"))
    assert result.returncode == 0, result.stderr
    assert "no C++ compiler was found" in report_in(checkout, "cpu")["not built"]
    assert "no C++ compiler was found" in result.stdout + result.stderr


def test_no_compiler_fails_where_the_library_is_asked_for(checkout: Path):
    (checkout / "bin").mkdir()
    result = build(checkout, PATH=str(checkout / "bin"), MAGSD_BUILD_CPU="1")
    assert result.returncode != 0
    assert "MAGSD_BUILD_CPU=1, but no C++ compiler was found" in result.stderr


def test_a_compiler_that_compiles_nothing_is_none(checkout: Path):
    (checkout / "c++").write_text("#!/bin/sh\necho 'error: no headers' >&2\nexit 1\n")
    (checkout / "c++").chmod(0o755)
    result = build(checkout, CXX="./c++")
    assert result.returncode == 0, result.stderr
    reason = report_in(checkout, "cpu")["not built"]
    assert reason == "./c++ cannot compile an empty program: error: no headers"


@pytest.mark.parametrize("name", ["MAGSD_BUILD_CPU", "MAGSD_BUILD_CUDA", "MAGSD_BUILD_EMULATION"])
def test_unknown_switch_is_refused(checkout: Path, name: str):
    result = build(checkout, **({"MAGSD_BUILD_CPU": "0"} | {name: "yes"}))
    assert result.returncode != 0
    assert f"{name} must be auto, 0 or 1, got 'yes'" in result.stderr


@needs_compiler
@pytest.mark.slow
def test_failing_compile_fails_with_the_message_of_the_compiler(checkout: Path):
    """Without ninja; with it see below."""
    write(checkout, "cpu/registration.cpp", "int broken = undeclared_name;\n")
    tools = checkout / "bin"
    tools.mkdir()
    for name in (compiler, "as", "ld"):
        (tools / name).symlink_to(str(shutil.which(name)))
    result = build(checkout, PATH=str(tools))
    assert result.returncode != 0
    assert "undeclared_name" in result.stderr
    assert not list(checkout.glob("out/**/*.so"))


@needs_compiler
@pytest.mark.slow
def test_a_mended_build_writes_down_how_it_was_made(checkout: Path):
    write(checkout, "cpu/registration.cpp", "int broken = undeclared_name;\n")
    result = build(checkout)
    assert result.returncode != 0
    assert "undeclared_name" in result.stderr
    assert not list(checkout.glob("out/**/*.so"))
    write(checkout, "cpu/registration.cpp", "int nothing() { return 0; }\n")
    result = build(checkout)
    assert result.returncode == 0, result.stderr
    report = report_in(checkout, "cpu")
    assert {"compiler", "torch", "flags", "instruction sets"} <= set(report)
    assert report["torch"] == torch.__version__
    assert "MAGSD_BUILD_EMULATION=0" in report_in(checkout, "cuda_emulated")["not built"]


@needs_compiler
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("ninja") is None, reason="no ninja")
def test_a_changed_header_recompiles_what_includes_it(checkout: Path):
    """The emulation compiles the same files as nvcc, with the same rule."""
    write(checkout, "common/size.h", "constexpr int size = 1;\n")
    write(checkout, "cuda/one.cu", '#include "common/size.h"\nint one() { return size; }\n')
    write(checkout, "cuda/two.cu", "int two() { return 2; }\n")
    objects = [checkout / "objects" / "magsd_cuda_emulated" / f"{x}.o" for x in ("one", "two")]

    def times() -> list[int]:
        result = build(checkout, MAGSD_BUILD_CPU="0", MAGSD_BUILD_EMULATION="1")
        assert result.returncode == 0, result.stderr
        assert "compiler" in report_in(checkout, "cuda_emulated")
        return [path.stat().st_mtime_ns for path in objects]

    first = times()
    assert times() == first
    write(checkout, "common/size.h", "constexpr int size = 2;\n")
    second = times()
    assert second[0] > first[0]
    assert second[1] == first[1]


def test_the_wheel_serves_every_python(checkout: Path):
    result = setup(checkout, "bdist_wheel", MAGSD_BUILD_CPU="0")
    assert result.returncode == 0, result.stderr
    (wheel,) = (checkout / "dist").glob("*.whl")
    assert re.fullmatch(r"magsd-0-py3-none-\w+\.whl", wheel.name)
    assert not wheel.name.endswith("-any.whl")
    assert "magsd_kernels/lib/build.json" in zipfile.ZipFile(wheel).namelist()


def test_the_sdist_holds_what_the_build_needs_and_nothing_built(checkout: Path):
    for path in ("common/a.h", "cpu/a.cpp", "cuda/a.cu"):
        write(checkout, path, "")
    for path in ("csrc/__pycache__/toolchain.cpython-311.pyc", "magsd_kernels/lib/libmagsd_cpu.so"):
        (checkout / path).parent.mkdir()
        (checkout / path).touch()
    result = setup(checkout, "sdist", "--formats", "gztar")
    assert result.returncode == 0, result.stderr
    (sdist,) = (checkout / "dist").glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = {str(p.relative_to(ROOT)) for p in (ROOT / "csrc").glob("*.py")}
    assert sources | {"csrc/common/a.h", "csrc/cpu/a.cpp", "csrc/cuda/a.cu", "setup.py"} <= names
    assert not [name for name in names if name.endswith((".pyc", ".so"))]


# ---------------------------------------------------------------- by the real nvcc


@pytest.fixture
def cuda_checkout(checkout: Path) -> Path:
    """A checkout in which the CUDA library can be built."""
    result = build(checkout, MAGSD_BUILD_CPU="0", MAGSD_BUILD_CUDA="auto")
    assert result.returncode == 0, result.stderr
    reason = report_in(checkout, "cuda")["not built"]
    if reason != "this checkout holds no sources of it":
        pytest.skip(reason)
    return checkout


@pytest.mark.slow
def test_nvcc_builds_and_reports(cuda_checkout: Path):
    switches = {"MAGSD_BUILD_CPU": "0", "MAGSD_BUILD_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "9.0"}
    write(cuda_checkout, "common/size.h", "constexpr int size = 1;\n")
    code = '#include "common/size.h"\n__global__ void fill(int* to) { *to = size; }\n'
    write(cuda_checkout, "cuda/fill.cu", code)
    result = build(cuda_checkout, **switches, LDFLAGS="-Wl,-O1,--as-needed")
    assert result.returncode == 0, result.stderr
    assert report_in(cuda_checkout, "cuda")["architectures"] == "9.0"
    resources = json.loads((lib(cuda_checkout) / "cuda_resources.json").read_text())
    ((name, rows),) = resources["kernels"].items()
    assert name.startswith("fill.cu: ")
    assert rows["sm_90"][resources["columns"].index("spills")] == 0
    # A changed header recompiles what includes it.
    write(cuda_checkout, "common/size.h", "constexpr int size = undeclared_name;\n")
    result = build(cuda_checkout, **switches)
    assert result.returncode != 0
    assert 'identifier "undeclared_name" is undefined' in result.stderr


# ---------------------------------------------------------------- the libraries that are installed


@needs_nm
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=needs_library(name)) for name in ("cpu", "cuda")]
)
def test_library_asks_for_the_stable_interface_of_torch_alone(name: str):
    """And for nothing of CUDA's run-time library, which it holds itself."""
    listing = subprocess.run(
        ["nm", "-D", "--undefined-only", str(native._FOLDER / f"libmagsd_{name}.so")],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    names = [line.split()[-1] for line in listing.splitlines()]
    assert any(name.startswith(("torch_", "aoti_torch_")) for name in names)
    unstable = [n for n in names if re.match(r"_ZNK?(2at|3c10|5torch)|Py|_Py|cu[a-z]*[A-Z]", n)]
    assert not unstable
