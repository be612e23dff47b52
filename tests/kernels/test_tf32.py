"""float32 products in TF32, where torch's settings allow it and a backend has it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch

import magsd_kernels as mk

from .support import all_dtypes, attention_maps, identical, random

SETTINGS = torch.backends.cuda.matmul


@contextlib.contextmanager
def products_in(precision: str) -> Iterator[None]:
    before = SETTINGS.fp32_precision
    SETTINGS.fp32_precision = precision
    try:
        yield
    finally:
        SETTINGS.fp32_precision = before


def leaves(target, dtype=torch.float32, size=(5, 6)):
    """Positive, so that rounding is all that errors consist of."""
    features = random(3, 20, 5, 6, seed=1).abs() + 0.1
    maps = attention_maps(3, 7, *size, seed=2, dtype=torch.float64) + 0.1
    return [x.to(target.device, dtype).requires_grad_() for x in (features, maps)]


def run(target, inputs, function=mk.bilinear_attention_pool, **options):
    out = target.call(function, *inputs, **options)
    return [out.detach(), *torch.autograd.grad(out.square().sum() + out.sum(), inputs)]


def takes_part(target) -> bool:
    """Whether a target has products of its own on a GPU, emulated or not."""
    return target.backend == "cuda"


@pytest.mark.parametrize("size", [(5, 6), (3, 4)], ids=str)
def test_results_change_by_the_rounding_of_tf32(target, size):
    if not takes_part(target):
        pytest.skip("its float32 products are not the package's own, or not on a GPU")
    inputs = leaves(target, size=size)
    with products_in("ieee"):
        exact = run(target, inputs, signed_sqrt=False, normalize=False)
    with products_in("tf32"):
        rounded = run(target, inputs, signed_sqrt=False, normalize=False)
    for a, b in zip(rounded, exact, strict=True):
        error = (a - b) / b
        assert 2**-16 < float(error.abs().max()) < 2**-9
        # Rounded to nearest, not cut off.
        assert abs(float(error.mean())) < 2**-13


def test_every_step_of_the_default_pooling_stays_within_tf32(target):
    inputs = leaves(target)
    with products_in("ieee"):
        exact = run(target, inputs)
    with products_in("tf32"):
        rounded = run(target, inputs)
    for a, b in zip(rounded, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=5e-3, atol=5e-3 * float(b.abs().max()))
        assert takes_part(target) != identical(a, b) or target.device == "cuda"


def test_float32_is_left_alone_without_tf32(target):
    """Whatever was set before, or for something else than products."""
    inputs = leaves(target)
    with products_in("ieee"):
        exact = run(target, inputs)
    with products_in("tf32"):
        run(target, inputs)
    with products_in("ieee"):
        again = run(target, inputs)
    wanted = run(target, [x.detach().double().requires_grad_() for x in inputs])
    for a, b, c in zip(exact, again, wanted, strict=True):
        assert identical(a, b)
        torch.testing.assert_close(a.double(), c, rtol=1e-5, atol=1e-5 * float(c.abs().max()))


@all_dtypes
@pytest.mark.parametrize("pool", ["avg", "max"])
def test_nothing_else_depends_on_the_setting(target, dtype, pool):
    if dtype == torch.float32 and (pool == "avg" or target.device == "cuda"):
        pytest.skip("float32 products depend on it")
    inputs = leaves(target, dtype)
    with products_in("ieee"):
        exact = run(target, inputs, pool=pool)
    with products_in("tf32"):
        rounded = run(target, inputs, pool=pool)
    assert all(identical(a, b) for a, b in zip(exact, rounded, strict=True))


def test_the_backward_rounds_as_its_forward_did(target):
    if not takes_part(target):
        pytest.skip("its float32 products are not the package's own, or not on a GPU")
    inputs = leaves(target)
    with products_in("tf32"):
        wanted = run(target, inputs)
        out = target.call(mk.bilinear_attention_pool, *inputs)
    with products_in("ieee"):
        found = torch.autograd.grad(out.square().sum() + out.sum(), inputs)
    assert all(identical(a, b) for a, b in zip(found, wanted[1:], strict=True))


def test_a_compiled_function_follows_the_setting(target):
    """One graph; a change of the setting is traced again, and back."""
    torch._dynamo.reset()
    compiled = torch.compile(mk.bilinear_attention_pool, fullgraph=True, backend="aot_eager")
    inputs = leaves(target)
    for precision in ("ieee", "tf32", "ieee"):
        with products_in(precision):
            found, wanted = run(target, inputs, compiled), run(target, inputs)
        assert all(identical(a, b) for a, b in zip(found, wanted, strict=True))
    torch._dynamo.reset()


@pytest.mark.parametrize(("level", "allowed"), [("highest", False), ("high", True)])
def test_the_older_name_of_the_setting(target, level, allowed):
    before, inputs = torch.get_float32_matmul_precision(), leaves(target)
    with products_in("tf32" if allowed else "ieee"):
        wanted = run(target, inputs)
    torch.set_float32_matmul_precision(level)
    try:
        found = run(target, inputs)
    finally:
        torch.set_float32_matmul_precision(before)
    assert all(identical(a, b) for a, b in zip(found, wanted, strict=True))
