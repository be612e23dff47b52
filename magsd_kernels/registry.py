"""Registration of the operators `magsd::<name>`: one schema, one fake, one autograd formula each.

Every schema ends in `str backend`; the kernel below autograd hands the other arguments to the
function of the same name of that backend. The compiled libraries implement `magsd_cpu::<name>` and
`magsd_cuda::<name>`, whose schemas are the same less the backend. `Library.define` with one
implementation per dispatch key costs about half the call overhead of `torch.library.custom_op`.

The dispatcher is called where somebody beside autograd can ask for the call: a compiler, a tracer,
a mode, a transform or a subclass of Tensor. Where nobody does, each of its two passages from Python
to Python would cost microseconds, and an operator runs what they would lead to.
"""

from __future__ import annotations

from collections.abc import Callable
from types import NoneType
from typing import Any

import torch

from magsd_kernels.backends import implementation

_library = torch.library.Library("magsd", "DEF")
_natives = [torch.library.Library(f"magsd_{backend}", "DEF") for backend in ("cpu", "cuda")]
_below: dict[Any, tuple[Callable[..., Any], Any]] = {}
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)


def define(
    operation: str,
    schema: str,
    fake: Callable[..., Any],
    autograd: Callable[..., Any] | None = None,
    needs_grad: Callable[..., bool] | None = None,
    check: Callable[..., None] | None = None,
    written: Callable[..., list[torch.Tensor]] | None = None,
) -> Any:
    """Register one operator and return it: a function of the schema's arguments.

    Args:
        operation: row of the table of backends that implements it.
        schema: `name(arguments, str backend) -> results`.
        fake: results without data, from the same arguments.
        autograd: applies a `torch.autograd.Function` whose forward calls `below_autograd`; without
            one the results have no gradient, and a backward operator refuses to be differentiated.
        needs_grad: whether these arguments ask for a gradient; None means that any tensor does.
        check: called with the same arguments before the backend, on real tensors only.
        written: tensors that a call writes in place. The compiled libraries write them past
            autograd, which learns here that they change.
    """
    name = schema.partition("(")[0]
    _library.define(schema, tags=_TAGS)
    for native in _natives:
        native.define(_native_schema(schema))

    def kernel(*arguments: Any) -> Any:
        if check is not None:
            check(*arguments)
        function = getattr(implementation(arguments[-1], operation), name)
        if arguments[-1] == "triton":
            return _on_their_device(function, arguments[:-1])
        return function(*arguments[:-1])

    _library.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"magsd::{name}", fake, lib=_library)
    overload = getattr(torch.ops.magsd, name).default
    wants_grad = needs_grad or _any_requires_grad

    def differentiable(*arguments: Any) -> Any:
        if written is not None:
            torch.autograd.graph.increment_version(written(*arguments))
        if torch.is_grad_enabled() and wants_grad(*arguments):
            if autograd is not None:
                return autograd(*arguments)
            if name.endswith("_backward"):
                forward = name.removesuffix("_backward")
                raise RuntimeError(f"{forward}: second derivatives are not implemented")
        return below_autograd(operator, *arguments)

    def operator(*arguments: Any) -> Any:
        # Under torch.compile the first question is answered while it traces.
        if torch.compiler.is_compiling() or _watched(arguments):
            return overload(*arguments)
        return differentiable(*arguments)

    _library.impl(name, differentiable, "Autograd")
    _below[operator] = (kernel, overload)
    return operator


def _on_their_device(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """Triton launches on the current device; torch and the libraries change to their tensors'."""
    with torch.accelerator.device_index(_device_index(arguments)):
        return function(*arguments)


def _native_schema(schema: str) -> str:
    """Below the dispatcher every size is a number, and no backend is left to choose."""
    return schema.replace(", str backend)", ")").replace("SymInt", "int")


def _any_requires_grad(*arguments: Any) -> bool:
    for argument in arguments:
        tensors = argument if isinstance(argument, (list, tuple)) else (argument,)
        if any(isinstance(value, torch.Tensor) and value.requires_grad for value in tensors):
            return True
    return False


def _device_index(arguments: Any) -> int | None:
    """Index of the device of the tensors, which have one in common; None where they have none."""
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            return argument.device.index
        if isinstance(argument, (list, tuple)) and argument:
            return _device_index(argument)
    return None


def below_autograd(operator: Any, *arguments: Any) -> Any:
    """Call an operator's kernel from inside its own autograd formula."""
    kernel, overload = _below[operator]
    with torch._C._AutoDispatchBelowAutograd():
        return (overload if _watched(arguments) else kernel)(*arguments)


# The types of arguments that a compiled library takes as they are.
_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter, NoneType, bool, int, float, str))


def _watched(arguments: tuple[Any, ...]) -> bool:
    """Whether the dispatcher has more to do than to pass a call on to a compiled library."""
    if (
        arguments[-1] not in ("cpu", "cuda")
        or torch._C._len_torch_dispatch_stack()
        or torch._C._is_torch_function_mode_enabled()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
    ):
        return True
    for argument in arguments:
        if type(argument) not in _PLAIN and not (
            isinstance(argument, (list, tuple)) and _PLAIN.issuperset(map(type, argument))
        ):
            return True
    return False
