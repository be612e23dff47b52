"""Batch norms of ready models, with the activation and residual after them, as one operation.

Modules stay where they are, with their names: those that are known get a subclass of their own
class, whose forward does the same by `batch_norm_act`.
"""

from __future__ import annotations

import functools
import sys
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from magsd_kernels._norms import (
    GroupAware,
    PlainNorm,
    current_groups,
    each_group,
    regular,
)
from magsd_kernels.batch_norm_act import act_name, fused, norm_act

Tensor = torch.Tensor


def fuse_batch_norms(model: nn.Module) -> list[str]:
    """Let a model compute batch norms, and what follows them, by `batch_norm_act`; in place.

    Known are the batch norm alone, before an activation in an `nn.Sequential`, in timm's
    `BatchNormAct2d`, residual blocks of ResNet, stems and feature extractors, and in torchvision's
    blocks of ResNet, DenseNet and Inception. Outputs, gradients, statistics and the state dict stay
    as they were, up to rounding; no module is replaced, but its class becomes a subclass of what it
    was. A batch norm without parameters, running statistics or momentum, and an activation or norm
    inside a block that has hooks, run as before. All of them follow `norm_groups`.

    Convert to `SyncBatchNorm` before: synchronized norms run unfused, group by group.

    Returns:
        The names of batch norms, and of other modules with running statistics, that it does not
        know: they run as before and do not follow `norm_groups`.
    """
    for module in list(_walk(model, "")):
        _fuse(module[1])
    return ungrouped_norms(model)


def ungrouped_norms(model: nn.Module) -> list[str]:
    """Names of modules that may normalize by a whole batch whatever `norm_groups` says."""
    return [
        name
        for name, module in _walk(model, "")
        if not isinstance(module, GroupAware)
        and (isinstance(module, _BatchNorm) or "running_var" in module._buffers)
    ]


def _walk(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """All modules and their names but those inside group-aware ones."""
    yield name, module
    if isinstance(module, GroupAware):
        return
    for child_name, child in module.named_children():
        yield from _walk(child, f"{name}.{child_name}" if name else child_name)


def _fuse(module: nn.Module) -> None:
    base = type(module)
    if issubclass(base, _Fused):
        return
    mixin = _mixin_for(base)
    if mixin is not None and mixin.concerns(module):
        module.__class__ = _subclass(base)


_subclasses: dict[type[nn.Module], type[nn.Module]] = {}


def _subclass(base: type[nn.Module]) -> type[nn.Module]:
    """The one that runs the operation."""
    if base not in _subclasses:
        mixin = _mixin_for(base)
        assert mixin is not None
        body = {"__module__": __name__, "__doc__": base.__doc__, "base": base}
        _subclasses[base] = type(f"Fused{base.__name__}", (mixin, base), body)
    return _subclasses[base]


def _empty(base: type[nn.Module]) -> nn.Module:
    """An instance before its state is set, for pickle and copy."""
    made = _subclass(base)
    return made.__new__(made)


class _Fused:
    """Of subclasses that run the operation. base: the class that the module had."""

    base: ClassVar[Any]

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        return _empty, (self.base,), *reduced[2:]

    @classmethod
    def concerns(cls, module: nn.Module) -> bool:
        """Whether the module is a batch norm or has one of its own."""
        return any(isinstance(each, _BatchNorm) for each in (module, *module.children()))


class _Norm(_Fused, PlainNorm):
    """`nn.BatchNorm2d`."""

    def forward(self, x: Tensor) -> Tensor:
        groups = current_groups()
        if regular(self):
            return fused(self, x, "none", None, groups)
        return _by_base(self, x, groups)


class _NormAct(_Fused, GroupAware):
    """timm's `BatchNormAct2d`."""

    act: nn.Module
    drop: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        groups = current_groups()
        if not regular(self):
            return _by_base(self, x, groups)
        name = act_name(self.act) if act_name(self.drop) == "none" else None
        result = fused(self, x, name or "none", None, groups)
        if name is None:
            result = self.act(self.drop(result))
        return result


class _SyncNorm(_Fused, GroupAware):
    """`nn.SyncBatchNorm`, timm's with an activation as well: unfused."""

    def forward(self, x: Tensor) -> Tensor:
        return _by_base(self, x, current_groups())


def _by_base(norm: Any, x: Tensor, groups: int) -> Tensor:
    return each_group(norm, functools.partial(norm.base.forward, norm), x, groups)


class _Sequential(_Fused):
    """`nn.Sequential`, also as timm's and torchvision's convolutions with norm and activation."""

    _modules: dict[str, nn.Module]

    @classmethod
    def concerns(cls, module: nn.Module) -> bool:
        return any(act is not None for *_, act in _steps(module._modules.items()))

    def forward(self, input: Any) -> Any:
        for _, module, act in _steps(self._modules.items()):
            input = module(input) if act is None else norm_act(module, input, act)
        return input


def _steps(
    modules: Iterable[tuple[str, Any]], apart: Collection[str] = ()
) -> list[tuple[str, nn.Module, nn.Module | None]]:
    """Modules that run in order, an activation together with the batch norm before it.

    apart: names of modules whose own result is wanted.
    """
    steps: list[tuple[str, nn.Module, nn.Module | None]] = []
    for name, module in modules:
        if steps and isinstance(module, (nn.ReLU, nn.SiLU, nn.Identity)):
            before, norm, act = steps[-1]
            if act is None and isinstance(norm, _BatchNorm) and before not in apart:
                steps[-1] = (name, norm, module)
                continue
        steps.append((name, module, None))
    return steps


class _Features(_Fused):
    """timm's feature extractors that run a model's modules in order."""

    grad_checkpointing: bool
    return_layers: dict[str, str]
    concat: bool
    items: Any

    @classmethod
    def concerns(cls, module: Any) -> bool:
        return any(act is not None for *_, act in _steps(module.items(), module.return_layers))

    def _collect(self, x: Any) -> Any:
        if self.grad_checkpointing:
            return self.base._collect(self, x)
        out = OrderedDict()
        for name, module, act in _steps(self.items(), self.return_layers):
            x = module(x) if act is None else norm_act(module, x, act)
            if name in self.return_layers:
                several = isinstance(x, (tuple, list))
                found = (torch.cat(x, 1) if self.concat else x[0]) if several else x
                out[self.return_layers[name]] = found
        return out


class _HookedFeatures(_Fused):
    """timm's feature extractor that takes maps by hooks."""

    grad_checkpointing: bool
    return_dict: bool
    hooks: Any
    items: Any

    @classmethod
    def concerns(cls, module: Any) -> bool:
        return any(act is not None for *_, act in _steps(module.items()))

    def forward(self, x: Any) -> Any:
        if self.grad_checkpointing:
            return self.base.forward(self, x)
        for _, module, act in _steps(self.items()):
            x = module(x) if act is None else norm_act(module, x, act)
        out = self.hooks.get_output(x.device)
        return out if self.return_dict else list(out.values())


class _TimmResidual(_Fused):
    """Last part of timm's residual blocks."""

    se: nn.Module | None
    drop_path: nn.Module | None
    downsample: nn.Module | None

    def _joined(self, norm: nn.Module, x: Tensor, act: nn.Module, shortcut: Tensor) -> Tensor:
        """The norm of the last convolution's result, and the shortcut."""
        if self.downsample is not None:
            shortcut = self.downsample(shortcut)
        if self.se is None and self.drop_path is None:
            return norm_act(norm, x, act, shortcut)
        x = norm_act(norm, x, "none")
        if self.se is not None:
            x = self.se(x)
        if self.drop_path is not None:
            x = self.drop_path(x)
        x += shortcut
        return act(x)  # type: ignore[no-any-return]


def _dropped(norm: nn.Module, x: Tensor, drop: nn.Module, act: nn.Module) -> Tensor:
    """act(drop(norm(x)))."""
    if act_name(drop) == "none":
        return norm_act(norm, x, act)
    return act(drop(norm_act(norm, x, "none")))  # type: ignore[no-any-return]


class _TimmBasicBlock(_TimmResidual):
    """timm's `BasicBlock`."""

    def forward(self: Any, x: Tensor) -> Tensor:
        shortcut = x
        x = self.aa(_dropped(self.bn1, self.conv1(x), self.drop_block, self.act1))
        return self._joined(self.bn2, self.conv2(x), self.act2, shortcut)  # type: ignore[no-any-return]


class _TimmBottleneck(_TimmResidual):
    """timm's `Bottleneck`."""

    def forward(self: Any, x: Tensor) -> Tensor:
        shortcut = x
        x = norm_act(self.bn1, self.conv1(x), self.act1)
        x = self.aa(_dropped(self.bn2, self.conv2(x), self.drop_block, self.act2))
        return self._joined(self.bn3, self.conv3(x), self.act3, shortcut)  # type: ignore[no-any-return]


class _TimmResNet(_Fused):
    """Stem of timm's `ResNet`."""

    def forward_features(self: Any, x: Tensor) -> Tensor:
        if self.grad_checkpointing:
            return self.base.forward_features(self, x)  # type: ignore[no-any-return]
        x = self.maxpool(norm_act(self.bn1, self.conv1(x), self.act1))
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))  # type: ignore[no-any-return]


class _ResNet(_Fused):
    """Stem of torchvision's `ResNet`."""

    def _forward_impl(self: Any, x: Tensor) -> Tensor:
        x = self.maxpool(norm_act(self.bn1, self.conv1(x), self.relu))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))  # type: ignore[no-any-return]


class _BasicBlock(_Fused):
    """torchvision's `BasicBlock`."""

    def forward(self: Any, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = norm_act(self.bn1, self.conv1(x), self.relu)
        return norm_act(self.bn2, self.conv2(x), self.relu, shortcut)


class _Bottleneck(_Fused):
    """torchvision's `Bottleneck`."""

    def forward(self: Any, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = norm_act(self.bn1, self.conv1(x), self.relu)
        x = norm_act(self.bn2, self.conv2(x), self.relu)
        return norm_act(self.bn3, self.conv3(x), self.relu, shortcut)


class _DenseLayer(_Fused):
    """torchvision's `_DenseLayer`."""

    def bn_function(self: Any, inputs: list[Tensor]) -> Tensor:
        joined = norm_act(self.norm1, torch.cat(inputs, 1), self.relu1)
        return self.conv1(joined)  # type: ignore[no-any-return]

    def forward(self: Any, input: Tensor | list[Tensor]) -> Tensor:
        inputs = [input] if isinstance(input, Tensor) else input
        if self.memory_efficient and self.any_requires_grad(inputs):
            x = self.call_checkpoint_bottleneck(inputs)
        else:
            x = self.bn_function(inputs)
        x = self.conv2(norm_act(self.norm2, x, self.relu2))
        if self.drop_rate > 0:
            x = nn.functional.dropout(x, p=self.drop_rate, training=self.training)
        return x  # type: ignore[no-any-return]


class _BasicConv2d(_Fused):
    """torchvision's `BasicConv2d` of Inception and GoogLeNet."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return norm_act(self.bn, self.conv(x), "relu")


#: Module, class and method of what is known -> what takes its place. A class that inherits the
#: method is as well known as the one that has it. The first that fits is taken.
_KNOWN: tuple[tuple[str, str, str, type[_Fused]], ...] = (
    ("timm.layers.norm_act", "BatchNormAct2d", "forward", _NormAct),
    ("torch.nn", "SyncBatchNorm", "forward", _SyncNorm),
    ("timm.layers.norm_act", "SyncBatchNormAct", "forward", _SyncNorm),
    ("torch.nn", "BatchNorm2d", "forward", _Norm),
    ("timm.models._features", "FeatureDictNet", "_collect", _Features),
    ("timm.models._features", "FeatureHookNet", "forward", _HookedFeatures),
    ("timm.models.resnet", "BasicBlock", "forward", _TimmBasicBlock),
    ("timm.models.resnet", "Bottleneck", "forward", _TimmBottleneck),
    ("timm.models.resnet", "ResNet", "forward_features", _TimmResNet),
    ("torchvision.models.resnet", "BasicBlock", "forward", _BasicBlock),
    ("torchvision.models.resnet", "Bottleneck", "forward", _Bottleneck),
    ("torchvision.models.resnet", "ResNet", "_forward_impl", _ResNet),
    ("torchvision.models.densenet", "_DenseLayer", "forward", _DenseLayer),
    ("torchvision.models.inception", "BasicConv2d", "forward", _BasicConv2d),
    ("torchvision.models.googlenet", "BasicConv2d", "forward", _BasicConv2d),
    ("torch.nn", "Sequential", "forward", _Sequential),
)


def _mixin_for(cls: type[nn.Module]) -> type[_Fused] | None:
    """What a class can become, among the modules of libraries that have been imported."""
    if issubclass(cls, nn.modules.lazy.LazyModuleMixin):
        return None
    for module, name, method, mixin in _KNOWN:
        known = getattr(sys.modules.get(module), name, None)
        if (
            known is not None
            and issubclass(cls, known)
            and getattr(cls, method) is getattr(known, method)
        ):
            return mixin
    return None
