"""Several processes that train one model: who they are, and what they exchange.

`torchrun` starts them and tells each its place by environment variables; all traffic is
torch.distributed's (NCCL between GPUs, gloo between CPUs and for what the hosts agree upon), and
gradients are averaged by DistributedDataParallel. Every process knows the whole batch's order,
random numbers and labels from the seed, so that a step itself needs no other communication.
"""

from __future__ import annotations

import contextlib
import gc
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Protocol, TypeVar, cast

import torch
import torch.distributed as dist
from timm.layers.norm_act import convert_sync_batchnorm
from torch import Tensor, nn

from magsd.config import TrainConfig
from magsd.errors import ConfigError, RunError
from magsd.launch import (
    launch_name,
    launched,
    local_rank,
    process_count,
    process_rank,
    restarts,
)
from magsd.runtime import choose_device

T = TypeVar("T")
_LAUNCH = ".launch"


@dataclass(frozen=True)
class Team:
    """The place of a process among those that train together; alone, every method is for free.

    Where there are several, all must call the same methods in the same order.
    """

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """True for the one process that writes files and speaks."""
        return self.rank == 0

    def all_reduce(self, values: Tensor) -> Tensor:
        """`values`, added up over the processes in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def all_reduce_min(self, values: Tensor) -> Tensor:
        """`values`, the least of the processes in place."""
        if self.size > 1:
            dist.all_reduce(values, dist.ReduceOp.MIN)
        return values

    def all_reduce_max(self, number: int) -> int:
        """The greatest of the processes' numbers; no device is waited for."""
        if self.size == 1:
            return number
        value = torch.tensor(number)
        dist.all_reduce(value, dist.ReduceOp.MAX)
        return int(value)

    def broadcast(self, value: T) -> T:
        """The leader's value, which every process gets; the others' own values are ignored."""
        if self.size == 1:
            return value
        box = [value if self.is_main else None]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return cast(T, box[0])

    def broadcast_buffers(self, model: nn.Module) -> None:
        """Give the leader's buffers, batch norms' running statistics among them, to all."""
        if self.size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)


ALONE = Team()


def synchronize_batchnorm(model: nn.Module) -> None:
    """Convert every batch norm in place, once, those of timm that hold an activation as well."""
    if any(isinstance(module, nn.SyncBatchNorm) for module in model.modules()):
        return  # timm would take the activations from those that it converted before
    for name, child in model.named_children():
        setattr(model, name, convert_sync_batchnorm(child))


@contextlib.contextmanager
def team_of(train: TrainConfig) -> Iterator[Team]:
    """The processes that `torchrun` started, connected within the context; or this one alone.

    Raises `ConfigError` for settings that they, or this device, cannot train with.
    """
    if train.sync_batchnorm and choose_device(train.device).type != "cuda":
        raise ConfigError(
            "train.sync_batchnorm=true needs GPUs: torch has no synchronized batch norm on the CPU"
        )
    if process_count() == 1:
        yield ALONE
        return
    if train.batch_size < 2 * process_count():
        raise ConfigError(
            f"train.batch_size={train.batch_size} is shared by {process_count()} processes; each "
            f"needs 2 images for its batch statistics: expected at least {2 * process_count()}"
        )
    device = _own_device(train.device)
    _connect(device)
    try:
        yield Team(process_rank(), process_count())
    except BaseException as error:
        # After an error of one process NCCL would wait here for the others, which wait for it;
        # this process must end for torchrun to see it.
        if device.type != "cuda":
            _disconnect()
        if isinstance(error, RuntimeError) and _lost_another(error):
            raise RunError(f"another process ended, and said why ({error})") from error
        raise
    _disconnect()


def _connect(device: torch.device) -> None:
    """Join the process group: NCCL on GPUs, gloo for hosts."""
    # Here, since a torch that was built without torch.distributed trains in one process.
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    rank, size = process_rank(), process_count()
    store, _, _ = next(rendezvous("env://", rank, size))
    # torchrun's store outlives a restart, with the addresses of processes that are dead.
    store = PrefixStore(f"magsd/{_name_of_this_try(store, rank, size)}", store)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl", store=store, rank=rank, world_size=size, device_id=device
        )
    else:
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size)


def _disconnect() -> None:
    """Leave the process group, after what still refers to it: models stand in cycles."""
    gc.collect()
    dist.destroy_process_group()


class _Store(Protocol):
    """What is used of torch.distributed.Store, whose own types lack the timeout."""

    @property
    def timeout(self) -> timedelta: ...
    def set(self, key: str, value: str, /) -> None: ...
    def get(self, key: str, /) -> bytes: ...
    def check(self, keys: list[str], /) -> bool: ...


def _name_of_this_try(store: _Store, rank: int, size: int) -> str:
    """A name that only the processes that live now share, over a store full of older ones' keys.

    Everyone writes a new name under its rank; the leader answers each name it sees with its own,
    until every process has said that it got the answer.
    """
    own = uuid.uuid4().hex
    if rank:
        store.set(f"magsd/process/{rank}", own)
        leader = store.get(f"magsd/answer/{own}").decode()
        store.set(f"magsd/met/{leader}/{rank}", "1")
        return leader
    answered: dict[int, bytes] = {}
    missing = set(range(1, size))
    deadline = time.monotonic() + store.timeout.total_seconds()
    while missing:
        if time.monotonic() > deadline:
            raise RunError(f"{len(missing)} of {size} processes did not come, {min(missing)} first")
        for other in sorted(missing):
            if store.check([f"magsd/met/{own}/{other}"]):
                missing.remove(other)
            elif store.check([f"magsd/process/{other}"]):
                name = store.get(f"magsd/process/{other}")
                if answered.get(other) != name:
                    store.set(f"magsd/answer/{name.decode()}", own)
                    answered[other] = name
        time.sleep(0.01)
    return own


def _lost_another(error: RuntimeError) -> bool:
    """Whether an exchange failed because a process at its other end is gone."""
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)


def _own_device(name: str) -> torch.device:
    """One GPU for each process of a machine, or the CPU for all."""
    device = choose_device(name)
    if device.type == "cpu":
        return device
    if device.type != "cuda" or device.index is not None:
        raise ConfigError(
            f"train.device={name}: several processes train on cpu or on cuda, one GPU each"
        )
    if local_rank() >= torch.cuda.device_count():
        raise ConfigError(
            f"process {local_rank()} of this machine has no GPU: there are "
            f"{torch.cuda.device_count()}; start as many with --nproc-per-node"
        )
    return torch.device("cuda", local_rank())


def note_launch(folder: Path) -> None:
    """Write down in a run's folder which start of `torchrun` trains it."""
    if launched():
        (folder / _LAUNCH).write_text(launch_name())


def restarted(team: Team, folder: Path) -> bool:
    """True where `torchrun` has started the processes again and `folder` is of an earlier try.

    A run that another start left there does not count: nobody asked to resume it. torchrun
    counts restarts on the machine where a process failed, and nowhere else.
    """
    if not team.all_reduce_max(restarts()):
        return False
    note = folder / _LAUNCH
    return team.broadcast(note.is_file() and note.read_text() == launch_name())
