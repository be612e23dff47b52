"""Checks of arguments: the message names the op, the argument, what was expected and what came."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

#: In a shape: any size but 0.
FILLED = "filled"

IMAGES = (None, FILLED, FILLED, FILLED)


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def _fits(sizes: Sequence[int], shape: Sequence[Any]) -> bool:
    """Whether a tensor's sizes are those of a shape, see `tensor`."""
    if len(sizes) != len(shape):
        return False
    for have, want in zip(sizes, shape, strict=True):
        if have == 0 if want is FILLED else want is not None and have != want:
            return False
    return True


def tensor(
    op: str,
    name: str,
    value: Any,
    shape: Sequence[Any],
    dtypes: Sequence[torch.dtype] = FLOATS,
    like: torch.Tensor | None = None,
) -> None:
    """Require a tensor of a shape and one of `dtypes`, on the device of `like`.

    None in the shape stands for any size, and FILLED for any size but 0.
    """
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{op}: {name} must be a Tensor, got {type(value).__name__}")
    if value.dtype not in dtypes:
        raise TypeError(f"{op}: {name} must be {_names(dtypes)}, got {_names([value.dtype])}")
    sizes = value.shape
    if len(sizes) != len(shape):
        raise ValueError(
            f"{op}: {name} must have {len(shape)} dimensions, got shape {tuple(sizes)}"
        )
    if like is not None and value.device != like.device:
        raise ValueError(f"{op}: {name} must be on {like.device}, got {value.device}")
    for have, want in zip(sizes, shape, strict=True):
        if want is FILLED:
            if have == 0:
                raise ValueError(
                    f"{op}: {name} must have no empty dimension but the batch, got {tuple(sizes)}"
                )
        elif want is not None and have != want:
            wanted = ", ".join("any" if w in (None, FILLED) else str(w) for w in shape)
            raise ValueError(f"{op}: {name} must have shape ({wanted}), got {tuple(sizes)}")


def tensors(
    op: str,
    name: str,
    values: Sequence[Any],
    shape: Sequence[Any],
    dtypes: Sequence[torch.dtype],
    like: torch.Tensor,
    first: int = 0,
) -> None:
    """Require tensors of one shape and of `dtypes`, on the device of `like`; they are counted
    from `first`.
    """
    if not all_fit(values, shape, dtypes, like):
        for i, value in enumerate(values, first):
            tensor(op, f"{name}[{i}]", value, shape, dtypes, like)


def all_fit(
    values: Sequence[Any],
    shape: Sequence[Any],
    dtypes: Sequence[torch.dtype],
    like: torch.Tensor,
) -> bool:
    """Whether `tensors` would accept them; it names what is wrong."""
    device = like.device
    for value in values:
        if not (
            isinstance(value, torch.Tensor)
            and value.dtype in dtypes
            and value.device == device
            and ((sizes := value.shape) == shape or _fits(sizes, shape))
        ):
            return False
    return True


def sequence(op: str, name: str, value: Any, length: int | None = None) -> None:
    """Require a list or tuple, of `length` entries if one is given."""
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{op}: {name} must be a sequence of Tensors, got {type(value).__name__}")
    if length is not None and len(value) != length:
        raise ValueError(f"{op}: {name} must have {length} entries, got {len(value)}")


_LARGEST = sys.float_info.max


def number(op: str, name: str, value: Any, low: float = -_LARGEST, high: float = _LARGEST) -> None:
    """Require a finite number in low..high."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{op}: {name} must be a number, got {type(value).__name__}")
    # NaN and the infinities fail these comparisons too.
    if not low <= value <= high:
        bound = f"{low}..{high}" if high < _LARGEST else f"at least {low}"
        bound = "finite" if low == -_LARGEST else f"finite and {bound}"
        raise ValueError(f"{op}: {name} must be {bound}, got {value}")


def count(op: str, name: str, value: Any) -> None:
    """Require an int of at least 1."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{op}: {name} must be an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{op}: {name} must be at least 1, got {value}")


def flag(op: str, name: str, value: Any) -> None:
    """Require a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be a bool, got {type(value).__name__}")


def choice(op: str, name: str, value: Any, allowed: Sequence[str]) -> None:
    """Require one of a few words."""
    if not isinstance(value, str):
        raise TypeError(f"{op}: {name} must be a str, got {type(value).__name__}")
    if value not in allowed:
        raise ValueError(f"{op}: {name} must be one of {', '.join(allowed)}; got {value!r}")


def size(op: str, value: Any) -> tuple[int, int]:
    """Require (H, W), both at least 1."""
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{op}: size must be (H, W), got {type(value).__name__}")
    if not all(isinstance(n, (int, torch.SymInt)) and not isinstance(n, bool) for n in value):
        raise TypeError(f"{op}: size must be two ints, got {value!r}")
    if len(value) != 2 or any(n < 1 for n in value):
        raise ValueError(f"{op}: size must be two ints of at least 1, got {tuple(value)}")
    return (value[0], value[1])
