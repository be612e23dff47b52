"""Triton's interpreter, nearly three times as fast, and bfloat16 as the hardware rounds it.

By itself it looks for overflows with eight operations of its own for one of the kernel's, and drops
what it finds; it builds a table of dtypes at every look into it, and every type of a block anew; it
replaces the language at every call of one jitted function by another, and finds nothing left to
replace among some hundred names. What float32 has more than bfloat16 it cuts off, where a GPU
rounds to the nearest.
"""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch


def speed_up() -> None:
    """Make these changes; `triton` must be importable.

    What a release of Triton does otherwise is as fast as it is.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    if hasattr(builder.options, "sanitize_overflow") and not builder.options.debug:
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    if hasattr(interpreter, "_get_np_dtype"):
        interpreter._get_np_dtype = _remembering(interpreter._get_np_dtype)
    if hasattr(interpreter, "_convert_float"):
        interpreter._convert_float = _rounding(interpreter._convert_float, tl)
    _remember_blocks(tl.core.block_type)
    if hasattr(interpreter, "_patch_lang") and hasattr(interpreter, "_LangPatchScope"):
        _replace_language_once(interpreter, tl)


def _remembering(np_dtype: Any) -> Any:
    known: dict[str, Any] = {}

    def found(kind: Any) -> Any:
        name = kind.scalar.name
        if name not in known:
            known[name] = np_dtype(kind)
        return known[name]

    return found


def _rounding(convert: Any, tl: Any) -> Any:
    def converted(values: Any, source: Any, to: Any, mode: Any) -> Any:
        if (source, to) != (tl.float32, tl.bfloat16):
            return convert(values, source, to, mode)
        # A copy: what numpy has broadcast may not be written to, of which torch warns.
        wide = torch.from_numpy(np.array(values, np.float32))
        return wide.bfloat16().view(torch.int16).numpy().view(np.uint16)

    return converted


def _remember_blocks(block_type: Any) -> None:
    known: dict[Any, dict[str, Any]] = {}
    original = block_type.__init__

    def init(self: Any, element_ty: Any, shape: Any) -> None:
        key = (element_ty.name, tuple(getattr(size, "value", size) for size in shape))
        if key in known:
            vars(self).update(known[key], element_ty=element_ty)
        else:
            original(self, element_ty, shape)
            known[key] = vars(self)

    block_type.__init__ = init


def _replace_language_once(interpreter: Any, tl: Any) -> None:
    """Let calls inside a launch find the language replaced."""
    replace = interpreter._patch_lang
    # The kernels see triton.language, the functions of Triton's own library its core.
    both = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    inside = False

    def once(function: Any) -> Any:
        nonlocal inside
        if inside:
            return interpreter._LangPatchScope()
        scope = replace(both)
        restore = scope.restore
        inside = True

        def leave() -> None:
            nonlocal inside
            inside = False
            restore()

        scope.restore = leave
        return scope

    interpreter._patch_lang = once
