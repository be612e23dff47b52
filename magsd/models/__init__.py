"""Classifiers on timm backbones: MAG-SD, WS-DAN and the plain baseline.

Only the configuration is imported at once: reading a config needs neither torch nor timm.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from magsd.models.config import ModelConfig, Preprocessing

if TYPE_CHECKING:
    from magsd.methods.magsd import MAGSD
    from magsd.methods.plain import PlainClassifier
    from magsd.methods.wsdan import WSDAN
    from magsd.models.build import build_model, load_model
    from magsd.models.classifier import Classifier, ClassifierOutput

_LAZY = {
    "Classifier": "magsd.models.classifier",
    "ClassifierOutput": "magsd.models.classifier",
    "MAGSD": "magsd.methods.magsd",
    "PlainClassifier": "magsd.methods.plain",
    "WSDAN": "magsd.methods.wsdan",
    "build_model": "magsd.models.build",
    "load_model": "magsd.models.build",
}

__all__ = [
    "MAGSD",
    "WSDAN",
    "Classifier",
    "ClassifierOutput",
    "ModelConfig",
    "PlainClassifier",
    "Preprocessing",
    "build_model",
    "load_model",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
