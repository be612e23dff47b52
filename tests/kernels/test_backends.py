"""Choice of backend, what runs, what can run, and what importing costs."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
import threading
import types
from pathlib import Path
from typing import Any

import pytest
import torch

import magsd_kernels as mk
from magsd_kernels import environment, native
from magsd_kernels.backends import OLDEST_OF_TRITON, OPERATIONS, preference, select

from .cases import BY_NAME, CASES, all_cases, differentiable_cases
from .support import fresh_python, tensors_of

PACKAGE = Path(mk.__file__).parent
NAMES = ("reference", "cpu", "cuda", "triton", "auto")
CASE = BY_NAME["dim"]


def unavailable() -> str:
    """A known backend that cannot run on CPU tensors here."""
    return next(name for name in ("cuda", "triton", "cpu") if mk.backends()[name] != "available")


class Ran(list[str]):
    """Backends whose own code ran inside the `with` block, in order, without repetition.

    Reference and Triton show by the Python functions entered under magsd_kernels/<backend>/, the
    native libraries by the operators magsd_<backend>::... that the profiler saw. Nothing in
    magsd_kernels takes part in the answer.
    """

    def __enter__(self) -> Ran:
        self.folders = {str(PACKAGE / name) + os.sep: name for name in ("reference", "triton")}
        self.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
        self.profiler.__enter__()
        sys.setprofile(self.entered)
        return self

    def entered(self, frame: types.FrameType, event: str, _: Any) -> None:
        if event == "call":
            for folder, name in self.folders.items():
                if frame.f_code.co_filename.startswith(folder):
                    self.note(name)

    def note(self, name: str) -> None:
        if name not in self:
            self.append(name)

    def __exit__(self, *error: Any) -> None:
        sys.setprofile(None)
        self.profiler.__exit__(*error)
        for event in self.profiler.events():
            for name in ("cpu", "cuda"):
                if event.name.startswith(f"magsd_{name}::"):
                    self.note(name)


def call(**options: Any) -> torch.Tensor:
    return CASE.function(**CASE.arguments(), **options)


# ---------------------------------------------------------------- what runs


@all_cases
def test_the_backend_asked_for_runs_forward_and_backward(target, case):
    arguments = case.arguments(device=target.device)
    with Ran() as ran:
        out = tensors_of(target.call(case.function, **arguments))
    assert ran == [target.backend]
    if case.differentiable and target.device == "cpu":
        # On a GPU autograd runs in a thread of its own, which Python's profiler does not see.
        total = sum(x.sum() for x in out)
        with Ran() as ran:
            torch.autograd.grad(total, case.leaves(arguments))
        assert ran == [target.backend]


@differentiable_cases
def test_backward_stays_on_the_backend_of_its_forward(case):
    arguments = case.arguments()
    out = tensors_of(case.function(**arguments, backend="reference"))
    total = sum(x.sum() for x in out)
    with mk.use_backend(unavailable()), Ran() as ran:
        torch.autograd.grad(total, case.leaves(arguments))
    assert ran == ["reference"]


def test_the_operator_carries_the_backends_name(target):
    """The record of what runs is also in the traced operator, its last argument."""
    seen: list[str] = []

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "magsd":
                seen.append(args[-1])
            return func(*args, **(kwargs or {}))

    arguments = CASE.arguments(device=target.device)
    with Record():
        target.call(CASE.function, **arguments)
    assert seen == [target.backend]


# ---------------------------------------------------------------- the argument


@all_cases
def test_every_function_takes_a_backend(case):
    parameter = inspect.signature(case.function).parameters["backend"]
    assert parameter.default is None
    assert parameter.kind is inspect.Parameter.KEYWORD_ONLY


@all_cases
def test_unknown_name_lists_the_names(case):
    with pytest.raises(ValueError, match="backend") as caught:
        case.function(**case.arguments(), backend="fastest")
    assert "fastest" in str(caught.value)
    assert all(name in str(caught.value) for name in NAMES)


@all_cases
@pytest.mark.parametrize("name", ["cpu", "cuda", "triton"])
def test_an_explicit_name_never_falls_back(case, name):
    """On CPU tensors `cuda` cannot run unless emulated; others may be unavailable here."""
    state = mk.backends()[name]
    if state == "available" and (name != "cuda" or native.emulates_cuda()):
        pytest.skip(f"{name} can run here")
    with Ran() as ran, pytest.raises(mk.BackendUnavailable) as caught:
        case.function(**case.arguments(), backend=name)
    message = str(caught.value)
    assert name in message
    assert len(message) > len(name) + 20
    assert state == "available" or state in message
    assert not ran


def test_unavailable_is_a_runtime_error():
    assert issubclass(mk.BackendUnavailable, RuntimeError)


@all_cases
def test_auto_runs_anything_and_is_the_default(case):
    with Ran() as by_name:
        case.function(**case.arguments(), backend="auto")
    with Ran() as by_default:
        case.function(**case.arguments())
    assert by_name == by_default
    assert len(by_name) == 1


@pytest.mark.parametrize("wrong", [3, b"reference"])
def test_a_name_of_the_wrong_type(wrong):
    with pytest.raises((TypeError, ValueError), match="backend"):
        call(backend=wrong)


def test_bad_arguments_raise_before_a_missing_backend():
    """What is wrong with the call itself is said on every machine alike."""
    with pytest.raises(TypeError, match="theta"):
        mk.attention_dim(
            torch.zeros(1, 1, 4, 4), torch.ones(1, 1, 2, 2), 0.5, backend=unavailable()
        )


# ---------------------------------------------------------------- use_backend


def test_use_backend_sets_and_restores():
    with mk.use_backend("reference"), Ran() as ran:
        call()
    assert ran == ["reference"]
    with mk.use_backend(unavailable()), pytest.raises(mk.BackendUnavailable):
        call()
    call()


def test_use_backend_nests():
    name = unavailable()
    with mk.use_backend(name):
        with mk.use_backend("reference"):
            call()
            with mk.use_backend(name), pytest.raises(mk.BackendUnavailable):
                call()
            call()
        with pytest.raises(mk.BackendUnavailable):
            call()
    call()


def test_inner_auto_overrides_outer_name():
    with mk.use_backend(unavailable()), mk.use_backend("auto"):
        call()


def test_the_argument_overrides_use_backend():
    with mk.use_backend(unavailable()):
        call(backend="reference")
    with mk.use_backend("reference"), pytest.raises(mk.BackendUnavailable):
        call(backend=unavailable())


def test_use_backend_restores_after_an_error():
    with pytest.raises(KeyError), mk.use_backend(unavailable()):
        raise KeyError
    call()


def test_one_use_backend_object_can_be_entered_again():
    again = mk.use_backend("reference")
    with mk.use_backend(unavailable()):
        for _ in range(2):
            with again:
                call()
            with pytest.raises(mk.BackendUnavailable):
                call()
        with again:
            with again:
                call()
            call()
        with pytest.raises(mk.BackendUnavailable):
            call()
    call()


def test_use_backend_unknown_name():
    with pytest.raises(ValueError, match="fastest") as caught, mk.use_backend("fastest"):
        pass
    assert all(name in str(caught.value) for name in NAMES)


def test_use_backend_does_not_leak_into_other_threads():
    results: dict[str, Any] = {}
    entered, release = threading.Event(), threading.Event()

    def hold() -> None:
        with mk.use_backend(unavailable()):
            entered.set()
            release.wait(30)
            try:
                call()
            except mk.BackendUnavailable as error:
                results["inside"] = error

    thread = threading.Thread(target=hold)
    thread.start()
    assert entered.wait(30)
    try:
        results["outside"] = call()
    finally:
        release.set()
        thread.join(30)
    assert isinstance(results["outside"], torch.Tensor)
    assert isinstance(results["inside"], mk.BackendUnavailable)


# ---------------------------------------------------------------- MAGSD_BACKEND


def test_environment_names_the_backend(monkeypatch):
    monkeypatch.setenv("MAGSD_BACKEND", "reference")
    with Ran() as ran:
        call()
    assert ran == ["reference"]
    monkeypatch.setenv("MAGSD_BACKEND", unavailable())
    with pytest.raises(mk.BackendUnavailable):
        call()


def test_use_backend_and_argument_override_the_environment(monkeypatch):
    monkeypatch.setenv("MAGSD_BACKEND", unavailable())
    call(backend="reference")
    with mk.use_backend("reference"):
        call()
    with mk.use_backend("auto"):
        call()


def test_environment_unknown_name_lists_the_names(monkeypatch):
    monkeypatch.setenv("MAGSD_BACKEND", "fastest")
    with pytest.raises(ValueError, match="fastest") as caught:
        call()
    assert all(name in str(caught.value) for name in NAMES)


def test_environment_of_a_fresh_process():
    """The whole chain, from the shell: environment, then use_backend, then the argument."""
    name = unavailable()
    code = f"""
import torch, magsd_kernels as mk
x, a, t = torch.ones(1, 1, 4, 4), torch.ones(1, 1, 2, 2), torch.full((1,), 0.5)
try:
    mk.attention_dim(x, a, t)
except mk.BackendUnavailable as error:
    assert {name!r} in str(error)
    print("refused")
with mk.use_backend("reference"):
    mk.attention_dim(x, a, t)
mk.attention_dim(x, a, t, backend="auto")
print("done")
"""
    result = fresh_python(code, MAGSD_BACKEND=name)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["refused", "done"]


# ---------------------------------------------------------------- backends() and info


def test_every_operation_is_named():
    """Also one whose module nothing else tells of."""
    names = [path.stem for path in PACKAGE.glob("[a-z]*.py")]
    modules = [importlib.import_module(f"magsd_kernels.{name}") for name in names]
    assert {m._OPERATION for m in modules if hasattr(m, "_OPERATION")} == set(OPERATIONS)


def test_backends_says_available_or_why_not():
    states = mk.backends()
    assert list(states) == [name for name in NAMES if name != "auto"]
    assert states["reference"] == "available"
    for state in states.values():
        assert isinstance(state, str)
        assert state == "available" or len(state) > 8
    if not torch.cuda.is_available() and not native.emulates_cuda():
        assert states["cuda"] != "available"


def test_backends_gives_a_fresh_dict():
    states = mk.backends()
    states["reference"] = "spoiled"
    assert mk.backends()["reference"] == "available"


def test_available_means_that_something_runs(target):
    """Every backend called available runs at least one case."""
    count = 0
    for case in CASES:
        try:
            case.function(**case.arguments(device=target.device), backend=target.backend)
        except mk.BackendUnavailable:
            continue
        count += 1
    assert count > 0


def test_info_prints_what_a_bug_report_needs():
    run = "import runpy; runpy.run_module('magsd_kernels.info', run_name='__main__')"
    result = fresh_python(run, **{environment.EMULATE_CUDA: str(int(native.emulates_cuda()))})
    assert result.returncode == 0, result.stderr
    out = result.stdout
    assert mk.__version__ in out
    assert torch.__version__ in out
    assert ".".join(map(str, sys.version_info[:2])) in out
    for name, state in mk.backends().items():
        assert any(name in line and state in line for line in out.splitlines()), name
    assert "device" in out.lower()
    assert "build" in out.lower()


def test_auto_prefers_triton_where_there_is_no_cuda(monkeypatch):
    assert set(preference("cuda")) == {"cuda", "triton"}
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert preference("cuda") == ("triton",)
    assert preference("xpu") == ("triton",)
    assert preference("cpu") == ("cpu",)
    assert preference("mps") == ()


def see(monkeypatch: pytest.MonkeyPatch, *devices: tuple[int, int]) -> None:
    """Let the package see GPUs of these compute capabilities, Triton, and no CUDA library."""
    pytest.importorskip("triton")
    module = importlib.import_module("magsd_kernels.backends")
    monkeypatch.setattr(module, "_INTERPRETED", False)
    monkeypatch.setattr(module, "_DEVICES", {"cuda": ("cuda",), "triton": ("cuda", "xpu")})
    monkeypatch.setattr(module, "_resolved", {})
    monkeypatch.setattr(native, "_states", {"cuda": "not built"})
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(devices))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: devices[i])


def on_a_gpu(index: int = 0) -> Any:
    """What `select` asks of a tensor; torch 2.10 starts CUDA for a fake one."""
    return types.SimpleNamespace(device=torch.device("cuda", index), dtype=torch.float32)


@pytest.mark.parametrize("devices", [[(7, 5)], [(6, 1)], [(7, 0), (7, 5)]], ids=str)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_gpus_that_triton_does_not_serve_take_the_reference(operation, devices, monkeypatch):
    see(monkeypatch, *devices)
    major, minor = devices[0]
    reason = f"Triton needs compute capability 8.0, but cuda:0 has {major}.{minor}"
    assert mk.backends()["triton"] == reason
    assert select(operation, "auto", on_a_gpu()) == "reference"
    with pytest.raises(mk.BackendUnavailable, match=reason):
        select(operation, "triton", on_a_gpu())


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_an_old_gpu_takes_nothing_from_a_new_one(backend, monkeypatch):
    """Each tensor's own device decides."""
    see(monkeypatch, (7, 5), (9, 0))
    module = importlib.import_module("magsd_kernels.backends")
    monkeypatch.setattr(module, "ON_NVIDIA", (backend,))
    monkeypatch.setattr(native, "_states", {"cuda": None})
    monkeypatch.setattr(native, "build", lambda _: {"architectures": "8.0, 9.0+PTX"})
    assert mk.backends()[backend] == "available"
    assert select("bilinear_pool", "auto", on_a_gpu(0)) == "reference"
    assert select("bilinear_pool", "auto", on_a_gpu(1)) == backend
    assert select("bilinear_pool", backend, on_a_gpu(1)) == backend
    with pytest.raises(mk.BackendUnavailable, match=r"cuda:0 has 7\.5$"):
        select("bilinear_pool", backend, on_a_gpu(0))


@pytest.mark.parametrize("devices", [[OLDEST_OF_TRITON], [(9, 0), (12, 0)]], ids=str)
def test_gpus_that_triton_serves_take_it(devices, monkeypatch):
    see(monkeypatch, *devices)
    assert mk.backends()["triton"] == "available"
    assert {select(operation, "auto", on_a_gpu()) for operation in OPERATIONS} == {"triton"}


def test_compute_capability_is_a_matter_of_nvidia(monkeypatch):
    see(monkeypatch, (7, 5))
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert mk.backends()["triton"] == "available"


def test_triton_in_a_process_that_cannot_use_cuda(monkeypatch):
    see(monkeypatch, (9, 0))

    def refuse(device: int) -> tuple[int, int]:
        raise RuntimeError("Cannot re-initialize CUDA in forked subprocess")

    monkeypatch.setattr(torch.cuda, "get_device_capability", refuse)
    assert mk.backends()["triton"].startswith("torch cannot use CUDA: Cannot re-initialize")
