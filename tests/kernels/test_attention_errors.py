"""Errors of the boxes and the guided views."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import magsd_kernels as mk

I4, A1, A3, T2 = (
    torch.zeros(2, 3, 8, 8),
    torch.ones(2, 1, 4, 4),
    torch.ones(2, 3, 4, 4),
    torch.ones(2),
)
N2 = torch.zeros(2, dtype=torch.int64)
Error = tuple[dict[str, Any], type[Exception], str, str]

# Those of the guide hold for every function with one map per image.
GUIDE_ERRORS: dict[str, Error] = {
    "attention not a tensor": ({"attention": [1]}, TypeError, "attention", "list"),
    "attention integers": ({"attention": A1.int()}, TypeError, "attention", "int32"),
    "attention dimensions": ({"attention": A1[0]}, ValueError, "attention", r"\(1, 4, 4\)"),
    "attention empty": ({"attention": A1[..., :0]}, ValueError, "attention", r"\(2, 1, 4, 0\)"),
    "several maps, no index": ({"attention": A3}, ValueError, "index", "3"),
    "theta a number": ({"theta": 0.5}, TypeError, "theta", "float"),
    "theta double": ({"theta": T2.double()}, TypeError, "theta", "float64"),
    "theta shape": ({"theta": torch.ones(3)}, ValueError, "theta", r"\(3,\)"),
    "theta dimensions": ({"theta": torch.ones(2, 1)}, ValueError, "theta", r"\(2, 1\)"),
    "theta device": ({"theta": T2.to("meta")}, ValueError, "theta", "meta"),
    "index floats": ({"attention": A3, "index": T2}, TypeError, "index", "float32"),
    "index int32": ({"attention": A3, "index": N2.int()}, TypeError, "index", "int32"),
    "index shape": ({"attention": A3, "index": N2[:1]}, ValueError, "index", r"\(1,\)"),
    "index device": ({"attention": A3, "index": N2.to("meta")}, ValueError, "index", "meta"),
}
PADDING_ERRORS: dict[str, Error] = {
    "padding not a number": ({"padding": "wide"}, TypeError, "padding", "str"),
    "padding negative": ({"padding": -0.1}, ValueError, "padding", "-0.1"),
    "padding nan": ({"padding": float("nan")}, ValueError, "padding", "nan"),
}
IMAGE_ERRORS: dict[str, Error] = {
    "images not a tensor": ({"images": None}, TypeError, "images", "NoneType"),
    "images bytes": ({"images": I4.byte()}, TypeError, "images", "uint8"),
    "images dimensions": ({"images": I4[0]}, ValueError, "images", r"\(3, 8, 8\)"),
    "images empty": ({"images": I4[..., :0]}, ValueError, "images", r"\(2, 3, 8, 0\)"),
    "attention batch": ({"attention": A1[:1]}, ValueError, "attention", r"\(1, 1, 4, 4\)"),
    "attention device": ({"attention": A1.to("meta")}, ValueError, "attention", "meta"),
}
OFFSETS_ERRORS: dict[str, Error] = {
    "offsets not a tensor": ({"offsets": (0, 0)}, TypeError, "offsets", "tuple"),
    "offsets half": ({"offsets": torch.zeros(2, 2).half()}, TypeError, "offsets", "float16"),
    "offsets shape": ({"offsets": torch.zeros(2, 3)}, ValueError, "offsets", r"\(2, 3\)"),
    "offsets device": ({"offsets": torch.zeros(2, 2).to("meta")}, ValueError, "offsets", "meta"),
}
WEIGHT_ERRORS: dict[str, Error] = {
    "weight not a number": ({"weight": "half"}, TypeError, "weight", "str"),
    "weight nan": ({"weight": float("nan")}, ValueError, "weight", "nan"),
}
FLOOR_ERRORS: dict[str, Error] = {"floor": ({"floor": None}, TypeError, "floor", "NoneType")}
SIZE_ERRORS: dict[str, Error] = {
    "size zero": ({"size": (8, 0)}, ValueError, "size", r"\(8, 0\)"),
    "size of one": ({"size": (8,)}, ValueError, "size", r"\(8,\)"),
    "size of floats": ({"size": (8.0, 8.0)}, TypeError, "size", "8.0"),
    "size missing": ({"size": None}, TypeError, "size", "NoneType"),
}
VIEWS_ERRORS: dict[str, Error] = {
    "theta shape": ({"theta": T2}, ValueError, "theta", r"\(2,\)"),
    "theta columns": ({"theta": torch.ones(2, 2)}, ValueError, "theta", r"\(2, 2\)"),
    "theta double": ({"theta": torch.ones(2, 3).double()}, TypeError, "theta", "float64"),
    "index shape": ({"index": N2}, ValueError, "index", r"\(2,\)"),
    "index floats": ({"index": torch.ones(2, 3)}, TypeError, "index", "float32"),
    "index missing": ({"index": None}, TypeError, "index", "NoneType"),
    "attention dimensions": ({"attention": A3[0]}, ValueError, "attention", r"\(3, 4, 4\)"),
    "attention integers": ({"attention": A3.int()}, TypeError, "attention", "int32"),
    "theta device": ({"theta": torch.ones(2, 3).to("meta")}, ValueError, "theta", "meta"),
    "index device": ({"index": torch.ones(2, 3).long().to("meta")}, ValueError, "index", "meta"),
}


def error_cases() -> list[Any]:
    images = {"images": I4, "attention": A1, "theta": T2}
    patch = {**images, "offsets": torch.zeros(2, 2)}
    every = {
        **{k: patch[k] for k in ("images", "offsets")},
        "attention": A3,
        "theta": torch.ones(2, 3),
        "index": torch.zeros(2, 3, dtype=torch.int64),
    }
    sized = {"attention": A1, "theta": T2, "size": (8, 8)}
    guided, padded, shown = GUIDE_ERRORS, PADDING_ERRORS, IMAGE_ERRORS
    table: list[tuple[Callable[..., Tensor], dict[str, Any], dict[str, Error]]] = [
        (mk.attention_boxes, sized, guided | padded | SIZE_ERRORS),
        (mk.attention_crop, images, guided | padded | shown),
        (mk.attention_mixup, images, guided | padded | shown | WEIGHT_ERRORS),
        (mk.attention_patch, patch, guided | padded | shown | OFFSETS_ERRORS),
        (mk.attention_dim, images, guided | shown | FLOOR_ERRORS),
        (mk.attention_drop, images, guided | shown),
        (
            mk.attention_views,
            every,
            padded | shown | WEIGHT_ERRORS | FLOOR_ERRORS | OFFSETS_ERRORS | VIEWS_ERRORS,
        ),
    ]
    return [
        pytest.param(function, valid | changes, *rest, id=f"{function.__name__}-{name}")
        for function, valid, errors in table
        for name, (changes, *rest) in errors.items()
    ]


@pytest.mark.parametrize(("function", "arguments", "kind", "argument", "came"), error_cases())
def test_errors(function, arguments, kind, argument, came):
    with pytest.raises(kind, match=came) as caught:
        function(**arguments)
    assert function.__name__ in str(caught.value)
    assert argument in str(caught.value)
