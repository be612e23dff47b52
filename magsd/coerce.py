"""Values from YAML or the command line as the types that annotations ask for."""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Any, Literal, Union, get_args, get_origin

import yaml


def coerce(value: Any, hint: Any, *, from_text: bool = False) -> Any:
    """`value` as the annotated type. Raises `TypeError` or `ValueError` where it does not fit."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _coerce_union(value, args, from_text)
    if from_text and origin in (tuple, list) and not value.lstrip().startswith("["):
        value = f"[{value}]"  # milestones=4,7 as well as milestones=[4,7]
    if from_text and hint is not str and origin is not Literal:
        value = yaml.safe_load(value)
    if origin is Literal:
        if value not in args:
            raise ValueError(value)
        return value
    if hint is type(None):
        if value is not None:
            raise TypeError(value)
        return None
    if origin in (tuple, list):
        return _coerce_sequence(value, origin, args)
    if origin is dict or hint is dict:
        if not isinstance(value, Mapping):
            raise TypeError(value)
        return dict(value)
    if hint is float:
        return _coerce_float(value)
    if hint is Any:
        return value
    # bool is an int to isinstance, but never a valid count here.
    if type(value) is not hint:
        raise TypeError(value)
    return value


def _coerce_union(value: Any, options: tuple[Any, ...], from_text: bool) -> Any:
    # str accepts every text, so it is tried last: "null" and "true" keep their meaning.
    for option in sorted(options, key=lambda o: o is str):
        try:
            return coerce(value, option, from_text=from_text)
        except (TypeError, ValueError, yaml.YAMLError):
            continue
    raise TypeError(value)


def _coerce_float(value: Any) -> float:
    # YAML 1.1 reads "1e-3" (no dot) as text.
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise TypeError(value)
    return float(value)


def _coerce_sequence(value: Any, origin: type, args: tuple[Any, ...]) -> Any:
    if not isinstance(value, (list, tuple)):
        raise TypeError(value)
    if origin is list or (len(args) == 2 and args[1] is Ellipsis):
        items = [coerce(item, args[0]) for item in value]
    elif len(value) != len(args):
        raise ValueError(value)
    else:
        items = [coerce(item, arg) for item, arg in zip(value, args, strict=True)]
    return items if origin is list else tuple(items)


def describe(hint: Any) -> str:
    """An annotated type in words, for messages."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(describe(option) for option in args)
    if origin is Literal:
        return " or ".join(str(option) for option in args)
    if origin is tuple and not (len(args) == 2 and args[1] is Ellipsis):
        return f"[{', '.join(describe(option) for option in args)}]"
    if origin in (tuple, list):
        return f"a list of {describe(args[0])}"
    return {type(None): "null"}.get(hint, getattr(hint, "__name__", str(hint)))
