"""Compilers and commands that turn csrc/ into libraries; setup.py runs them.

| library | from | with |
| --- | --- | --- |
| cpu | csrc/cpu/*.cpp, once per instruction set | the C++ compiler |
| cuda | csrc/cuda/*.cu, for every architecture | nvcc |
| cuda_emulated | csrc/cuda/*.cu and csrc/simt, for the host | the C++ compiler |

All use the LibTorch stable ABI and hold no Python, so that one file serves every Python and every
torch from 2.10 on.
"""

from __future__ import annotations

import functools
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from setuptools.errors import CompileError, PlatformError

SOURCES = Path(__file__).resolve().parent
STABLE_ABI = "0x020a000000000000"  # the functions of torch 2.10
FLAGS = (
    "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math",
    "-Wall", "-Wextra", "-Wno-unknown-pragmas", f"-DTORCH_TARGET_VERSION={STABLE_ABI}",
)  # fmt: skip
_AVX2 = ("-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2")
_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512")
INSTRUCTION_SETS = {"baseline": (), "avx2": _AVX2, "avx512": (*_AVX2, *_AVX512)}
#: Files (by the start of their names) whose boxes and thresholds must round as they are written,
#: without fused products.
UNFUSED = ("attention_augment", "attention_sampling")

ARCHITECTURES = ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0+PTX")
OLDEST_ARCHITECTURE = 80  # the first with TF32 products
NVCC_FLAGS = (
    "-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Xcompiler", "-fPIC,-fvisibility=hidden",
    "-Xptxas", "-v", "-DUSE_CUDA", "-DMAGSD_DEVICE_CUDA", "-DMAGSD_ISA=cuda",
    f"-DTORCH_TARGET_VERSION={STABLE_ABI}",
)  # fmt: skip


class NotBuilt(Exception):
    """Why this machine cannot build a library."""


@dataclass(frozen=True)
class Plan:
    """Commands of one library: object to compilation, the link, and what to write down."""

    compiles: dict[Path, list[str]]
    link: list[str]
    libraries: tuple[str, ...]
    report: dict[str, str]

    def run(self, folder: Path, library: Path) -> None:
        """Compile what has changed since the last time in `folder`, and link."""
        folder.mkdir(parents=True, exist_ok=True)
        library.parent.mkdir(parents=True, exist_ok=True)
        jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
        ninja = shutil.which("ninja")
        if ninja is not None:
            _run([ninja, "-C", str(folder), "-j", str(jobs), "-f", self._ninja_file(folder)])
        else:
            with ThreadPoolExecutor(jobs) as pool:
                list(pool.map(lambda o: _run([*self.compiles[o], "-o", str(o)], o), self.compiles))
        search = [f"-L{path}" for path in _torch().library_paths]
        given = shlex.split(os.environ.get("LDFLAGS", ""))
        objects = map(str, self.compiles)
        _run([*self.link, *objects, "-o", str(library), *search, *self.libraries, *given])

    def _ninja_file(self, folder: Path) -> str:
        """Name of a file, in `folder`, that recompiles what has changed."""
        lines = [
            "rule compile",
            "  command = $line -MMD -MF $out.d -o $out > $out.log 2>&1 || { cat $out.log; exit 1; }",
            "  description = $out",
            "  depfile = $out.d",
            "  deps = gcc",
        ]
        for output, command in self.compiles.items():
            paths = [str(p).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")
                     for p in (output, command[-1])]  # fmt: skip
            lines += [f"build {paths[0]}: compile {paths[1]}"]
            lines += [f"  line = {shlex.join(command).replace('$', '$$')}"]
        (folder / "build.ninja").write_text("\n".join(lines) + "\n")
        return "build.ninja"


def cpu_plan(folder: Path) -> Plan:
    """The C++ kernels; the baseline's objects come first in the link."""
    compiler = _compiler()
    have = [f"-DMAGSD_HAVE_{name.upper()}" for name in compiler.instruction_sets[1:]]
    registration = SOURCES / "cpu" / "registration.cpp"
    compiles = {folder / "registration.o": [*compiler.command(), *have, "-c", str(registration)]}
    for name in compiler.instruction_sets:
        for source in sorted(set((SOURCES / "cpu").glob("*.cpp")) - {registration}):
            compiles[folder / f"{source.stem}.{name}.o"] = [
                *compiler.command(), *INSTRUCTION_SETS[name], _contraction(source),
                f"-DMAGSD_ISA={name}", "-c", str(source),
            ]  # fmt: skip
    sets = {"instruction sets": ", ".join(compiler.instruction_sets)}
    return Plan(compiles, *compiler.link(), compiler.report() | sets)


def emulation_plan(folder: Path) -> Plan:
    """The CUDA kernels for the host, under csrc/simt, for tests on machines without a GPU."""
    compiler = _compiler()
    flags = ("-DMAGSD_SIMT", "-DMAGSD_ISA=cuda", "-Wno-unused-parameter")
    sources = [*sorted((SOURCES / "cuda").glob("*.cu")), *sorted((SOURCES / "simt").glob("*.cpp"))]
    compiles = {
        folder / f"{source.stem}.o": [
            *compiler.command(), *flags, _contraction(source), "-x", "c++", "-c", str(source),
        ]
        for source in sources
    }  # fmt: skip
    return Plan(compiles, *compiler.link(), compiler.report())


def cuda_plan(folder: Path) -> Plan:
    """The CUDA kernels for a GPU."""
    torch = _torch()
    if torch.cuda is None:
        raise NotBuilt(f"torch {torch.version} is not a CUDA build")
    nvcc = _find_nvcc()
    version = _output([nvcc, "--version"])
    release = re.search(r"release (\d+)\.(\d+)", version)
    if release is None:
        raise NotBuilt(f"{nvcc} --version was not understood: {version}")
    if release[1] != torch.cuda.partition(".")[0]:
        raise NotBuilt(
            f"nvcc is of CUDA {release[1]}.{release[2]}, but torch {torch.version} is built for "
            f"CUDA {torch.cuda}"
        )
    architectures = _architectures(nvcc)
    host = os.environ.get("CXX")
    command = [
        nvcc, *NVCC_FLAGS, *(["-ccbin", shlex.split(host)[0]] if host else []),
        *_generate(architectures), f"-I{SOURCES}",
        *(flag for path in torch.includes for flag in ("-isystem", path)),
    ]  # fmt: skip
    compiles = {
        folder / f"{source.stem}.o": [
            *command, "-fmad=" + ("false" if source.stem.startswith(UNFUSED) else "true"), "-c", str(source),
        ]
        for source in sorted((SOURCES / "cuda").glob("*.cu"))
    }  # fmt: skip
    report = {
        "compiler": f"nvcc {release[1]}.{release[2]}",
        "torch": torch.version,
        "flags": " ".join(NVCC_FLAGS),
        "architectures": ", ".join(architectures),
    }
    link = [nvcc, "-shared", "-cudart", "static"]
    return Plan(compiles, link, ("-ltorch_cpu", "-ltorch_cuda"), report)


#: name: (variable that decides whether it is built, its default, the plan)
LIBRARIES: dict[str, tuple[str, str, Callable[[Path], Plan]]] = {
    "cpu": ("MAGSD_BUILD_CPU", "auto", cpu_plan),
    "cuda": ("MAGSD_BUILD_CUDA", "auto", cuda_plan),
    "cuda_emulated": ("MAGSD_BUILD_EMULATION", "0", emulation_plan),
}


def build(name: str, folder: Path, library: Path) -> dict[str, str]:
    """Build one library if it is wanted and can be; what it was built with, or why it was not."""
    variable, default, plan = LIBRARIES[name]
    library.unlink(missing_ok=True)
    wanted = os.environ.get(variable, default).strip().lower() or default
    if wanted not in ("auto", "0", "1"):
        raise PlatformError(f"{variable} must be auto, 0 or 1, got {wanted!r}")
    try:
        if wanted == "0":
            raise NotBuilt(f"{variable}=0 when it was installed")
        made = plan(folder)
        if not made.compiles:
            raise NotBuilt("this checkout holds no sources of it")
        made.run(folder, library)
        return made.report
    except NotBuilt as reason:
        if wanted == "1":
            raise PlatformError(f"{variable}=1, but {reason}") from reason
        return {"not built": str(reason)}


def kernel_resources(folder: Path) -> dict[str, dict[str, dict[str, int]]]:
    """Kernel -> architecture -> registers, shared memory, stack and spills, from ptxas's report."""
    table: dict[str, dict[str, dict[str, int]]] = {}
    for log in sorted(folder.glob("*.log")):
        kernel = architecture = ""
        spills: dict[str, int] = {}
        for line in log.read_text(errors="replace").splitlines():
            if found := re.search(r"Compiling entry function '(\S+)' for '(\w+)'", line):
                kernel, architecture = found[1], found[2]
            elif found := re.search(
                r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line
            ):
                spills = {"stack": int(found[1]), "spills": int(found[2]) + int(found[3])}
            elif found := re.search(r"Used (\d+) registers", line):
                shared = re.search(r"(\d+) bytes smem", line)
                table.setdefault(kernel, {})[architecture] = {
                    "registers": int(found[1]),
                    "shared": int(shared[1]) if shared else 0,
                    **spills,
                }
    names = _demangled(list(table))
    return {names[mangled]: table[mangled] for mangled in table}


def _demangled(names: list[str]) -> dict[str, str]:
    tool = shutil.which("c++filt") or shutil.which("cu++filt")
    if tool is None or not names:
        return {name: name for name in names}
    plain = subprocess.run(
        [tool], input="\n".join(names), capture_output=True, text=True, check=True
    ).stdout.splitlines()
    # Without the return type, the namespaces that all share and the parameters.
    short = [re.sub(r"^void |magsd::cuda::|\(anonymous namespace\)::", "", p) for p in plain]
    return dict(zip(names, (_without_parameters(s) for s in short), strict=True))


def _without_parameters(function: str) -> str:
    """A function's name with its template arguments, which may hold parentheses themselves."""
    depth = 0
    for i, letter in enumerate(function):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            return function[:i]
    return function


@dataclass(frozen=True)
class _Torch:
    """The torch to compile against."""

    version: str
    cuda: str | None
    includes: tuple[str, ...]
    library_paths: tuple[str, ...]


@functools.cache
def _torch() -> _Torch:
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError as error:
        raise NotBuilt(f"torch could not be imported when it was installed: {error}") from error
    paths = tuple(cpp_extension.library_paths())
    return _Torch(
        torch.__version__, torch.version.cuda, tuple(cpp_extension.include_paths()), paths
    )


@dataclass(frozen=True)
class _Compiler:
    """A C++ compiler and what it can do."""

    words: tuple[str, ...]
    version: str
    standard: str
    instruction_sets: tuple[str, ...]

    def command(self) -> list[str]:
        return [
            *self.words, self.standard, *FLAGS, f"-I{SOURCES}",
            *(f"-isystem{path}" for path in _torch().includes),
            *shlex.split(os.environ.get("CXXFLAGS", "")),
        ]  # fmt: skip

    def link(self) -> tuple[list[str], tuple[str, ...]]:
        command = [*self.words, "-shared", *shlex.split(os.environ.get("CXXFLAGS", ""))]
        if sys.platform == "darwin":
            return [*command, "-undefined", "dynamic_lookup"], ()
        return command, ("-ltorch_cpu",)

    def report(self) -> dict[str, str]:
        flags = (self.standard, *FLAGS, os.environ.get("CXXFLAGS", ""))
        return {
            "compiler": self.version,
            "torch": _torch().version,
            "flags": " ".join(flags).strip(),
        }


@functools.cache
def _compiler() -> _Compiler:
    """The compiler of CXX, else c++, g++ or clang++."""
    if not sys.platform.startswith(("linux", "darwin")):
        raise NotBuilt(f"the C++ kernels are not built on {sys.platform}")
    wanted = os.environ.get("CXX")
    candidates = [shlex.split(wanted)] if wanted else [["c++"], ["g++"], ["clang++"]]
    words = next((tuple(c) for c in candidates if shutil.which(c[0])), None)
    if words is None:
        names = ", ".join(c[0] for c in candidates)
        raise NotBuilt(f"no C++ compiler was found when it was installed (looked for {names})")
    headers = [f"-isystem{path}" for path in _torch().includes]
    probe = "#include <torch/csrc/stable/library.h>\n#include <torch/csrc/stable/ops.h>\n"
    target = f"-DTORCH_TARGET_VERSION={STABLE_ABI}"
    for standard in ("-std=c++17", "-std=c++20"):
        failure = _failure(words, [standard, target, *headers], probe)
        if failure is None:
            break
    else:
        raise CompileError(f"{words[0]} cannot compile torch's stable headers:\n{failure}")
    x86 = platform.machine().lower() in ("x86_64", "amd64", "i686")
    sets = tuple(
        name
        for name, flags in INSTRUCTION_SETS.items()
        if not flags or (x86 and _failure(words, flags, "int main() {}") is None)
    )
    return _Compiler(words, _output([*words, "--version"]).partition("\n")[0], standard, sets)


def _contraction(source: Path) -> str:
    return "-ffp-contract=" + ("off" if source.stem.startswith(UNFUSED) else "fast")


def _find_nvcc() -> str:
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")):
        if home and (path := shutil.which("nvcc", path=str(Path(home, "bin")))):
            return path
    found = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if found is None:
        raise NotBuilt(
            "nvcc was not found when it was installed (looked in CUDA_HOME, PATH and "
            "/usr/local/cuda)"
        )
    return found


def _architectures(nvcc: str) -> tuple[str, ...]:
    """TORCH_CUDA_ARCH_LIST, or of the default list what this nvcc knows."""
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    if not wanted:
        known = set(_output([nvcc, "--list-gpu-arch"]).split())
        wanted = [a for a in ARCHITECTURES if f"compute_{_number(a)}" in known]
        if not any(a.endswith("+PTX") for a in wanted):
            wanted[-1] += "+PTX"
    for architecture in wanted:
        if re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", architecture) is None:
            raise PlatformError(
                f"TORCH_CUDA_ARCH_LIST: {architecture!r} is not like '9.0' or '9.0+PTX'"
            )
        if int(_number(architecture).rstrip("af")) < OLDEST_ARCHITECTURE:
            raise NotBuilt(
                f"TORCH_CUDA_ARCH_LIST holds {architecture}; the CUDA kernels need at least 8.0"
            )
    return tuple(wanted)


def _number(architecture: str) -> str:
    return architecture.removesuffix("+PTX").replace(".", "")


def _generate(architectures: Iterable[str]) -> list[str]:
    flags = []
    for architecture in architectures:
        number = _number(architecture)
        code = f"sm_{number}"
        if architecture.endswith("+PTX"):
            code = f"[{code},compute_{number}]"
        flags += ["-gencode", f"arch=compute_{number},code={code}"]
    return flags


def _failure(command: tuple[str, ...], flags: Iterable[str], code: str) -> str | None:
    """None if the code compiles, else the compiler's message."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text(code)
        result = subprocess.run(
            [*command, *flags, "-c", str(source), "-o", str(source.with_suffix(".o"))],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    return None if result.returncode == 0 else result.stderr


def _output(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def _run(command: list[str], log_of: Path | None = None) -> None:
    result = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if log_of is not None:
        Path(f"{log_of}.log").write_text(result.stdout)
    else:
        sys.stdout.write(result.stdout)
    if result.returncode != 0:
        raise CompileError(f"{shlex.join(command)}\n{result.stdout}")
