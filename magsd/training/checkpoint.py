"""Checkpoints that survive a kill at any instant, loadable with `weights_only=True`."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from magsd.errors import RunError
from magsd.outputs import write_atomically

FORMAT = 2


def save_checkpoint(path: Path, payload: dict[str, Any]) -> None:
    """Write tensors and plain values to `path`, atomically."""
    write_atomically(path, lambda file: torch.save({"format": FORMAT, **payload}, file))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU. Raises `RunError` where it is missing or corrupt."""
    if not path.is_file():
        raise RunError(f"no checkpoint at {path}: the run was stopped before its first one")
    advice = "delete it, and resume from another copy or start the run again with --overwrite"
    try:
        # torch does not compare checksums when it reads; a flipped bit would load in silence.
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
        if broken is not None:
            raise RunError(f"corrupt checkpoint {path}: checksum of {broken} is wrong; {advice}")
        payload = torch.load(path, map_location="cpu", weights_only=True)
    except RunError:
        raise
    except Exception as error:  # a damaged file fails in many ways, all with the same remedy
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RunError(f"corrupt checkpoint {path} ({reason}); {advice}") from error
    if not isinstance(payload, dict) or payload.get("format") != FORMAT or "model" not in payload:
        raise RunError(f"{path} is not a checkpoint of this project (format {FORMAT}); {advice}")
    return payload


def load_weights(model: nn.Module, state: dict[str, Any], path: Path) -> None:
    """Give `model` the weights. Raises `RunError` where names or shapes differ."""
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise RunError(f"{path} does not fit the run's model: {error}") from error


def all_finite(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> bool:
    """True if weights, buffers and the optimizer's state are finite: one read of the device."""
    values = list(model.state_dict().values())
    if optimizer is not None:
        values += [v for state in optimizer.state.values() for v in state.values()]
    flags = [
        torch.isfinite(value).all()
        for value in values
        if isinstance(value, torch.Tensor) and value.is_floating_point()
    ]
    return all(bool(torch.stack(group).all()) for group in _by_device(flags))


def _by_device(flags: list[torch.Tensor]) -> list[list[torch.Tensor]]:
    groups: dict[torch.device, list[torch.Tensor]] = {}
    for flag in flags:
        groups.setdefault(flag.device, []).append(flag)
    return list(groups.values())


def random_state() -> dict[str, Any]:
    """State of torch's own generators, which dropout layers draw from."""
    state: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """The inverse of `random_state`; devices that are absent now are left out."""
    torch.set_rng_state(state["cpu"])
    if torch.cuda.is_available():
        for index, value in enumerate(state.get("cuda", [])[: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(value, index)
