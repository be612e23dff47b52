"""The operators under opcheck, torch.compile and FakeTensorMode, and in CUDA graphs."""

from __future__ import annotations

import functools
import shutil
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import magsd_kernels as mk

from .cases import BY_NAME, CASES, all_cases, differentiable_cases, run
from .support import tensors_of

OPERATORS = sorted(
    name for name in torch._C._dispatch_get_all_op_names() if name.startswith("magsd::")
)


# ---------------------------------------------------------------- opcheck


class Recorder(TorchDispatchMode):
    """Keeps the arguments of every magsd operator that is called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, list[tuple[Any, ...]]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "magsd":
            name = func.name().removesuffix(".default")
            # A backward operator has no gradient of its own, though what it saved may ask for one.
            first_order = not name.endswith("_backward")
            copies = pytree.tree_map_only(
                Tensor,
                lambda x: x.detach().clone().requires_grad_(x.requires_grad and first_order),
                args,
            )
            self.calls.setdefault(name, []).append(copies)
        return func(*args, **(kwargs or {}))


@functools.cache
def recorded() -> dict[str, list[tuple[Any, ...]]]:
    with Recorder() as recorder:
        for case in CASES:
            run(case, case.arguments() | {"backend": "reference"})
    return recorder.calls


def test_every_registered_operator_is_called_by_a_public_function():
    assert OPERATORS
    assert set(recorded()) == set(OPERATORS)


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(target, name):
    overload = getattr(torch.ops.magsd, name.partition("::")[2]).default
    calls = recorded()[name]
    assert calls
    # What no backend decides, the autograd formula and what is traced, is tried on fast ones.
    few = {"test_utils": ("test_schema", "test_faketensor")} if target.interpreted else {}
    for *arguments, backend in calls:
        assert backend == "reference"
        there = pytree.tree_map_only(Tensor, lambda x: x.to(target.device), arguments)
        torch.library.opcheck(overload, (*there, target.backend), **few)


@differentiable_cases
def test_a_differentiable_function_calls_operators_with_inputs_that_ask_for_gradients(case):
    """Else opcheck above would see no autograd at all."""
    with Recorder() as recorder:
        case.function(**case.arguments(), backend="reference")
    calls = [args for group in recorder.calls.values() for args in group]
    assert any(x.requires_grad for args in calls for x in tensors_of(args))


# ---------------------------------------------------------------- torch.compile


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@all_cases
def test_compile_full_graph(case):
    """One graph, forward and backward, the same numbers and the same strides as eagerly."""
    compiled = torch.compile(case.function, fullgraph=True, backend="aot_eager")
    eager_arguments, arguments = case.arguments(), case.arguments()
    wanted = run(case, eager_arguments)
    found = run(case, arguments, compiled)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
        assert a.stride() == b.stride()
    for name in case.written:
        for a, b in zip(arguments[name], eager_arguments[name], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@all_cases
def test_compile_channels_last(case):
    compiled = torch.compile(case.function, fullgraph=True, backend="aot_eager")

    def arguments() -> dict[str, Any]:
        built = case.arguments()
        for leaf in tensors_of(built):
            if leaf.dim() == 4:
                leaf.data = leaf.data.contiguous(memory_format=torch.channels_last)
        return built

    for a, b in zip(run(case, arguments(), compiled), run(case, arguments()), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
        assert a.stride() == b.stride()


@all_cases
def test_compile_dynamic_batch_does_not_recompile(case):
    compiled = torch.compile(case.function, fullgraph=True, dynamic=True, backend="aot_eager")
    # Batches that equal no other size, which the compiler would take for the same number.
    run(case, case.arguments(batch=8), compiled)
    with torch._dynamo.config.patch(error_on_recompile=True):
        found = run(case, case.arguments(batch=10), compiled)
    wanted = run(case, case.arguments(batch=10))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_compile_for_another_number():
    """The second value of a float argument makes it symbolic; the graph must still be whole."""
    compiled = torch.compile(mk.attention_mixup, fullgraph=True, backend="aot_eager")
    arguments = BY_NAME["mixup"].arguments()
    for weight, padding in ((0.4, 0.1), (0.25, 0.2), (0.75, 0.05)):
        found = compiled(**arguments, weight=weight, padding=padding)
        wanted = mk.attention_mixup(**arguments, weight=weight, padding=padding)
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)


IMAGE_CASES = [case for case in CASES if "images" in case.differentiable]


@pytest.mark.parametrize("case", IMAGE_CASES, ids=lambda case: case.name)
def test_compile_dynamic_image_size_does_not_recompile(case):
    compiled = torch.compile(case.function, fullgraph=True, dynamic=True, backend="aot_eager")

    def arguments(height: int, width: int) -> dict[str, Any]:
        images = torch.linspace(-1, 1, 2 * 2 * height * width).view(2, 2, height, width)
        return case.arguments() | {"images": images.requires_grad_()}

    run(case, arguments(11, 9), compiled)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for size in ((13, 7), (8, 16)):
            found, wanted = run(case, arguments(*size), compiled), run(case, arguments(*size))
            for a, b in zip(found, wanted, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_compile_inside_use_backend():
    """A compiled function runs on the backend that was chosen when it was traced."""
    case = BY_NAME["views"]

    def chosen(**arguments: Any) -> Tensor:
        with mk.use_backend("reference"):
            return case.function(**arguments)

    compiled = torch.compile(case.function, fullgraph=True, backend="aot_eager")
    for function in (compiled, torch.compile(chosen, backend="aot_eager")):
        with mk.use_backend("reference"):
            found = run(case, case.arguments(), function)
        wanted = run(case, case.arguments() | {"backend": "reference"})
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


class Step(torch.nn.Module):
    """The published step on one feature map: every module of the package in one graph."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = torch.nn.Conv2d(1, 4, 3, stride=2)
        self.deep = torch.nn.Conv2d(4, 6, 3, stride=2)
        self.attention = mk.MultiscaleAttention((4, 6), 3)
        self.pool = mk.BilinearAttentionPool(scale=100.0)
        self.head = torch.nn.Linear(18, 4, bias=False)
        self.loss = mk.SoftDistanceLoss()

    def classify(self, images: Tensor) -> tuple[Tensor, Tensor]:
        low = self.stem(images)
        high = self.deep(low)
        attention = self.attention([low, high])
        return self.head(self.pool(high, attention)), attention

    def forward(self, images: Tensor, targets: Tensor, theta: Tensor, uniforms: Tensor) -> Tensor:
        logits, attention = self.classify(images)
        index = mk.sample_attention(attention, uniforms[:, :3])
        views = mk.attention_views(images, attention, index, theta, uniforms[:, 3:].contiguous())
        return self.loss(logits, [self.classify(view)[0] for view in views], targets).loss


def step_inputs() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(3, 1, 16, 16, generator=generator)
    theta = 0.2 + 0.4 * torch.rand(3, 3, generator=generator)
    return images, torch.tensor([0, 3, 1]), theta, torch.rand(3, 5, generator=generator)


COMPILERS = [
    "aot_eager",
    pytest.param(
        "inductor",
        marks=pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler found"),
    ),
]


@pytest.mark.parametrize("compiler", COMPILERS)
def test_compile_the_whole_step(target, compiler):
    step, twin = Step().to(target.device), Step().to(target.device)
    inputs = [x.to(target.device) for x in step_inputs()]
    with mk.use_backend(target.backend):
        wanted = twin(*inputs)
        wanted.backward()
        found = torch.compile(step, fullgraph=True, backend=compiler)(*inputs)
        found.backward()
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    for (name, a), (_, b) in zip(step.named_parameters(), twin.named_parameters(), strict=True):
        scale = float(b.grad.abs().max())
        assert a.grad is not None, name
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-4 * scale + 1e-7, msg=name)
    for (name, a), (_, b) in zip(step.named_buffers(), twin.named_buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=name)


# ---------------------------------------------------------------- no host synchronization


class InsideKernels(TorchDispatchMode):
    """Runs the kernels of magsd operators with every aten call inside them in sight.

    Called on fake tensors, the operators would run their fakes; here their CPU kernels get the
    fake tensors, and any step that needs a value on the host raises. A tensor made from Python
    numbers (torch.tensor and new_tensor, which show as lift_fresh) is a blocking copy to a GPU
    that a CUDA graph cannot capture.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernels: list[str] = []
        self.inside = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "magsd":
            self.kernels.append(func.name())
            self.inside += 1
            try:
                with self:
                    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
                    return func.redispatch(keys, *args, **(kwargs or {}))
            finally:
                self.inside -= 1
        if self.inside and func.name() == "aten::lift_fresh":
            raise DataDependentOutputException(func)
        return func(*args, **(kwargs or {}))


@all_cases
def test_reference_never_reads_a_value_on_the_host(case):
    # Targets on the CPU are checked on the host, as the contract wants; elsewhere they are not.
    device = "meta" if case.function is mk.soft_distance_loss else "cpu"

    def fake_of(x: Tensor) -> Tensor:
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)

    with FakeTensorMode():
        arguments = pytree.tree_map_only(Tensor, fake_of, case.arguments(requires_grad=False))
        for leaf in case.leaves(arguments):
            leaf.requires_grad_()
        with InsideKernels() as seen:
            out = run(case, arguments | {"backend": "reference"})
    assert all(x.device.type == device for x in out)
    assert len(seen.kernels) >= (2 if case.differentiable else 1)


def test_the_whole_step_runs_on_tensors_without_data():
    step = Step().to("meta")
    with mk.use_backend("reference"), InsideKernels() as seen:
        step(*(x.to("meta") for x in step_inputs())).backward()
    assert all(p.grad is not None for p in step.parameters())
    forward = {name for name in seen.kernels if not name.endswith("_backward")}
    assert len(forward) == 5
    assert len(set(seen.kernels) - forward) >= 3


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: bool(x.any()),
        lambda x: x.new_tensor([1.0]),
        lambda x: torch.tensor([1.0], device=x.device),
    ],
    ids=["item", "nonzero", "mask", "bool", "new_tensor", "tensor"],
)
def test_the_probe_above_notices(read):
    seen = InsideKernels()
    seen.inside = 1
    errors = (DataDependentOutputException, DynamicOutputShapeException)
    with FakeTensorMode():
        x = torch.empty(3)
        with seen, pytest.raises(errors):
            read(x)


# ---------------------------------------------------------------- with a GPU


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@needs_cuda
@all_cases
def test_no_synchronization_on_a_gpu(target, case):
    if target.device != "cuda":
        pytest.skip("runs on the CPU")
    arguments = case.arguments(device="cuda")
    target.call(case.function, **arguments)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(case, arguments | {"backend": target.backend})
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_cuda
@all_cases
def test_cuda_graph(target, case):
    if target.device != "cuda":
        pytest.skip("runs on the CPU")
    arguments = case.arguments(device="cuda", requires_grad=False)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(2):
            target.call(case.function, **arguments)
    torch.cuda.synchronize()
    for name in case.written:
        for x in arguments[name]:
            x.fill_(0.5)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = tensors_of(target.call(case.function, **arguments))
    graph.replay()
    torch.cuda.synchronize()
    for name in case.written:
        for x in arguments[name]:
            x.fill_(0.5)
    wanted = tensors_of(target.call(case.function, **arguments))
    for a, b in zip(out, wanted, strict=True):
        torch.testing.assert_close(a, b)
