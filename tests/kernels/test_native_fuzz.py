"""The compiled operators called directly, past the checks of the contract.

Whatever comes in, an operator gives a result of the promised shape or raises; the process survives.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch.utils import _pytree as pytree

from magsd_kernels import native, registry
from magsd_kernels.cases import CASES, Size

from .cases import run
from .support import Library, every_library

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
OTHERS = (torch.int32, torch.int64, torch.bool, torch.uint8, torch.complex64)
ROUNDS = 300
OPERATORS = sorted(
    name.removeprefix("magsd::")
    for name in torch._C._dispatch_get_all_op_names()
    if name.startswith("magsd::")
)

#: Primes that are factors of no constant: what is recorded at this size tells its dimensions apart.
RECORDED = Size(
    batch=5,
    maps=7,
    classes=11,
    draws=11,
    image=(13, 17),
    planes=11,
    low=(19, 23),
    features=(13, 17),
    channels=11,
    scales=((13, 17), (11, 19), (23, 29)),
    output=(31, 37),
)
PRIMES = (5, 7, 11, 13, 17, 19, 23, 29, 31, 37)


def _size(draw: random.Random) -> int:
    return draw.choice((0, 1, 1, 2, 3, 4, 5, 7, 9))


def _spoil(draw: random.Random, tensor: torch.Tensor) -> torch.Tensor:
    """One thing wrong with a tensor: a size, a dimension, the dtype, the device or the strides."""
    if tensor.layout != torch.strided or tensor.is_meta:
        return tensor
    kind = draw.randrange(8)
    if kind == 0 and tensor.dim() > 0:
        shape = list(tensor.shape)
        shape[draw.randrange(len(shape))] = _size(draw)
        return tensor.new_zeros(shape)
    if kind == 1:
        return tensor.unsqueeze(0)
    if kind == 2 and tensor.dim() > 0:
        return tensor.flatten()[: _size(draw)]
    if kind == 3:
        return torch.zeros_like(tensor, dtype=draw.choice((*FLOATS, *OTHERS)))
    if kind == 4:
        return tensor.to("meta")
    if kind == 5 and tensor.dim() > 0:
        return tensor[..., :1].expand(tensor.shape) if tensor.shape[-1] > 0 else tensor
    if kind == 6 and tensor.dim() == 2:
        return tensor.to_sparse()
    if kind == 7 and tensor.dim() > 1:
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    return tensor


def _spoil_any(draw: random.Random, value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return _spoil(draw, value)
    if isinstance(value, list) and value and isinstance(value[0], torch.Tensor):
        entries = list(value)
        kind = draw.randrange(3)
        if kind == 0:
            entries.pop()
        elif kind == 1:
            entries.extend(entries * draw.choice((1, 8)))
        else:
            at = draw.randrange(len(entries))
            entries[at] = _spoil(draw, entries[at])
        return entries
    if isinstance(value, list):
        return value[:-1] if draw.random() < 0.3 else [draw.choice((-3, 0, 1, 5)) for _ in value]
    if isinstance(value, bool):
        return not value
    if isinstance(value, float):
        return draw.choice((-1.0, 0.0, float("nan"), float("inf"), 1e300, -1e-300))
    if isinstance(value, str):
        return draw.choice(("", "avg", "max", "area", "nearest", "bilinear", "x" * 1000))
    return value


@functools.cache
def recorded() -> dict[str, list[list[Any]]]:
    """Arguments of every operator, as the cases give them in every dtype."""
    draw = random.Random(0)
    calls: dict[str, list[list[Any]]] = {}
    original = registry.call_backend

    def call_backend(backend: str, operation: str, name: str, arguments: Sequence[Any]) -> Any:
        calls.setdefault(name, []).append([*arguments])
        return original(backend, operation, name, arguments)

    with mock.patch.object(registry, "call_backend", call_backend):
        for case, dtype, _ in itertools.product(CASES, FLOATS, range(2)):
            size = replace(RECORDED, scales=draw.sample(RECORDED.scales, draw.choice((1, 2, 3))))
            arguments = case.arguments(size, dtype=dtype)
            for name, parameter in inspect.signature(case.function).parameters.items():
                if isinstance(arguments.get(name, parameter.default), bool):
                    arguments[name] = draw.random() < 0.5
            run(case, arguments | {"backend": "reference"})
    return calls


def _resized(size: int, extents: dict[int, int]) -> int:
    """A recorded size, or a product of some, with other numbers in place of the primes."""
    for prime in PRIMES if size else ():
        if size % prime == 0:
            return extents[prime] * _resized(size // prime, extents)
    return size


def _redrawn(draw: random.Random, value: Any, extents: dict[int, int]) -> Any:
    """A recorded argument at other sizes, with values like the recorded ones and worse."""
    if isinstance(value, list):
        if value and isinstance(value[0], bool):
            return [draw.random() < 0.7 for _ in value]
        return [_redrawn(draw, each, extents) for each in value]
    if isinstance(value, int) and not isinstance(value, bool):
        return _resized(value, extents)
    if not isinstance(value, torch.Tensor):
        return value
    shape = [_resized(n, extents) for n in value.shape]
    if not value.is_floating_point():
        far = draw.choice((1, 1, 2**20, torch.iinfo(value.dtype).max // 16))
        return torch.randint(-2, 12, shape, dtype=value.dtype) * far
    if not value.numel():
        return value
    values = value.detach().flatten()[torch.randint(value.numel(), shape)]
    if draw.random() < 0.1 and values.numel():
        wrong = draw.choice((float("nan"), float("inf"), 1e30, -1.0))
        values.flatten()[draw.randrange(values.numel())] = wrong
    if len(shape) == 4 and draw.random() < 0.5:
        values = values.contiguous(memory_format=torch.channels_last)
    return values


def _call(draw: random.Random, name: str) -> list[Any]:
    """Arguments of an operator that fit together: some as recorded, most at other sizes."""
    arguments = draw.choice(recorded()[name])
    if draw.random() < 0.8:
        extents = {prime: _size(draw) for prime in PRIMES}
        arguments = [_redrawn(draw, value, extents) for value in arguments]
    else:
        arguments = pytree.tree_map_only(torch.Tensor, lambda x: x.detach().clone(), arguments)
    for at, argument in enumerate(getattr(torch.ops.magsd, name).default._schema.arguments[:-1]):
        if isinstance(argument.type, torch.OptionalType) and draw.random() < 0.3:
            arguments[at] = None
    # What layers have beside activations in half precision is float32, or of the same dtype.
    lists = [each for each in arguments if isinstance(each, list) and len(each)]
    tensors = [each for each in lists if isinstance(each[0], torch.Tensor)]
    if tensors and draw.random() < 0.5:
        dtype = draw.choice(tensors)[0].dtype
        for each in tensors:
            each[:] = [x.to(dtype) for x in each]
    return arguments


#: In messages of what no argument may cause: a kernel that reads outside, hangs or cannot start.
FAULTS = ("CUDA error", "emulated kernel", "INTERNAL ASSERT")


def fuzz(name: str, library: Library, seed: int) -> tuple[int, int]:
    """Call an operator with good and bad arguments; how often it returned and raised."""
    torch.manual_seed(seed)
    draw = random.Random(seed)
    operator = getattr(native.operations(library.backend), name)
    returned = raised = 0
    for _ in range(ROUNDS):
        arguments = pytree.tree_map_only(
            torch.Tensor, lambda x: x.to(library.device), _call(draw, name)
        )
        for _ in range(draw.choice((0, 1, 1, 2))):
            at = draw.randrange(len(arguments))
            arguments[at] = _spoil_any(draw, arguments[at])
        try:
            operator(*arguments)
            if library.device == "cuda":
                torch.cuda.synchronize()
            returned += 1
        except (RuntimeError, NotImplementedError, ValueError, TypeError, IndexError) as error:
            if any(fault in str(error) for fault in FAULTS):
                raise
            raised += 1
    return returned, raised


def follow_an_argmax_from_outside(library: Library) -> bool:
    """Whether a backward that is given one keeps its shapes and gives numbers."""
    on: Any = {"device": library.device}
    features, attention = torch.ones(1, 2, 2, 2, **on), torch.ones(1, 3, 2, 2, **on)
    grad = torch.ones(1, 6, **on)
    argmax = torch.full((1, 3, 2), 2**31 - 1, dtype=torch.int32, **on)
    settings = ["max", False, False, 1.0, 0.0, False, [True, True]]
    grads = native.operations(library.backend).bilinear_attention_pool_backward(
        grad, features, attention, grad, grad.new_empty(0), argmax, *settings
    )
    assert [g.shape for g in grads] == [features.shape, attention.shape]
    return all(bool(g.isfinite().all()) for g in grads)


@every_library
def test_direct_calls_with_bad_arguments_leave_the_process_alive(library):
    """In a process of its own, so that a crash is a failure of this test and of no other."""
    code = """
import torch
from tests.kernels import test_native_fuzz as t
torch.set_num_threads(1)
t.recorded()
torch.set_num_threads(2)
for name in t.OPERATORS:
    print(name, *t.fuzz(name, library, seed=0), flush=True)
print(t.follow_an_argmax_from_outside(library))
"""
    *lines, followed = library.run(code).splitlines()
    assert followed == "True"
    assert [line.split()[0] for line in lines] == OPERATORS
    for line in lines:
        name, returned, raised = line.split()
        assert min(int(returned), int(raised)) > ROUNDS // 10, name


@every_library
def test_the_library_holds_every_operator(library):
    """It registers every operator, and no other library does."""
    code = f"""
import torch
from magsd_kernels import native, registry
held = torch._C._dispatch_has_kernel_for_dispatch_key
for loaded in (False, True):
    if loaded:
        native.operations(library.backend)
    for name in {OPERATORS}:
        print(held(f"magsd_{{library.backend}}::{{name}}", library.device.upper()))
"""
    found = library.run(code).split()
    assert found == ["False"] * len(OPERATORS) + ["True"] * len(OPERATORS)
