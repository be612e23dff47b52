"""How a model runs: device, precision, memory format and kernels, in one object and one context."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

import magsd_kernels
from magsd.errors import ConfigError
from magsd.torch_settings import tf32_products
from magsd_kernels import BackendUnavailable
from magsd_kernels.info import in_use

if TYPE_CHECKING:
    from magsd.config import TrainConfig

M = TypeVar("M", bound=nn.Module)

#: Name -> what autocast computes in, None where it does not take part.
PRECISIONS: dict[str, torch.dtype | None] = {
    "float32": None,
    "tf32": None,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


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
class Runtime:
    """How a model trains or predicts; `with runtime:` around everything that runs it.

    The context chooses the backend of `magsd_kernels`, for the current thread, and lets float32
    products run in TF32 where that is the precision, for the whole process. It may be entered
    again within itself. Forward passes also run within `autocast()`, or, where nothing is trained,
    within `inference(model)`.

    precision: one of PRECISIONS; "tf32" is float32 whose products may run in TF32 on a GPU, the
        half precisions are autocast's.
    channels_last: memory format of images and weights.
    kernels: a backend of `magsd_kernels`; "auto" leaves the choice, and with it MAGSD_BACKEND, to
        that package.

    Raises ValueError for another precision, and `ConfigError` on entering where the backend does
    not exist or cannot run here.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    precision: str = "float32"
    channels_last: bool = False
    kernels: str = "auto"
    _entered: list[ExitStack] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            known = ", ".join(PRECISIONS)
            raise ValueError(f"precision: expected one of {known}, got {self.precision!r}")

    @classmethod
    def from_config(cls, train: TrainConfig) -> Runtime:
        """What a configuration asks for. Raises `ConfigError` for a device that is absent."""
        device = choose_device(train.device)
        return cls(device, train.precision, train.channels_last, train.kernels)

    def __enter__(self) -> Runtime:
        with ExitStack() as stack:
            stack.enter_context(_kernels(self.kernels))
            stack.enter_context(tf32_products(self.precision == "tf32"))
            self._entered.append(stack.pop_all())
        return self

    def __exit__(self, *error: object) -> None:
        self._entered.pop().close()

    def autocast(self) -> AbstractContextManager[object]:
        """Context of forward passes: autocast to the half precision, or nothing."""
        dtype = PRECISIONS[self.precision]
        if dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=dtype)

    @contextlib.contextmanager
    def inference(self, model: nn.Module) -> Iterator[None]:
        """Evaluation mode without gradients, in this runtime; the model's mode is restored."""
        training = model.training
        model.eval()
        try:
            with self, torch.no_grad(), self.autocast():
                yield
        finally:
            model.train(training)

    def images(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) on the device, in the memory format."""
        images = images.to(self.device, non_blocking=True)
        if self.channels_last:
            return images.contiguous(memory_format=torch.channels_last)
        return images

    def model(self, model: M) -> M:
        """The model on the device, in the memory format."""
        model = model.to(self.device)
        return model.to(memory_format=torch.channels_last) if self.channels_last else model

    def grad_scaler(self) -> torch.amp.GradScaler:
        """What keeps float16's gradients from vanishing; it does nothing in other precisions."""
        return torch.amp.GradScaler(self.device.type, enabled=self.precision == "float16")

    def kernels_in_use(self) -> str:
        """What runs which operation within this context, in a line.

        Raises `ConfigError` where the backend asked for, in MAGSD_BACKEND too, cannot run them.
        """
        try:
            return in_use(self.device, PRECISIONS[self.precision] or torch.float32)
        except (ValueError, BackendUnavailable) as error:
            raise ConfigError(f"no kernels to run on {self.device}: {error}") from None


#: float32 on the CPU, the default of all that takes a runtime.
CPU = Runtime()


def _kernels(name: str) -> AbstractContextManager[object]:
    """Context in which `magsd_kernels` runs on a backend. Raises `ConfigError`."""
    if name == "auto":
        return contextlib.nullcontext()
    states = magsd_kernels.backends()
    if name not in states:
        known = ", ".join(["auto", *states])
        raise ConfigError(f"train.kernels={name}: no such backend; known: {known}")
    if states[name] != "available":
        raise ConfigError(f"train.kernels={name} cannot run here: {states[name]}")
    return magsd_kernels.use_backend(name)
