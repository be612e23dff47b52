"""Device, precision and memory format of a run."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from magsd.errors import ConfigError

M = TypeVar("M", bound=nn.Module)


def choose_device(name: str) -> torch.device:
    """The device that `name` means; "auto" takes a GPU where there is one.

    Raises `ConfigError` for a name that is no device or that this machine lacks.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"train.device={name}: cannot be used here ({reason})") from None
    return device


@dataclass(frozen=True)
class Precision:
    """How a model's forward pass runs."""

    device: torch.device
    bfloat16: bool = False
    channels_last: bool = False

    def autocast(self) -> AbstractContextManager[object]:
        """Context for forward passes: bfloat16 autocast, or nothing."""
        if not self.bfloat16:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def images(self, images: Tensor) -> Tensor:
        """Images in the run's memory format."""
        if self.channels_last:
            return images.contiguous(memory_format=torch.channels_last)
        return images

    def model(self, model: M) -> M:
        """The model on the device, in the run's memory format."""
        model = model.to(self.device)
        return model.to(memory_format=torch.channels_last) if self.channels_last else model
