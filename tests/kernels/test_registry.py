"""Who asks for a call gets it: modes, transforms and subclasses see the operator itself."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import magsd_kernels as mk

from .support import Target


class DispatchLog(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


class FunctionLog(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


class Subclass(torch.Tensor):
    """Counts the operators that its tensors meet."""

    names: ClassVar[list[str]] = []

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.names.append(str(function))
        return super().__torch_function__(function, types, args, kwargs or {})


@pytest.fixture
def inputs(target: Target) -> tuple[torch.Tensor, torch.Tensor]:
    features = torch.rand(2, 4, 3, 3, device=target.device, requires_grad=True)
    return features, torch.rand(2, 2, 3, 3, device=target.device)


@pytest.mark.parametrize("mode", [DispatchLog, FunctionLog])
def test_a_mode_sees_the_operator(target, inputs, mode):
    expected = target.call(mk.bilinear_attention_pool, *inputs)
    with mode() as log:
        found = target.call(mk.bilinear_attention_pool, *inputs)
    assert any("magsd.bilinear_attention_pool" in name for name in log.names)
    torch.testing.assert_close(found, expected)
    assert found.requires_grad


def test_a_mode_sees_the_backward_operator(target, inputs):
    pooled = target.call(mk.bilinear_attention_pool, *inputs)
    with DispatchLog() as log:
        pooled.sum().backward()
    assert any("magsd.bilinear_attention_pool_backward" in name for name in log.names)


def test_a_subclass_sees_the_operator(target, inputs):
    features, attention = inputs
    Subclass.names.clear()
    target.call(mk.bilinear_attention_pool, features.detach().as_subclass(Subclass), attention)
    assert any("magsd.bilinear_attention_pool" in name for name in Subclass.names)


def test_a_transform_sees_the_operator(target, inputs):
    """vmap calls it once for each entry of the dimension that it adds."""
    features, attention = (x.detach().expand(2, *x.shape) for x in inputs)
    expected = target.call(mk.bilinear_attention_pool, features[0], attention[0])
    found = torch.vmap(lambda f, a: target.call(mk.bilinear_attention_pool, f, a))(
        features, attention
    )
    torch.testing.assert_close(found, expected.expand(2, *expected.shape))


def test_fake_tensors_stay_fake(target, inputs):
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    mode = FakeTensorMode()
    features, attention = (mode.from_tensor(x.detach()) for x in inputs)
    with mode:
        found = target.call(mk.bilinear_attention_pool, features, attention)
    assert isinstance(found, FakeTensor)
    assert found.shape == (2, 8)


def test_the_plain_call_and_the_dispatched_one_agree(target, inputs):
    """Bit by bit, gradients too."""

    def run() -> list[torch.Tensor]:
        features, attention = (x.detach().clone().requires_grad_() for x in inputs)
        pooled = target.call(mk.bilinear_attention_pool, features, attention, scale=100)
        return [pooled.detach(), *torch.autograd.grad(pooled.square().sum(), (features, attention))]

    plain = run()
    with DispatchLog():
        dispatched = run()
    for a, b in zip(plain, dispatched, strict=True):
        assert torch.equal(a, b)


def test_inference_and_no_grad(target, inputs):
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert not target.call(mk.bilinear_attention_pool, *inputs).requires_grad
