"""The loader of the compiled library, and every compilation that it holds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import magsd_kernels as mk
from magsd_kernels import environment, native

from .support import Library, every_library, fresh_python

CPU = Library("cpu", "cpu", "cpu")

_COMPARE = """
from magsd_kernels import compare, native
for case in compare.CASES:
    for dtype in compare.DTYPES.values():
        found, expected = (
            compare.outcome(case, name, case.arguments(dtype=dtype, device=library.device))
            for name in (library.backend, "reference")
        )
        for name, x in found.items():
            wrong = compare.difference(x, expected[name], name)
            assert wrong is None, f"{case.name}, {dtype}: {wrong}"
"""


@every_library
def test_the_library_agrees_with_the_reference(library: Library):
    if library == CPU:
        pytest.skip("each of its instruction sets is compared below")
    assert library.run(_COMPARE) == ""


@pytest.mark.parametrize("capability", native.CAPABILITIES)
def test_every_instruction_set_agrees_with_the_reference(capability: str):
    """Asking for more than the processor has gives the best it has."""
    code = _COMPARE + "print(native.instruction_set())"
    ran = CPU.run(code, MAGSD_CPU_CAPABILITY=capability).strip()
    allowed = native.CAPABILITIES[: native.CAPABILITIES.index(capability) + 1]
    assert ran in allowed
    assert ran == "baseline" or capability != "baseline"


@pytest.mark.skipif(CPU.why_not() is not None, reason=str(CPU.why_not()))
def test_unknown_capability_is_reported():
    code = "import magsd_kernels; print(magsd_kernels.backends()['cpu'])"
    result = fresh_python(code, MAGSD_CPU_CAPABILITY="sse9")
    assert "MAGSD_CPU_CAPABILITY must be one of baseline, avx2, avx512" in result.stdout
    assert "'sse9'" in result.stdout


@pytest.mark.parametrize(
    ("backend", "name", "emulates"),
    [("cpu", "cpu", "0"), ("cuda", "cuda_emulated", "1")],
)
def test_states_are_told_apart(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, backend: str, name: str, emulates: str
):
    monkeypatch.setattr(native, "_FOLDER", tmp_path)
    monkeypatch.setattr(native, "_states", {})
    monkeypatch.setenv(environment.EMULATE_CUDA, emulates)
    assert str(native.why_not(backend)).startswith("not built: this installation holds no")
    (tmp_path / "build.json").write_text(f'{{"{name}": {{"not built": "no compiler at all"}}}}')
    native._states.clear()
    assert native.why_not(backend) == "not built: no compiler at all"
    (tmp_path / f"libmagsd_{name}.so").write_bytes(b"not a library")
    (tmp_path / "build.json").write_text(f'{{"{name}": {{"torch": "99.0"}}}}')
    native._states.clear()
    reason = str(native.why_not(backend))
    assert reason.startswith("built for something else than torch")
    assert "(for 99.0)" in reason
    with pytest.raises(RuntimeError, match=f"the {backend} library is not loaded: built for some"):
        native.operations(backend)


def cuda_state(
    folder: Path, monkeypatch: pytest.MonkeyPatch, cuda: str | None, devices: list[tuple[int, int]]
) -> str:
    """What is said of a library in `folder` under a torch for `cuda` that sees such devices."""
    monkeypatch.delenv("MAGSD_EMULATE_CUDA", raising=False)
    monkeypatch.setattr(native, "_FOLDER", folder)
    monkeypatch.setattr(native, "_states", {})
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(devices))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(devices))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: devices[i])
    return str(native.why_not("cuda"))


@pytest.fixture
def false_library(tmp_path: Path) -> Path:
    """A folder with a file that no loader takes, said to be a CUDA library."""
    (tmp_path / "libmagsd_cuda.so").write_bytes(b"not a library")
    built = {"torch": "2.14.0+cu130", "cuda": "13.0", "architectures": "8.0, 9.0"}
    (tmp_path / "build.json").write_text(json.dumps({"cuda": built}))
    return tmp_path


def test_a_cuda_library_that_is_not_built_is_told_without_a_gpu_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "build.json").write_text('{"cuda": {"not built": "nvcc was not found"}}')
    assert cuda_state(tmp_path, monkeypatch, "13.0", []) == "not built: nvcc was not found"


@pytest.mark.parametrize(
    ("cuda", "devices", "reason"),
    [
        (None, [], "built for CUDA 13.0, but torch {} is not a CUDA build"),
        ("12.8", [(9, 0)], "built for CUDA 13.0, but torch {} is built for CUDA 12.8"),
        ("13.1", [], "torch sees no CUDA device"),
        ("13.1", [(7, 5), (7, 0)], "built for compute capability 8.0, 9.0, but cuda:0 has 7.5"),
        ("13.1", [(9, 0), (7, 5)], "built for something else than torch {} (for 2.14.0+cu130): "),
        (
            "13.1",
            [(12, 0)],
            "built for compute capability 8.0, 9.0, but cuda:0 has 12.0; "
            "reinstall with TORCH_CUDA_ARCH_LIST=12.0",
        ),
        ("13.1", [(9, 0), (8, 6)], "built for something else than torch {} (for 2.14.0+cu130): "),
    ],
    ids=[
        "cpu_torch",
        "other_major",
        "no_device",
        "too_old",
        "one_too_old",
        "other_device",
        "not_loadable",
    ],
)
def test_states_of_a_cuda_library_are_told_apart(
    false_library: Path,
    monkeypatch: pytest.MonkeyPatch,
    cuda: str | None,
    devices: list[tuple[int, int]],
    reason: str,
):
    state = cuda_state(false_library, monkeypatch, cuda, devices)
    assert state.startswith(reason.format(torch.__version__))


@pytest.mark.parametrize(
    ("architecture", "served", "not_served"),
    [
        ("8.0", [(8, 0), (8, 9)], [(7, 5), (9, 0)]),
        ("8.6", [(8, 6), (8, 7)], [(8, 0), (12, 0)]),
        ("9.0+PTX", [(9, 0), (10, 0), (12, 1)], [(8, 9)]),
        ("9.0a+PTX", [(9, 0)], [(8, 9), (10, 0)]),
        ("10.0f+PTX", [(10, 0), (10, 3)], [(9, 0), (12, 0)]),
    ],
)
def test_devices_that_an_architecture_serves(
    architecture: str, served: list[tuple[int, int]], not_served: list[tuple[int, int]]
):
    assert all(native._serves(architecture, device) for device in served)
    assert not any(native._serves(architecture, device) for device in not_served)


def test_a_process_that_cannot_use_cuda_is_told(
    false_library: Path, monkeypatch: pytest.MonkeyPatch
):
    cuda_state(false_library, monkeypatch, "13.0", [(9, 0)])

    def refuse(device: int) -> tuple[int, int]:
        raise RuntimeError("Cannot re-initialize CUDA in forked subprocess")

    monkeypatch.setattr(torch.cuda, "get_device_capability", refuse)
    native._states.clear()
    assert str(native.why_not("cuda")).startswith("torch cannot use CUDA: Cannot re-initialize")


_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(not native.library("cpu").is_file(), reason="the C++ kernels are not built")
@pytest.mark.skipif(
    not _HUGE_PAGES.is_file() or "[never]" in _HUGE_PAGES.read_text(),
    reason="this system has no transparent huge pages",
)
def test_large_results_are_not_written_page_fault_by_page_fault():
    """glibc maps 36 MB anew for every tensor; pages of 4 KiB would mean 8800 faults."""
    resource = pytest.importorskip("resource")
    images, attention = torch.rand(1, 1, 3000, 3000), torch.rand(1, 1, 4, 4)
    arguments = images, attention, torch.tensor([0.5])
    mk.attention_drop(*arguments, backend="cpu")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    mk.attention_drop(*arguments, backend="cpu")
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    assert faults < images.nbytes // 4096 // 2
