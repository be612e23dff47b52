"""What holds for every public function alike: inputs, determinism, devices, empty batches."""

from __future__ import annotations

import functools
import inspect
import re

import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import magsd_kernels as mk
from magsd_kernels.cases import sampled_views

from .cases import CASES, all_cases, differentiable_cases, run
from .support import all_dtypes, identical, random, tensors_of

PUBLIC = {
    "attention_boxes",
    "attention_crop",
    "attention_dim",
    "attention_drop",
    "attention_mixup",
    "attention_patch",
    "attention_views",
    "batch_norm_act",
    "bilinear_attention_pool",
    "multiscale_attention",
    "resample_attention",
    "sample_attention",
    "soft_distance_loss",
}
OTHERS = {
    "AttentionViews",
    "BackendUnavailable",
    "BatchNormAct",
    "BilinearAttentionPool",
    "MultiscaleAttention",
    "SoftDistance",
    "SoftDistanceLoss",
    "backends",
    "fuse_batch_norms",
    "norm_groups",
    "use_backend",
}


def outputs_and_gradients(target, case, arguments):
    return run(case, arguments, functools.partial(target.call, case.function))


def test_public_names():
    assert set(mk.__all__) >= PUBLIC | OTHERS
    functions = {name for name in mk.__all__ if inspect.isfunction(getattr(mk, name))}
    # What `AttentionViews` calls is no public name.
    wanted = functions - {"backends", "fuse_batch_norms"} | {"sampled_views"}
    assert {case.function.__name__ for case in CASES} == wanted, "a public function without a case"
    assert all(getattr(mk, name).__doc__ for name in functions)


@all_cases
@all_dtypes
def test_every_dtype_runs_and_gives_its_own(target, case, dtype):
    out = tensors_of(
        target.call(case.function, **case.arguments(dtype=dtype, device=target.device))
    )
    if case.function is mk.sample_attention:
        wanted = torch.int64
    elif case.function is mk.attention_boxes:
        wanted = torch.int32
    elif case.function is mk.soft_distance_loss:
        wanted = torch.float64 if dtype == torch.float64 else torch.float32
    else:
        wanted = dtype
    assert {x.dtype for x in out} == {wanted}
    assert {x.device.type for x in out} == {target.device}


@differentiable_cases
@pytest.mark.parametrize("given", ["contiguous", "channels_last", "expanded"])
@pytest.mark.parametrize("format_", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_gradient_lies_as_its_input_does(target, case, format_, given):
    """Whatever the memory format of the gradient that comes in: compilers choose their own."""
    arguments = case.arguments(device=target.device)
    leaves = case.leaves(arguments)
    for leaf in leaves:
        if leaf.dim() == 4:
            leaf.data = leaf.data.contiguous(memory_format=format_)
    out = [x for x in tensors_of(target.call(case.function, **arguments)) if x.requires_grad]
    grads = [torch.ones_like(x).contiguous() for x in out]
    if given == "channels_last":
        grads = [g.movedim(1, -1).contiguous().movedim(-1, 1) if g.dim() == 4 else g for g in grads]
        grads = [g.movedim(2, -1).contiguous().movedim(-1, 2) if g.dim() == 5 else g for g in grads]
    if given == "expanded":
        grads = [g.new_ones(()).expand_as(g) for g in grads]
    for leaf, grad in zip(leaves, torch.autograd.grad(out, leaves, grads), strict=True):
        if leaf.dim() == 4:
            assert grad.is_contiguous(memory_format=format_)


@all_cases
def test_inputs_are_not_modified(target, case):
    arguments = case.arguments(device=target.device)
    before = pytree.tree_map_only(torch.Tensor, lambda x: x.detach().clone(), arguments)
    versions = {id(x): x._version for x in tensors_of(arguments)}
    outputs_and_gradients(target, case, arguments)
    for name, value in arguments.items():
        pairs = zip(tensors_of(value), tensors_of(before[name]), strict=True)
        if name in case.written:
            assert not any(identical(a, b) for a, b in pairs)
        else:
            assert all(identical(a, b) for a, b in pairs), name
            assert all(x._version == versions[id(x)] for x in tensors_of(value)), name


@all_cases
def test_outputs_do_not_alias_inputs(target, case):
    arguments = case.arguments(device=target.device, requires_grad=False)
    inputs = {x.untyped_storage().data_ptr() for x in tensors_of(arguments) if x.numel()}
    out = tensors_of(target.call(case.function, **arguments))
    assert all(x.untyped_storage().data_ptr() not in inputs for x in out)


@all_cases
def test_results_are_deterministic(target, case):
    """Bit-equal forward and backward, also in another number of threads."""
    # Enough images for every thread; the interpreter has one, and takes seconds for so many.
    batch, counts = (3, (2,)) if target.interpreted else (33, (1, 2, 3))
    threads = torch.get_num_threads()
    first = outputs_and_gradients(target, case, case.arguments(batch=batch, device=target.device))
    try:
        for count in counts:
            torch.set_num_threads(count)
            again = outputs_and_gradients(
                target, case, case.arguments(batch=batch, device=target.device)
            )
            assert all(identical(a, b) for a, b in zip(first, again, strict=True))
    finally:
        torch.set_num_threads(threads)


@all_cases
def test_no_operation_draws_random_numbers(target, case):
    state = torch.get_rng_state()
    outputs_and_gradients(target, case, case.arguments(device=target.device))
    assert torch.equal(torch.get_rng_state(), state)


@all_cases
def test_deterministic_algorithms_can_be_demanded(target, case):
    torch.use_deterministic_algorithms(True)
    try:
        outputs_and_gradients(target, case, case.arguments(device=target.device))
    finally:
        torch.use_deterministic_algorithms(False)


@all_cases
@pytest.mark.parametrize("batch", [0, 1])
def test_small_batches(target, case, batch):
    arguments = case.arguments(batch=batch, device=target.device)
    out = tensors_of(target.call(case.function, **arguments))
    leaves = case.leaves(arguments)
    if leaves:
        gradients = torch.autograd.grad(sum(x.sum() for x in out), leaves)
        assert [g.shape for g in gradients] == [x.shape for x in leaves]
    if case.function is not mk.soft_distance_loss:
        dimension = 1 if case.function in (mk.attention_views, sampled_views) else 0
        assert all(x.shape[dimension] == batch for x in out)


@all_cases
def test_inference_mode_and_no_grad(target, case):
    wanted = tensors_of(target.call(case.function, **case.arguments(device=target.device)))
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            out = tensors_of(target.call(case.function, **case.arguments(device=target.device)))
        assert not any(x.requires_grad for x in out)
        assert all(identical(a, b.detach()) for a, b in zip(out, wanted, strict=True))


@differentiable_cases
def test_gradient_through_the_graph_twice(target, case):
    """retain_graph gives the same gradient again; without it the graph is freed as usual."""
    arguments = case.arguments(device=target.device)
    leaves = case.leaves(arguments)
    total = sum(x.square().sum() for x in tensors_of(target.call(case.function, **arguments)))
    first = torch.autograd.grad(total, leaves, retain_graph=True)
    second = torch.autograd.grad(total, leaves)
    assert all(identical(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(total, leaves)


def gradient_norm(target, case, arguments, create_graph=False):
    """Squared norm of the gradient of a fixed function of the outputs."""
    leaves = case.leaves(arguments)
    total = sum(x.square().sum() for x in tensors_of(target.call(case.function, **arguments)))
    gradients = torch.autograd.grad(total, leaves, create_graph=create_graph)
    return sum(g.square().sum() for g in gradients)


@differentiable_cases
def test_second_derivatives_are_refused_or_right(target, case):
    """No formula of second order is promised; a silent zero would be worse than an error."""

    def arguments(step: float = 0.0):
        built = case.arguments(device=target.device, dtype=torch.float64)
        with torch.no_grad():
            for i, leaf in enumerate(case.leaves(built)):
                leaf.add_(step * random(*leaf.shape, seed=50 + i).to(target.device))
        return built

    built = arguments()
    try:
        norm = gradient_norm(target, case, built, create_graph=True)
        second = torch.autograd.grad(norm, case.leaves(built))
    except RuntimeError as refusal:
        if re.search("differentiate twice|second derivatives", str(refusal)):
            return
        raise
    found = sum((g.cpu() * random(*g.shape, seed=50 + i)).sum() for i, g in enumerate(second))
    h = 1e-6
    up, down = (gradient_norm(target, case, arguments(step)) for step in (h, -h))
    assert float(found) == pytest.approx(float(up - down) / (2 * h), rel=1e-4)


@differentiable_cases
def test_an_input_changed_before_backward_is_noticed(target, case):
    """Saved tensors are saved as such: in-place changes raise or matter to no gradient."""

    def gradients(changed: str | None = None) -> list[torch.Tensor]:
        arguments = case.arguments(device=target.device)
        out = tensors_of(target.call(case.function, **arguments))
        with torch.no_grad():
            for leaf in tensors_of(arguments[changed]) if changed else ():
                leaf.add_(random(*leaf.shape, seed=50).to(leaf))
        return torch.autograd.grad(sum(x.sum() for x in out), case.leaves(arguments))

    wanted = gradients()
    for name in case.differentiable:
        try:
            found = gradients(name)
        except RuntimeError as refusal:
            if "modified by an inplace" in str(refusal):
                continue
            raise
        assert all(identical(a, b) for a, b in zip(found, wanted, strict=True)), name


class Dispatched(TorchDispatchMode):
    """Names of the operators that are dispatched; what one of the package calls is not seen."""

    def __enter__(self) -> Dispatched:
        self.names: list[str] = []
        super().__enter__()
        return self

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@differentiable_cases
def test_backward_fills_no_memory_for_results_without_a_gradient(case):
    """Each of these zeros would be a launch of its own on a GPU."""
    arguments = case.arguments()
    out = [x for x in tensors_of(case.function(**arguments)) if x.requires_grad]
    for given in (out, out[:1]):
        with Dispatched() as dispatched:
            torch.autograd.grad(
                given, case.leaves(arguments), [torch.ones_like(x) for x in given], True
            )
        assert [name for name in dispatched.names if name.startswith("magsd.")] != []
        assert [name for name in dispatched.names if re.search("zero|fill", name)] == []


class _Stop(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *values):
        return tuple(value.clone() for value in values)

    @staticmethod
    def backward(ctx, *grads):
        return (None,) * len(grads)


@differentiable_cases
def test_no_gradient_gives_none_or_zeros(case):
    arguments = case.arguments()
    out = [x for x in tensors_of(case.function(**arguments)) if x.requires_grad]
    total = sum(x.sum() for x in _Stop.apply(*out))
    grads = torch.autograd.grad(total, case.leaves(arguments), allow_unused=True)
    assert all(grad is None or not grad.any() for grad in grads)
