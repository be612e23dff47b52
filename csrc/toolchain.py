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
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import nvcc as nvidia
from commands import NotBuilt, failure, gist, jobs, output, run, words_of
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
#: Files (by the start of their names) whose boxes, thresholds and differences of equal products
#: must round as they are written, without fused products.
UNFUSED = ("attention_augment", "attention_sampling", "soft_distance")

NVCC_FLAGS = (
    "-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Xcompiler", "-fPIC,-fvisibility=hidden",
    "-Xptxas", "-v", "-DUSE_CUDA", "-DMAGSD_DEVICE_CUDA", "-DMAGSD_ISA=cuda",
    f"-DTORCH_TARGET_VERSION={STABLE_ABI}",
)  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """Commands of one library: object to compilation, the link, and what to write down."""

    compiles: dict[Path, list[str]]
    link: list[str]
    libraries: list[str]
    report: dict[str, str]

    def compile(self, folder: Path) -> None:
        """Compile what has changed since the last time in `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        for log in set(folder.glob("*.log")) - {Path(f"{o}.log") for o in self.compiles}:
            log.unlink()  # of a source that is gone
        ninja = shutil.which("ninja")
        if ninja is not None:
            self._write_ninja_file(folder / "build.ninja")
            run([ninja, "-C", str(folder), "-j", str(jobs())])
        else:
            with ThreadPoolExecutor(jobs()) as pool:
                list(pool.map(lambda o: run([*self.compiles[o], "-o", str(o)], o), self.compiles))

    def link_to(self, library: Path) -> None:
        """Make the library of the objects."""
        library.parent.mkdir(parents=True, exist_ok=True)
        search = [f"-L{path}" for path in _torch().library_paths]
        objects = map(str, self.compiles)
        run([*self.link, *objects, "-o", str(library), *search, *self.libraries])

    def _write_ninja_file(self, path: Path) -> None:
        """Recompiles, in the file's folder, what has changed: commands, sources, any header."""
        lines = [
            "rule compile",
            "  command = $line -MD -MF $out.d -o $out > $out.log 2>&1 || { cat $out.log; exit 1; }",
            "  description = $out",
            "  depfile = $out.d",
            "  deps = gcc",
        ]
        for target, command in self.compiles.items():
            source = command[-1].replace("$", "$$").replace(" ", "$ ").replace(":", "$:")
            lines += [f"build {target.name}: compile {source}"]
            lines += [f"  line = {shlex.join(command).replace('$', '$$')}"]
        path.write_text("\n".join(lines) + "\n")


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
    nvcc = nvidia.find_nvcc()
    version = output([nvcc, "--version"])
    release = re.search(r"release (\d+)\.(\d+), V([\d.]+)", version)
    if release is None:
        raise NotBuilt(f"{nvcc} --version was not understood: {version}")
    if release[1] != torch.cuda.partition(".")[0]:
        raise NotBuilt(
            f"{nvcc} is of CUDA {release[1]}.{release[2]}, but torch {torch.version} is built for "
            f"CUDA {torch.cuda}"
        )
    host = _host_compiler()
    words = (nvcc, *(["-ccbin", host] if host else []))
    problem = failure(words, (), "__global__ void kernel() {}", ".cu")
    if problem is not None:
        raise NotBuilt(
            f"{nvcc} cannot compile an empty kernel with the C++ compiler "
            f"{host or 'of its choice'}: {gist(problem)}"
        )
    architectures, left_out = nvidia.architectures(nvcc, torch.gpus)
    sources = sorted((SOURCES / "cuda").glob("*.cu"))
    # Where there are more processors than files, those of one file compile beside each other.
    threads = min(max(jobs() // max(len(sources), 1), 1), len(architectures))
    command = [
        *words, *NVCC_FLAGS, f"--threads={threads}", *nvidia.flags(architectures), f"-I{SOURCES}",
        *(flag for path in torch.includes for flag in ("-isystem", path)),
    ]  # fmt: skip
    compiles = {
        folder / f"{source.stem}.o": [
            *command, f"-fmad={'false' if source.stem.startswith(UNFUSED) else 'true'}",
            "-c", str(source),
        ]
        for source in sources
    }  # fmt: skip
    report = {
        "compiler": f"nvcc {release[3]}",
        "cuda": f"{release[1]}.{release[2]}",
        "torch": torch.version,
        "flags": " ".join(NVCC_FLAGS),
        "architectures": ", ".join(architectures),
    }
    if left_out:
        report["left out"] = left_out
    # nvcc hands on what follows -Xcompiler; a comma would part it.
    given = ["-Xcompiler=" + flag.replace(",", "\\,") for flag in words_of("LDFLAGS")]
    link = [*words, "-shared", "-cudart", "static"]
    return Plan(compiles, link, ["-ltorch_cpu", "-ltorch_cuda", *given], report)


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
        made.compile(folder)
        made.link_to(library)
        return made.report
    except NotBuilt as reason:
        if wanted == "1":
            raise PlatformError(f"{variable}=1, but {reason}") from reason
        return {"not built": str(reason)}


@dataclass(frozen=True)
class _Torch:
    """The torch to compile against."""

    version: str
    cuda: str | None
    includes: tuple[str, ...]
    library_paths: tuple[str, ...]
    gpus: tuple[str, ...] = ()  # compute capabilities of those that are visible, as "9.0"


@functools.cache
def _torch() -> _Torch:
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError as error:
        raise NotBuilt(f"torch could not be imported when it was installed: {error}") from error
    cuda = torch.cuda if torch.cuda.is_available() else None
    capabilities = (
        [cuda.get_device_capability(i) for i in range(cuda.device_count())] if cuda else []
    )
    return _Torch(
        torch.__version__,
        torch.version.cuda,
        tuple(cpp_extension.include_paths()),
        tuple(cpp_extension.library_paths()),
        tuple(f"{major}.{minor}" for major, minor in sorted(set(capabilities))),
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
            *words_of("CXXFLAGS"),
        ]  # fmt: skip

    def link(self) -> tuple[list[str], list[str]]:
        command = [*self.words, "-shared", *words_of("CXXFLAGS")]
        if sys.platform == "darwin":
            return [*command, "-undefined", "dynamic_lookup"], words_of("LDFLAGS")
        return command, ["-ltorch_cpu", *words_of("LDFLAGS")]

    def report(self) -> dict[str, str]:
        return {
            "compiler": self.version,
            "torch": _torch().version,
            "flags": " ".join([self.standard, *FLAGS, *words_of("CXXFLAGS")]),
        }


@functools.cache
def _compiler() -> _Compiler:
    """The compiler of CXX, else c++, g++ or clang++."""
    if not sys.platform.startswith(("linux", "darwin")):
        raise NotBuilt(f"the C++ kernels are not built on {sys.platform}")
    wanted = words_of("CXX")
    candidates = [wanted] if wanted else [["c++"], ["g++"], ["clang++"]]
    words = next((tuple(c) for c in candidates if shutil.which(c[0])), None)
    if words is None:
        names = ", ".join(c[0] for c in candidates)
        raise NotBuilt(f"no C++ compiler was found when it was installed (looked for {names})")
    problem = failure(words, (), "int main() {}")
    if problem is not None:
        raise NotBuilt(f"{words[0]} cannot compile an empty program: {gist(problem)}")
    headers = [f"-isystem{path}" for path in _torch().includes]
    probe = "#include <torch/csrc/stable/library.h>\n#include <torch/csrc/stable/ops.h>\n"
    target = f"-DTORCH_TARGET_VERSION={STABLE_ABI}"
    for standard in ("-std=c++17", "-std=c++20"):
        problem = failure(words, [standard, target, *headers], probe)
        if problem is None:
            break
    else:
        raise CompileError(f"{words[0]} cannot compile torch's stable headers:\n{problem}")
    x86 = platform.machine().lower() in ("x86_64", "amd64", "i686")
    sets = tuple(
        name
        for name, flags in INSTRUCTION_SETS.items()
        if not flags or (x86 and failure(words, flags, "int main() {}") is None)
    )
    return _Compiler(words, output([*words, "--version"]).partition("\n")[0], standard, sets)


def _contraction(source: Path) -> str:
    return "-ffp-contract=" + ("off" if source.stem.startswith(UNFUSED) else "fast")


def _host_compiler() -> str | None:
    """The compiler of CXX for nvcc, which takes it without a launcher."""
    words = words_of("CXX")
    return next((w for w in words if Path(w).name not in ("ccache", "sccache", "distcc")), None)
