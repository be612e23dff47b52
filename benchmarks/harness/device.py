"""The device, and what is read off: copy bandwidth, peak memory, kernel time, launches, waits."""

from __future__ import annotations

import argparse
import gc
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.harness.timing import Call, Quartiles, quartiles
from magsd_kernels.cases import tensors_of

_GRAPH_REPLAYS = 30
_LAUNCHES = ("cudaLaunch", "cuLaunch", "cudaMemcpy", "cudaMemset", "cudaGraphLaunch")
_WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize")
_HOST_READS = (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero)
_FROM_NUMBERS = (torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor)
_MOST_SETS = 32


@dataclass(frozen=True)
class Device:
    """A device type, "cpu" or "cuda", and how to measure on it."""

    type: str

    def synchronize(self) -> None:
        """Wait until all work is done."""
        if self.type == "cuda":
            torch.cuda.synchronize()

    def seconds(self, call: Call) -> float:
        """Of one call."""
        self.synchronize()
        start = perf_counter()
        call()
        self.synchronize()
        return perf_counter() - start

    def release(self) -> None:
        """Give back memory that nothing holds any more, that of destroyed CUDA graphs included."""
        gc.collect()
        if self.type == "cuda":
            torch.cuda.empty_cache()

    def input_sets(self, set_bytes: int) -> int:
        """How many input sets are needed to leave the caches behind, within reason."""
        footprint = 64 << 20  # a CPU's last cache is often shared with strangers
        if self.type == "cuda":
            footprint = 2 * torch.cuda.get_device_properties(0).L2_cache_size
        return min(max(2, -(-footprint // max(set_bytes, 1))), _MOST_SETS)

    def copy(self, quick: bool) -> tuple[Call, int]:
        """A copy between two large buffers, and the bytes that it reads and writes."""
        count = (1 << 30 if self.type == "cuda" else 64 << 20) >> (3 if quick else 0)
        source = torch.randint(256, (count,), dtype=torch.uint8, device=self.type)
        target = torch.empty_like(source)
        return partial(target.copy_, source), 2 * count

    def peak_memory(self, call: Call) -> int:
        """Most bytes that torch's allocator held during a call, over what it held before.

        The result counts. On the CPU the profiler reports every allocation.
        """
        if self.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            call()
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated() - before
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            held = call()
        del held
        events: Any = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
        changes = sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns())
        peak: int = max(accumulate((e.nbytes() for e in changes), initial=0))
        return peak

    def kernel_seconds(self, calls: Sequence[Call]) -> Quartiles:
        """Seconds per call of a CUDA graph that holds all calls, over replays.

        The results are held while the graph is captured, so that each call writes memory of its
        own, as its inputs are its own.
        """
        stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for call in calls:
                call()
        current.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            held = [call() for call in calls]
        graph.replay()
        seconds = []
        for _ in range(_GRAPH_REPLAYS):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            stop.record()
            stop.synchronize()
            seconds.append(start.elapsed_time(stop) / 1e3 / len(calls))
        del held
        return quartiles(seconds)

    def activity(self, call: Call) -> tuple[int, int]:
        """Launches (kernels, copies, fills) and waits of the host in one call."""
        self.synchronize()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            call()
        return count_activity(event.name for event in profiler.events())

    def why_it_waits(self, call: Call) -> str | None:
        """The first reason that torch finds for the host to wait for a GPU in a call, or None."""
        torch.cuda.set_sync_debug_mode("error")
        try:
            call()
        except RuntimeError as error:
            return str(error).partition("\n")[0]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return None


def command_line(module: str, description: str | None) -> argparse.ArgumentParser:
    """A parser of a module's options, with --device."""
    parser = argparse.ArgumentParser(f"python -m benchmarks.{module}", description=description)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    help_ = "default: a GPU if there is one"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default, help=help_)
    return parser


class HostReads(TorchDispatchMode):
    """Counts what would make the host wait for a GPU, on whatever device.

    Numbers that are read, and shapes; where the device is not the host, copies between them as
    well, unless they are non_blocking and, towards the device, out of pinned memory. What an
    operation does within itself is not seen. On a GPU ours read nothing there; on a CPU they read
    as they please.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self._factories = _Factories(self)

    def __enter__(self) -> HostReads:
        self._factories.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._factories.__exit__(*error)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Count and pass on."""
        kwargs = kwargs or {}
        operation = func.overloadpacket
        if operation in _HOST_READS:
            self.count += 1
        elif operation is torch.ops.aten._to_copy:
            device = torch.device(kwargs.get("device") or args[0].device)
            self.count += _waits(args[0], device, bool(kwargs.get("non_blocking")))
        elif operation is torch.ops.aten.copy_:
            free = bool(args[2] if len(args) > 2 else kwargs.get("non_blocking"))
            # torch pins no given result
            free &= args[0].device.type != "cpu" or args[0].is_pinned()
            self.count += _waits(args[1], args[0].device, free)
        else:
            self.count += _mixes(args)
        return func(*args, **kwargs)


class _Factories(TorchFunctionMode):
    """Counts tensors made of Python's numbers on a device, which pass through unpinned memory."""

    def __init__(self, reads: HostReads) -> None:
        super().__init__()
        self._reads = reads

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        if func in _FROM_NUMBERS and made.device.type != "cpu":
            copied = func is not Tensor.new_tensor and isinstance(args[0], Tensor)
            self._reads.count += not copied  # a copy of a tensor is seen below
        return made


def _waits(source: Tensor, device: torch.device, non_blocking: bool) -> bool:
    """Whether a copy makes the host wait; one within a device does not."""
    if (source.device.type == "cpu") == (device.type == "cpu"):
        return False
    return not (non_blocking and (source.device.type != "cpu" or source.is_pinned()))


def _mixes(arguments: Any) -> bool:
    """Whether an operation on a device takes more than a number from the host, as an index is."""
    tensors = tensors_of(arguments)
    on_host = [x.device.type == "cpu" and x.ndim > 0 for x in tensors]
    return any(on_host) and any(x.device.type != "cpu" for x in tensors)


def count_activity(names: Iterable[str]) -> tuple[int, int]:
    """Launches and waits among the calls of the CUDA runtime and driver.

    The profiler itself ends with a cudaDeviceSynchronize, which is therefore not counted.
    """
    counts = Counter(names)
    launches = sum(n for name, n in counts.items() if name.startswith(_LAUNCHES))
    return launches, sum(counts[name] for name in _WAITS)
