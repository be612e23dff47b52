"""What csrc/toolchain.py decides about the CUDA library, under a false torch and a false nvcc."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torch.utils import cpp_extension

ROOT = Path(__file__).parents[2]

NVCC = f"""#!{sys.executable}
import os, sys
from pathlib import Path
words = sys.argv[1:]
if "--version" in words:
    print(os.environ.get("FAKE_VERSION", "Cuda compilation tools, release 13.0, V13.0.88"))
elif "--list-gpu-arch" in words:
    print(*os.environ.get("FAKE_ARCHITECTURES", "compute_80 compute_90").split(), sep="\\n")
else:
    source = next((Path(word) for word in words if word.endswith(".cu")), None)
    if source is not None and source.name == "probe.cu" and "FAKE_FAILURE" in os.environ:
        sys.exit(os.environ["FAKE_FAILURE"])
    if source is not None and "broken" in source.read_text():
        sys.exit(f"{{source}}(1): error: this is broken")
    output = Path(words[words.index("-o") + 1])
    output.write_text(" ".join(words))
    if "-MF" in words:
        Path(words[words.index("-MF") + 1]).write_text(f"{{output}}: {{source}}")
"""


def place_nvcc(folder: Path, code: str = NVCC) -> None:
    folder.mkdir(parents=True)
    (folder / "nvcc").write_text(code)
    (folder / "nvcc").chmod(0o755)


def loaded(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A file of csrc/ as a module."""
    pytest.importorskip("setuptools", minversion="77")
    monkeypatch.syspath_prepend(ROOT / "csrc")
    spec = importlib.util.spec_from_file_location(f"csrc_{name}", ROOT / "csrc" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def toolchain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """toolchain.py over one CUDA source, under a torch for CUDA 13.0, with a false nvcc on PATH."""
    module = loaded("toolchain", monkeypatch)
    (tmp_path / "csrc" / "cuda").mkdir(parents=True)
    (tmp_path / "csrc" / "cuda" / "kernel.cu").touch()
    place_nvcc(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setattr(module, "SOURCES", tmp_path / "csrc")
    set_torch(module, monkeypatch, "2.14.0+cu130", "13.0")
    return module


def set_torch(
    module: Any,
    monkeypatch: pytest.MonkeyPatch,
    version: str,
    cuda: str | None,
    gpus: tuple[str, ...] = (),
) -> None:
    monkeypatch.setattr(module, "_torch", lambda: module._Torch(version, cuda, (), (), gpus))


def hide(program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    which = shutil.which

    def others(name: str, **options: Any) -> str | None:
        return None if name == program else which(name, **options)

    monkeypatch.setattr(shutil, "which", others)


def build_cuda(toolchain: Any, folder: Path) -> dict[str, str]:
    """What was written down; "link" is the command of the link, if the library was built."""
    library = folder / "libmagsd_cuda.so"
    report: dict[str, str] = toolchain.build("cuda", folder / "objects", library)
    assert library.exists() == ("not built" not in report)
    return report | ({"link": library.read_text()} if library.exists() else {})


@pytest.mark.parametrize("wanted", [None, "", "auto", "1"])
def test_cuda_is_built_where_torch_is_for_cuda_and_nvcc_is_found(
    toolchain: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: str | None
):
    if wanted is not None:
        monkeypatch.setenv("MAGSD_BUILD_CUDA", wanted)
    report = build_cuda(toolchain, tmp_path)
    assert report["compiler"] == "nvcc 13.0.88"
    assert report["cuda"] == "13.0"
    assert report["torch"] == "2.14.0+cu130"
    assert report["architectures"] == "8.0, 9.0+PTX"
    assert "kernel.o" in report["link"]
    assert "-cudart static" in report["link"]


REASONS = {
    "torch": "torch 2.14.0+cpu is not a CUDA build",
    "nvcc": "nvcc was not found when it was installed",
    "major": "is of CUDA 12.8, but torch 2.14.0+cu130 is built for CUDA 13.0",
    "version": "--version was not understood: nothing to say",
    "host": "cannot compile an empty kernel with the C++ compiler of its choice: "
    "host_config.h:137: error: unsupported GNU version!",
    "old": "TORCH_CUDA_ARCH_LIST holds 7.0, 7.5+PTX; the CUDA kernels need at least 8.0",
    "old gpu": "the visible GPUs have 6.1, 7.5; the CUDA kernels need at least 8.0",
    "none": "knows none of 8.0",
    "sources": "this checkout holds no sources of it",
}


@pytest.mark.parametrize("wanted", ["auto", "1"])
@pytest.mark.parametrize("case", REASONS)
def test_why_cuda_is_not_built(
    toolchain: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, wanted: str
):
    if case == "torch":
        set_torch(toolchain, monkeypatch, "2.14.0+cpu", None)
    if case == "old gpu":
        set_torch(toolchain, monkeypatch, "2.14.0+cu130", "13.0", ("7.5", "6.1"))
    if case == "nvcc":
        hide("nvcc", monkeypatch)
    if case == "sources":
        (tmp_path / "csrc" / "cuda" / "kernel.cu").unlink()
    message = "In file included from a.h:\nhost_config.h:137: error: unsupported GNU version!\n"
    for name, value in {
        "major": ("FAKE_VERSION", "Cuda compilation tools, release 12.8, V12.8.93"),
        "version": ("FAKE_VERSION", "nothing to say"),
        "host": ("FAKE_FAILURE", message),
        "old": ("TORCH_CUDA_ARCH_LIST", "7.0;7.5+PTX"),
        "none": ("FAKE_ARCHITECTURES", "compute_30"),
    }.items():
        if name == case:
            monkeypatch.setenv(*value)
    monkeypatch.setenv("MAGSD_BUILD_CUDA", wanted)
    if wanted == "auto":
        assert REASONS[case] in build_cuda(toolchain, tmp_path)["not built"]
    else:
        with pytest.raises(toolchain.PlatformError, match="MAGSD_BUILD_CUDA=1, but") as caught:
            build_cuda(toolchain, tmp_path)
        assert REASONS[case] in str(caught.value)


def test_another_minor_version_of_cuda_is_no_hindrance(
    toolchain: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("FAKE_VERSION", "Cuda compilation tools, release 13.2, V13.2.1")
    assert build_cuda(toolchain, tmp_path)["cuda"] == "13.2"


@pytest.mark.parametrize("variable", ["CUDA_HOME", "CUDA_PATH"])
def test_nvcc_of_cuda_home_comes_first(
    toolchain: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
):
    home = tmp_path / "cuda-13.1"
    place_nvcc(home / "bin", NVCC.replace("release 13.0", "release 13.1"))
    monkeypatch.setenv(variable, str(home))
    assert build_cuda(toolchain, tmp_path)["cuda"] == "13.1"


@pytest.mark.parametrize(
    ("wanted", "known", "built"),
    [
        ("", "80 86 89 90 100 103 120 121", "8.0, 9.0, 10.0, 12.0+PTX"),
        ("", "75 80 86 87 89 90", "8.0, 9.0+PTX"),
        ("9.0", "90", "9.0"),
        ("8.0;9.0a 10.0f+PTX", "90", "8.0, 9.0a, 10.0f+PTX"),
        (" 7.5 ; 8.0; 9.0+PTX;", "90", "8.0, 9.0+PTX"),
    ],
)
def test_architectures(
    toolchain: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    wanted: str,
    known: str,
    built: str,
):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", wanted)
    monkeypatch.setenv("FAKE_ARCHITECTURES", " ".join(f"compute_{n}" for n in known.split()))
    report = build_cuda(toolchain, tmp_path)
    assert report["architectures"] == built
    assert report.get("left out", "").startswith("7.5: ") == ("7.5" in wanted)
    command = (tmp_path / "objects" / "kernel.o").read_text()
    for architecture in built.split(", "):
        number = architecture.removesuffix("+PTX").replace(".", "")
        both = f"[sm_{number},compute_{number}]"
        code = both if architecture.endswith("+PTX") else f"sm_{number}"
        assert f"-gencode arch=compute_{number},code={code} " in command
    assert command.count("-gencode") == len(built.split(", "))


@pytest.mark.parametrize(
    ("gpus", "built"),
    [
        (("9.0",), "9.0+PTX"),
        (("10.0", "8.6", "9.0"), "8.6, 9.0, 10.0+PTX"),
        (("7.5", "8.9"), "8.9+PTX"),
        (("8.7",), "8.6+PTX"),  # which this nvcc does not know by itself
        (("12.1",), "12.0+PTX"),
        (("13.0",), "12.0+PTX"),
    ],
)
def test_a_visible_gpu_is_what_is_compiled_for(
    toolchain: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    gpus: tuple[str, ...],
    built: str,
):
    known = "compute_75 compute_80 compute_86 compute_89 compute_90 compute_100 compute_120"
    monkeypatch.setenv("FAKE_ARCHITECTURES", known)
    set_torch(toolchain, monkeypatch, "2.14.0+cu130", "13.0", gpus)
    report = build_cuda(toolchain, tmp_path)
    assert report["architectures"] == built
    assert report.get("left out", "").startswith("7.5: ") == ("7.5" in gpus)


def test_the_list_of_architectures_comes_before_the_visible_gpu(
    toolchain: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    set_torch(toolchain, monkeypatch, "2.14.0+cu130", "13.0", ("9.0",))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0 12.0+PTX")
    assert build_cuda(toolchain, tmp_path)["architectures"] == "8.0, 12.0+PTX"


@pytest.mark.parametrize(("jobs", "threads"), [(1, 1), (2, 2), (64, 2)])
def test_architectures_of_a_file_compile_side_by_side_on_many_processors(
    toolchain: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jobs: int, threads: int
):
    """There is one file here, and two architectures."""
    monkeypatch.setenv("MAX_JOBS", str(jobs))
    build_cuda(toolchain, tmp_path)
    assert f"--threads={threads} " in (tmp_path / "objects" / "kernel.o").read_text()


def test_what_a_compiler_prints_is_seen_while_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    seen = tmp_path / "seen"
    code = (
        "import pathlib, sys, time\n"
        "print('[1/2] one.o', flush=True)\n"
        "end = time.monotonic() + 20\n"
        f"while not pathlib.Path({str(seen)!r}).exists():\n"
        "    time.sleep(0.01)\n"
        "    if time.monotonic() > end: sys.exit('nobody read')\n"
        "print('[2/2] two.o')\n"
    )
    lines: list[str] = []

    class Terminal:
        def write(self, text: str) -> None:
            lines.append(text)
            seen.touch()

        def flush(self) -> None:
            pass

    commands = loaded("commands", monkeypatch)
    monkeypatch.setattr(sys, "stdout", Terminal())
    commands.run([sys.executable, "-c", code])
    assert lines == ["[1/2] one.o\n", "[2/2] two.o\n"]


@pytest.mark.parametrize("wanted", ["Hopper", "9", "sm_90", "9.0,10.0", "native"])
def test_an_architecture_that_is_not_understood_is_refused(
    toolchain: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: str
):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", wanted)
    with pytest.raises(toolchain.PlatformError, match="TORCH_CUDA_ARCH_LIST") as caught:
        build_cuda(toolchain, tmp_path)
    assert repr(wanted) in str(caught.value)


@pytest.mark.parametrize("ninja", [True, False], ids=["ninja", "without_ninja"])
def test_failing_nvcc_fails_with_its_message(
    toolchain: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ninja: bool
):
    if not ninja:
        hide("ninja", monkeypatch)
    elif shutil.which("ninja") is None:
        pytest.skip("no ninja")
    (tmp_path / "csrc" / "cuda" / "kernel.cu").write_text("broken")
    (tmp_path / "libmagsd_cuda.so").touch()
    with pytest.raises(toolchain.CompileError, match=r"kernel.cu\(1\): error: this is broken"):
        build_cuda(toolchain, tmp_path)
    assert not (tmp_path / "libmagsd_cuda.so").exists()


def test_nvcc_takes_the_compiler_and_the_flags_of_the_link(
    toolchain: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("CXX", "/usr/bin/ccache g++-12 -m64")
    monkeypatch.setenv("LDFLAGS", "-Wl,-O1,--as-needed -L/somewhere")
    link = build_cuda(toolchain, tmp_path)["link"]
    assert "-ccbin g++-12 " in link
    assert r"-Xcompiler=-Wl\,-O1\,--as-needed -Xcompiler=-L/somewhere" in link
    assert "-ccbin g++-12 " in (tmp_path / "objects" / "kernel.o").read_text()


def test_logs_of_sources_that_are_gone_do_not_stay(toolchain: Any, tmp_path: Path):
    (tmp_path / "objects").mkdir()
    (tmp_path / "objects" / "gone.o.log").touch()
    build_cuda(toolchain, tmp_path)
    assert [path.name for path in (tmp_path / "objects").glob("*.log")] == ["kernel.o.log"]


@pytest.mark.slow
@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "backward"])
def test_silu_becomes_vector_code(gradient: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Scalar exponentials are six times slower than torch's, and no other test would notice."""
    gcc = shutil.which("g++")
    if gcc is None or platform.machine() != "x86_64":
        pytest.skip("needs g++ on x86-64, which reports what becomes vector code")
    module = loaded("toolchain", monkeypatch)
    call = "differentiate<Act::kSilu>(x[i], x[i])" if gradient else "activate<Act::kSilu>(x[i])"
    source = tmp_path / "loop.cpp"
    source.write_text(f"""
#include "cpu/activation.h"
using namespace magsd::MAGSD_ISA::batch_norm_act;
void loop(const float* MAGSD_RESTRICT x, float* MAGSD_RESTRICT out, int64_t count) {{
  for (int64_t i = 0; i < count; ++i) out[i] = {call};
}}
""")
    command = [gcc, "-std=c++17", *module.FLAGS, *module.INSTRUCTION_SETS["avx2"]]
    command += [
        f"-I{ROOT / 'csrc'}",
        *(f"-isystem{path}" for path in cpp_extension.include_paths()),
    ]
    command += ["-DMAGSD_ISA=avx2", "-fopt-info-vec-optimized", "-c", str(source)]
    report = subprocess.run(
        [*command, "-o", os.devnull], capture_output=True, text=True, check=True
    ).stderr
    assert re.search(r"loop\.cpp:5:\d+: optimized: loop vectorized using 32 byte", report)
