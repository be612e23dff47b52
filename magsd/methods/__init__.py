"""The methods that train a classifier, one a file; importing this package registers them all.

A file holds the method's sections of the configuration, its views, its loss and its network, which
`register_method` decorates; `model.name` chooses it. How to add one: docs/models.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pkgutil import iter_modules
from typing import Any, TypeVar

from torch import Tensor

from magsd.config import Config, LossConfig, ViewsConfig
from magsd.errors import ConfigError
from magsd.models.classifier import Classifier
from magsd.models.config import ModelConfig
from magsd.training.step import StepFunction

__all__ = ["Method", "method", "methods", "register_method"]

Network = TypeVar("Network", bound=type[Classifier])


@dataclass(frozen=True, eq=False)
class Method:
    """One way to train a classifier.

    network: the model's class, which takes the values of the section `model` as arguments, its name
        apart, and num_classes, classes and preprocessing.
    model, views, loss: dataclasses of the sections of those names: the keys that the method reads.
    objective: the training step, from the whole configuration and the weights of the classes, (K,)
        float32 on the device, or None.
    variants: name -> dotted keys and values that make it, for `model=NAME`.
    """

    name: str
    network: type[Classifier]
    objective: Callable[[Config, Tensor | None], StepFunction]
    model: type[ModelConfig]
    views: type[ViewsConfig]
    loss: type[LossConfig]
    variants: Mapping[str, Mapping[str, Any]]


_METHODS: dict[str, Method] = {}


def register_method(
    *,
    objective: Callable[[Config, Tensor | None], StepFunction],
    model: type[ModelConfig] = ModelConfig,
    views: type[ViewsConfig] = ViewsConfig,
    loss: type[LossConfig] = LossConfig,
    variants: Mapping[str, Mapping[str, Any]] | None = None,
) -> Callable[[Network], Network]:
    """Decorator of a network's class: makes its method known under the class's `name`.

    objective, model, views, loss, variants: see `Method`. Raises ValueError for a name that another
    method or variant has, and where the section `model` has another name.
    """

    def register(network: Network) -> Network:
        name = network.name
        if model().name != name:
            raise ValueError(f"{model.__name__}.name: expected {name!r}, got {model().name!r}")
        own = {name: {}} if variants is None else variants
        taken = {variant for known in _METHODS.values() for variant in known.variants}
        for each in (name, *own):
            if each in _METHODS or each in taken:
                raise ValueError(f"there is a method or a variant {each!r} already")
        _METHODS[name] = Method(name, network, objective, model, views, loss, own)
        return network

    return register


def method(name: str) -> Method:
    """The method that `model.name` chooses. Raises `ConfigError` for a name that none has."""
    if name not in _METHODS:
        raise ConfigError(f"unknown model {name!r}; known: {', '.join(_METHODS)}")
    return _METHODS[name]


def methods() -> list[str]:
    """Names of all methods."""
    return list(_METHODS)


for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
