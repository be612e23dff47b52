"""Builds the compiled library; everything that is not code to compile stands in pyproject.toml.

`magsd_kernels/lib/libmagsd_cpu.so` uses the LibTorch stable ABI and holds no Python, so that one
wheel (py3-none-<platform>) serves every Python and every torch from 2.10 on. Each csrc/cpu/<op>.cpp
is compiled once per instruction set; the library chooses when it is loaded.

MAGSD_BUILD_CPU = auto (default: without a compiler the install succeeds and
`magsd_kernels.backends()` gives the reason) | 0 | 1 (without a compiler the install fails). A
compile that fails always fails the install. CXX, CXXFLAGS, LDFLAGS and MAX_JOBS are honoured.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, PlatformError

ROOT = Path(__file__).resolve().parent
SOURCES = ROOT / "csrc"
STABLE_ABI = "0x020a000000000000"  # the functions of torch 2.10
FLAGS = (
    "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math",
    "-Wall", "-Wextra", "-Wno-unknown-pragmas", f"-DTORCH_TARGET_VERSION={STABLE_ABI}",
)  # fmt: skip
_AVX2 = ("-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2")
_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512")
INSTRUCTION_SETS = {"baseline": (), "avx2": _AVX2, "avx512": (*_AVX2, *_AVX512)}
#: Operations whose boxes and thresholds must round as they are written, without fused products.
UNFUSED = ("attention_augment", "attention_sampling")


class NotBuilt(Exception):
    """Why this machine cannot build a library."""


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler, what it can do, and the torch to compile against."""

    command: tuple[str, ...]
    version: str
    standard: str
    instruction_sets: tuple[str, ...]
    includes: tuple[str, ...]
    libraries: tuple[str, ...]
    torch: str

    @classmethod
    def find(cls) -> Compiler:
        """The compiler of CXX, else c++, g++ or clang++."""
        if not sys.platform.startswith(("linux", "darwin")):
            raise NotBuilt(f"the C++ kernels are not built on {sys.platform}")
        wanted = os.environ.get("CXX")
        candidates = [shlex.split(wanted)] if wanted else [["c++"], ["g++"], ["clang++"]]
        command = next((tuple(c) for c in candidates if shutil.which(c[0])), None)
        if command is None:
            names = ", ".join(c[0] for c in candidates)
            raise NotBuilt(f"no C++ compiler was found when it was installed (looked for {names})")
        try:
            import torch
            from torch.utils import cpp_extension
        except ImportError as error:
            raise NotBuilt(f"torch could not be imported when it was installed: {error}") from error
        includes = tuple(cpp_extension.include_paths())
        headers = [f"-isystem{path}" for path in includes]
        probe = "#include <torch/csrc/stable/library.h>\n#include <torch/csrc/stable/ops.h>\n"
        target = f"-DTORCH_TARGET_VERSION={STABLE_ABI}"
        for standard in ("-std=c++17", "-std=c++20"):
            failure = _try(command, [standard, target, *headers], probe)
            if failure is None:
                break
        else:
            raise CompileError(f"{command[0]} cannot compile torch's stable headers:\n{failure}")
        x86 = platform.machine().lower() in ("x86_64", "amd64", "i686")
        sets = tuple(
            name
            for name, flags in INSTRUCTION_SETS.items()
            if not flags or (x86 and _try(command, list(flags), "int main() {}") is None)
        )
        version = subprocess.run(
            [*command, "--version"], capture_output=True, text=True, check=False
        ).stdout.partition("\n")[0]
        libraries = tuple(cpp_extension.library_paths())
        return cls(command, version, standard, sets, includes, libraries, torch.__version__)

    def commands(self, folder: Path, library: Path) -> tuple[dict[Path, list[str]], list[str]]:
        """Compilations, object to command, and the link; the baseline's objects come first."""
        extra = shlex.split(os.environ.get("CXXFLAGS", ""))
        common = [
            *self.command, self.standard, *FLAGS, f"-I{SOURCES}",
            *(f"-isystem{path}" for path in self.includes), *extra,
        ]  # fmt: skip
        have = [f"-DMAGSD_HAVE_{name.upper()}" for name in self.instruction_sets[1:]]
        registration = SOURCES / "cpu" / "registration.cpp"
        compiles = {folder / "registration.o": [*common, *have, "-c", str(registration)]}
        operations = sorted(set((SOURCES / "cpu").glob("*.cpp")) - {registration})
        for name in self.instruction_sets:
            for source in operations:
                fused = "off" if source.stem in UNFUSED else "fast"
                compiles[folder / f"{source.stem}.{name}.o"] = [
                    *common, *INSTRUCTION_SETS[name], f"-ffp-contract={fused}",
                    f"-DMAGSD_ISA={name}", "-c", str(source),
                ]  # fmt: skip
        link = [*self.command, "-shared", *map(str, compiles), "-o", str(library)]
        if sys.platform == "darwin":
            link += ["-undefined", "dynamic_lookup"]
        else:
            link += [*(f"-L{path}" for path in self.libraries), "-ltorch_cpu"]
        return compiles, [*link, *extra, *shlex.split(os.environ.get("LDFLAGS", ""))]

    def description(self) -> dict[str, object]:
        """What magsd_kernels.info reports of the build."""
        return {
            "compiler": self.version,
            "torch": self.torch,
            "flags": " ".join((self.standard, *FLAGS, os.environ.get("CXXFLAGS", ""))).strip(),
            "instruction sets": ", ".join(self.instruction_sets),
        }


def _try(command: tuple[str, ...], flags: list[str], code: str) -> str | None:
    """None if the code compiles, else the compiler's message."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text(code)
        result = subprocess.run(
            [*command, *flags, "-c", str(source), "-o", str(source.with_suffix(".o"))],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    return None if result.returncode == 0 else result.stderr


def _compile(compiler: Compiler, folder: Path, library: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    library.parent.mkdir(parents=True, exist_ok=True)
    compiles, link = compiler.commands(folder, library)
    jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    ninja = shutil.which("ninja")
    if ninja is not None:
        _run([ninja, "-C", str(folder), "-j", str(jobs), "-f", _ninja_file(folder, compiles)])
    else:
        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(_run, [[*c, "-o", str(o)] for o, c in compiles.items()]))
    _run(link)


def _ninja_file(folder: Path, compiles: dict[Path, list[str]]) -> str:
    """Name of a file, in `folder`, that recompiles what has changed."""
    lines = [
        "rule compile",
        "  command = $line -MMD -MF $out.d -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
    ]
    for output, command in compiles.items():
        paths = [str(p).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")
                 for p in (output, command[-1])]  # fmt: skip
        lines += [f"build {paths[0]}: compile {paths[1]}"]
        lines += [f"  line = {shlex.join(command).replace('$', '$$')}"]
    (folder / "build.ninja").write_text("\n".join(lines) + "\n")
    return "build.ninja"


def _run(command: list[str]) -> None:
    result = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    sys.stdout.write(result.stdout)
    if result.returncode != 0:
        raise CompileError(f"{shlex.join(command)}\n{result.stdout}")


class BuildLibrary(build_ext):
    """Compiles the library, or writes why it was not, into magsd_kernels/lib."""

    def run(self) -> None:
        """Build into the wheel's tree, or into the checkout for an editable install."""
        folder = self._lib()
        folder.mkdir(parents=True, exist_ok=True)
        library = folder / "libmagsd_cpu.so"
        library.unlink(missing_ok=True)
        wanted = os.environ.get("MAGSD_BUILD_CPU", "auto").strip().lower() or "auto"
        if wanted not in ("auto", "0", "1"):
            raise PlatformError(f"MAGSD_BUILD_CPU must be auto, 0 or 1, got {wanted!r}")
        try:
            if wanted == "0":
                raise NotBuilt("MAGSD_BUILD_CPU=0 when it was installed")
            compiler = Compiler.find()
            _compile(compiler, Path(self.build_temp, "magsd_cpu").resolve(), library.resolve())
            report = compiler.description()
        except NotBuilt as reason:
            if wanted == "1":
                raise PlatformError(f"MAGSD_BUILD_CPU=1, but {reason}") from reason
            self.warn(f"the C++ kernels are not built: {reason}")
            report = {"not built": str(reason)}
        (folder / "build.json").write_text(json.dumps({"cpu": report}, indent=1) + "\n")

    def _lib(self) -> Path:
        inplace = self.inplace or getattr(self, "editable_mode", False)
        return Path(ROOT if inplace else self.build_lib, "magsd_kernels", "lib")

    def get_outputs(self) -> list[str]:
        """Files that belong to the wheel."""
        return [str(path) for path in sorted(self._lib().glob("*"))]

    def get_output_mapping(self) -> dict[str, str]:
        """An editable install uses the checkout's own files."""
        return {}

    def get_source_files(self) -> list[str]:
        """Files that belong to the sdist."""
        files = [p for p in SOURCES.rglob("*") if p.suffix in (".cpp", ".h", ".cu", ".cuh")]
        return [str(path.relative_to(ROOT)) for path in sorted(files)]


class PlatformWheel(bdist_wheel):
    """No Python in the library: any Python 3 on this platform."""

    def get_tag(self) -> tuple[str, str, str]:
        """py3-none-<platform>."""
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[Extension("magsd_kernels.lib.libmagsd_cpu", sources=[])],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": PlatformWheel},
)
