"""Builds the compiled libraries; everything that is not code to compile stands in pyproject.toml.

`magsd_kernels/lib` receives libmagsd_cpu.so, libmagsd_cuda.so, build.json, which says how each was
built or why it was not, and cuda_resources.json, the registers and spills of the CUDA kernels. The
libraries hold no Python, so that one wheel (py3-none-<platform>) serves every Python and every
torch from 2.10 on; see csrc/toolchain.py.

MAGSD_BUILD_CPU, MAGSD_BUILD_CUDA = auto (default: where the library cannot be built the install
succeeds and `magsd_kernels.backends()` gives the reason) | 0 | 1 (where it cannot be built the
install fails). A compile that fails always fails the install. MAGSD_BUILD_EMULATION=1 adds the
CUDA kernels for the host, for tests. CXX, CXXFLAGS (C++ alone; nvcc reads NVCC_APPEND_FLAGS),
LDFLAGS, CUDA_HOME, TORCH_CUDA_ARCH_LIST and MAX_JOBS are honored.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
SOURCES = ROOT / "csrc"
sys.path.insert(0, str(SOURCES))

import ptxas  # noqa: E402
import toolchain  # noqa: E402

del sys.path[0]


class BuildLibraries(build_ext):
    """Compiles the libraries, or writes why they were not, into magsd_kernels/lib."""

    def run(self) -> None:
        """Build into the wheel's tree, or into the checkout for an editable install."""
        folder = self._lib()
        folder.mkdir(parents=True, exist_ok=True)
        reports = {}
        for name in toolchain.LIBRARIES:
            objects = Path(self.build_temp, f"magsd_{name}").resolve()
            reports[name] = toolchain.build(name, objects, folder.resolve() / f"libmagsd_{name}.so")
            if name != "cuda_emulated" and "not built" in reports[name]:
                self.warn(f"the {name} kernels are not built: {reports[name]['not built']}")
        resources = folder / "cuda_resources.json"
        resources.unlink(missing_ok=True)
        if "not built" not in reports["cuda"]:
            ptxas.write_resources(
                Path(self.build_temp, "magsd_cuda"),
                sorted((SOURCES / "cuda").glob("*.cu")),
                reports["cuda"]["compiler"],
                resources,
            )
        (folder / "build.json").write_text(json.dumps(reports, indent=1) + "\n")

    def _lib(self) -> Path:
        inplace = self.inplace or getattr(self, "editable_mode", False)
        return Path(ROOT if inplace else self.build_lib, "magsd_kernels", "lib")

    def get_outputs(self) -> list[str]:
        """Files that belong to the wheel."""
        return [str(path) for path in sorted(self._lib().glob("*"))]

    def get_output_mapping(self) -> dict[str, str]:
        """An editable install uses the checkout's own files."""
        return {}


class PlatformWheel(bdist_wheel):
    """No Python in the libraries: any Python 3 on this platform."""

    def get_tag(self) -> tuple[str, str, str]:
        """py3-none-<platform>."""
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[Extension("magsd_kernels.lib.libmagsd_cpu", sources=[])],
    cmdclass={"build_ext": BuildLibraries, "bdist_wheel": PlatformWheel},
)
