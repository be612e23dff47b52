"""Registration of the operators `magsd::<name>`: one schema, one fake, one autograd formula each.

Every schema ends in `str backend`; the kernel below autograd hands the other arguments to the
function of the same name of that backend. `Library.define` with one implementation per dispatch
key costs about half the call overhead of `torch.library.custom_op`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from magsd_kernels.backends import implementation

_library = torch.library.Library("magsd", "DEF")
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)


def define(
    operation: str,
    schema: str,
    fake: Callable[..., Any],
    autograd: Callable[..., Any] | None = None,
    check: Callable[..., None] | None = None,
) -> Any:
    """Register one operator and return its overload.

    Args:
        operation: row of the table of backends that implements it.
        schema: `name(arguments, str backend) -> results`.
        fake: results without data, from the same arguments.
        autograd: applies a `torch.autograd.Function` whose forward calls `below_autograd`; without
            one the operator has no gradient.
        check: called with the same arguments before the backend, on real tensors only.
    """
    name = schema.partition("(")[0]
    _library.define(schema, tags=_TAGS)

    def kernel(*arguments: Any) -> Any:
        if check is not None:
            check(*arguments)
        function = getattr(implementation(arguments[-1], operation), name)
        return function(*arguments[:-1])

    _library.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"magsd::{name}", fake, lib=_library)
    if autograd is not None:
        _library.impl(name, autograd, "Autograd")
    return getattr(torch.ops.magsd, name).default


def below_autograd(overload: Any, *arguments: Any) -> Any:
    """Call an operator's kernel from inside its own autograd formula."""
    with torch._C._AutoDispatchBelowAutograd():
        return overload(*arguments)
