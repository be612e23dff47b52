"""Registration of the operators `magsd::<name>`: one schema, one fake, one autograd formula each.

Every schema ends in `str backend`; the kernel hands the other arguments to the function of the same
name of that backend. The compiled libraries implement `magsd_cpu::<name>` and `magsd_cuda::<name>`,
whose schemas are the same less the backend.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.jit import is_tracing  # type: ignore[attr-defined]
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from magsd_kernels.backends import implementation

_library = torch.library.Library("magsd", "DEF")
_NATIVE = ("cpu", "cuda")
_natives = [torch.library.Library(f"magsd_{backend}", "DEF") for backend in _NATIVE]
_PLAIN = (torch.Tensor, torch.nn.Parameter)
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)

#: Keeps what the backward needs: (ctx, arguments by name, results).
SetupContext = Callable[[Any, Any, Any], None]
#: (ctx, gradients of the results) -> gradients of the arguments that have one, by name;
#: ctx.wanted maps each name to whether its gradient is asked for.
Backward = Callable[..., dict[str, Any]]


def define(
    operation: str,
    schema: str,
    fake: Callable[..., Any],
    *,
    setup_context: SetupContext | None = None,
    backward: Backward | None = None,
    check: Callable[[Any], None] | None = None,
    written: Callable[[Any], Sequence[torch.Tensor]] | None = None,
) -> Any:
    """Register one operator and return what calls it.

    The call of a compiled library that nothing records, for a gradient or otherwise, goes to the
    library's own operator at once: the way there through Python takes as long as small kernels.

    Args:
        operation: whose functions it belongs to, one of `backends.OPERATIONS`.
        schema: `name(arguments, str backend) -> results`.
        fake: results without data, from the same arguments.
        setup_context, backward: the autograd formula, as for `torch.library.register_autograd`,
            with the arguments and their gradients by name. Without one the results have no
            gradient, and an operator `<name>_backward` raises an error when it is differentiated.
        check: called with the arguments by name before the backend, on real tensors only.
        written: the tensors among the arguments, taken by name, that the call writes to. The
            backends write past autograd, which learns here that they change.
    """
    name = schema.partition("(")[0]
    names = [argument for _, argument in _arguments(schema)]
    by_name: Any = namedtuple(name, names)  # type: ignore[misc]  # the schema has them
    _library.define(schema, tags=_TAGS)
    for native in _natives:
        native.define(_native_schema(schema))

    def kernel(*arguments: Any) -> Any:
        if check is not None:
            check(by_name(*arguments))
        if written is not None:
            torch.autograd.graph.increment_version(written(by_name(*arguments)))
        return call_backend(arguments[-1], operation, name, arguments[:-1])

    _library.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"magsd::{name}", fake, lib=_library)
    overload = getattr(torch.ops.magsd, name).default
    if backward is None and name.endswith("_backward"):
        backward = _refusal(name.removesuffix("_backward"))
    tensors = _TensorArguments(schema)
    if backward is not None:
        formula = _autograd(
            overload, kernel, schema, tensors, by_name, setup_context or _keep_nothing, backward
        )
        _library.impl(name, formula, "Autograd", with_keyset=True)

    def operator(*arguments: Any, **named: Any) -> Any:
        if named:
            arguments += tuple(named[each] for each in names[len(arguments) :])
        if arguments[-1] in _NATIVE and not _recorded() and tensors.are_plain(arguments):
            return kernel(*arguments)
        return overload(*arguments)

    return operator


def _recorded() -> bool:
    """Whether something takes down the operators that are called."""
    return torch.compiler.is_compiling() or is_in_torch_dispatch_mode() or is_tracing()


def call_backend(backend: str, operation: str, name: str, arguments: Sequence[Any]) -> Any:
    """Results of a backend's function of this name, without its operator."""
    function = getattr(implementation(backend, operation), name)
    if backend == "triton":
        return _on_their_device(function, arguments)
    return function(*arguments)


class _TensorArguments:
    """Which arguments of a schema are tensors."""

    def __init__(self, schema: str) -> None:
        kinds = _arguments(schema)
        self.places = [i for i, (kind, _) in enumerate(kinds) if kind.startswith("Tensor")]
        self.names = [kinds[i][1] for i in self.places]
        self.lists = [i for i in self.places if kinds[i][0].endswith("[]")]
        self.single = [i for i in self.places if i not in self.lists]

    def ask_for_gradients(self, arguments: Sequence[Any]) -> bool:
        """Whether one of them does."""
        for i in self.single:
            if arguments[i] is not None and arguments[i].requires_grad:
                return True
        for i in self.lists:
            for tensor in arguments[i]:
                if tensor.requires_grad:
                    return True
        return False

    def are_plain(self, arguments: Sequence[Any]) -> bool:
        """Whether they are of no class that torch treats in its own way, and without gradients."""
        recording = torch.is_grad_enabled()
        for i in self.single:
            tensor = arguments[i]
            if tensor is not None and (
                type(tensor) not in _PLAIN or (recording and tensor.requires_grad)
            ):
                return False
        for i in self.lists:
            for tensor in arguments[i]:
                if type(tensor) not in _PLAIN or (recording and tensor.requires_grad):
                    return False
        return True


def _autograd(
    overload: Any, run: Callable[..., Any], schema: str, tensors: _TensorArguments, by_name: Any,
    setup_context: SetupContext, backward: Backward,
) -> Callable[..., Any]:  # fmt: skip
    """The autograd kernel of an operator; `run` is the kernel below it.

    `torch.library.register_autograd` takes no operator that writes to its arguments, and a call of
    one element that goes through it took 1.4 to 1.9 times as long.
    """
    names = tensors.names
    gives_lists = "[]" in schema.partition("->")[2]

    def call(below: Any, arguments: Any) -> Any:
        # Where no mode, transform or special tensor comes between, the dispatcher would only turn
        # all arguments into its own values and back.
        return run(*arguments) if below is None else overload.redispatch(below, *arguments)

    class Formula(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx: Any, below: Any, arguments: Any, counts: list[int], structure: list[Any],
            *leaves: torch.Tensor,
        ) -> Any:  # fmt: skip
            # `leaves` are the arguments' tensors once more, so many of each: autograd sees none in
            # lists, and none in lists of results, whose `structure` is left for the caller.
            results = call(below, arguments)
            ctx.counts = counts
            setup_context(ctx, by_name(*arguments), results)
            if not gives_lists:
                return results
            flat, found = pytree.tree_flatten(results)
            structure.append(found)
            return tuple(flat)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
            ctx.wanted, end = {}, 4
            for name, count in zip(names, ctx.counts, strict=True):
                begin, end = end, end + count
                ctx.wanted[name] = True in ctx.needs_input_grad[begin:end]
            gradients = backward(ctx, *grads)
            flat: list[Any] = [None] * 4
            for name, count in zip(names, ctx.counts, strict=True):
                gradient = gradients.get(name)
                flat += gradient if isinstance(gradient, list) else [gradient] * count
            return tuple(flat)

    def kernel(keyset: Any, *arguments: Any) -> Any:
        below = _below(keyset)
        if not torch.is_grad_enabled() or not tensors.ask_for_gradients(arguments):
            return call(below, arguments)
        groups = [_tensors(arguments[i]) for i in tensors.places]
        leaves = [leaf for group in groups for leaf in group]
        structure: list[Any] = []
        results = Formula.apply(below, arguments, [*map(len, groups)], structure, *leaves)
        return pytree.tree_unflatten(results, structure[0]) if gives_lists else results

    return kernel


_known_below: dict[int, Any] = {}


def _below(keys: Any) -> Any:
    """The dispatch keys below autograd's; None if all that is left is a device of some backend."""
    number = keys.raw_repr()
    if number not in _known_below:
        below = keys.remove(keys.highestPriorityTypeId())
        alone = [f"DispatchKeySet({device})" for device in ("CPU", "CUDA", "XPU")]
        _known_below[number] = None if str(below) in alone else below
    return _known_below[number]


def _tensors(argument: Any) -> list[torch.Tensor]:
    """The tensors that an argument consists of."""
    if isinstance(argument, torch.Tensor):
        return [argument]
    if isinstance(argument, (list, tuple)):
        return [value for value in argument if isinstance(value, torch.Tensor)]
    return []


def _keep_nothing(ctx: Any, arguments: Any, results: Any) -> None:
    pass


def _refusal(operator: str) -> Backward:
    """The formula of a backward operator, which has no gradient of its own."""

    def refuse(ctx: Any, *grads: Any) -> dict[str, Any]:
        raise RuntimeError(f"{operator}: second derivatives are not implemented")

    return refuse


def _arguments(schema: str) -> list[tuple[str, str]]:
    """Types and names of the arguments of `name(type name, ...) -> results`."""
    arguments = schema[schema.index("(") + 1 : schema.index(") ->")].split(", ")
    return [(kind, name) for kind, _, name in (each.rpartition(" ") for each in arguments)]


def _native_schema(schema: str) -> str:
    """Below the dispatcher every size is a number, and no backend is left to choose."""
    return schema.replace(", str backend)", ")").replace("SymInt", "int")


def _on_their_device(function: Callable[..., Any], arguments: Sequence[Any]) -> Any:
    """Triton launches on the current device; torch and the libraries change to their tensors'."""
    tensors = (tensor for argument in arguments for tensor in _tensors(argument))
    with torch.accelerator.device_index(next(tensors).device.index):
        return function(*arguments)
