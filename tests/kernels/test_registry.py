"""How the operators are registered: what sees them, and what autograd makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import magsd_kernels as mk

from .cases import BY_NAME
from .support import Target, tensors_of


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


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::FutureWarning:torch.jit")
def test_what_records_a_call_without_gradients_sees_the_operator(target, inputs):
    """And not that of a library, to which such a call goes where nothing records it."""
    from torch.fx.experimental.proxy_tensor import make_fx

    inputs = [x.detach() for x in inputs]

    def pool(features, attention):
        return target.call(mk.bilinear_attention_pool, features, attention)

    with DispatchLog() as log:
        pool(*inputs)
    name = "magsd.bilinear_attention_pool"
    assert [each.removesuffix(".default") for each in log.names] == [name]
    assert name in make_fx(pool)(*inputs).code
    assert name.replace(".", "::") in str(torch.jit.trace(pool, inputs).graph)


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


def test_only_public_entry_points_of_torch_are_called():
    package = Path(mk.__file__).parent
    assert [path for path in package.rglob("*.py") if "torch._C" in path.read_text()] == []


def test_running_statistics_are_seen_to_change(target):
    """Autograd refuses what was saved before, whatever backend wrote."""
    case = BY_NAME["multiscale_train"]
    arguments = case.arguments(device=target.device)
    for requires_grad in (True, False):
        versions = [x._version for x in tensors_of([arguments[name] for name in case.written])]
        for leaf in case.leaves(arguments):
            leaf.requires_grad_(requires_grad)
        target.call(case.function, **arguments)
        after = [x._version for x in tensors_of([arguments[name] for name in case.written])]
        assert all(a > b for a, b in zip(after, versions, strict=True))


@pytest.mark.parametrize("name", ["attention", "theta"])
def test_images_without_grad_cost_no_backward(target, name):
    """The attention requires grad in training, and gets none."""
    arguments = BY_NAME["views"].arguments(device=target.device)
    arguments["images"].requires_grad_(False)
    arguments[name].requires_grad_()
    assert not target.call(mk.attention_views, **arguments).requires_grad


def test_a_second_derivative_is_refused_by_the_name_of_the_operation(target, inputs):
    pooled = target.call(mk.bilinear_attention_pool, *inputs)
    (grad,) = torch.autograd.grad(pooled.square().sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="bilinear_attention_pool: second derivatives"):
        grad.sum().backward()
