"""The compiled operators called directly, past the checks of the contract.

Whatever comes in, an operator gives a result of the promised shape or raises; the process survives.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree as pytree

from magsd_kernels import native

from .support import Library, every_library

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
OTHERS = (torch.int32, torch.int64, torch.bool, torch.uint8, torch.complex64)
ROUNDS = 300


def _size(draw: random.Random) -> int:
    return draw.choice((0, 1, 1, 2, 3, 4, 5, 7, 9))


def _spoil(draw: random.Random, tensor: torch.Tensor) -> torch.Tensor:
    """One thing wrong with a tensor: a size, a dimension, the dtype, the device or the strides."""
    if tensor.layout != torch.strided or tensor.is_meta:
        return tensor
    kind = draw.randrange(8)
    if kind == 0 and tensor.dim() > 0:
        shape = list(tensor.shape)
        shape[draw.randrange(len(shape))] = _size(draw)
        return tensor.new_zeros(shape)
    if kind == 1:
        return tensor.unsqueeze(0)
    if kind == 2 and tensor.dim() > 0:
        return tensor.flatten()[: _size(draw)]
    if kind == 3:
        return torch.zeros_like(tensor, dtype=draw.choice((*FLOATS, *OTHERS)))
    if kind == 4:
        return tensor.to("meta")
    if kind == 5 and tensor.dim() > 0:
        return tensor[..., :1].expand(tensor.shape) if tensor.shape[-1] > 0 else tensor
    if kind == 6 and tensor.dim() == 2:
        return tensor.to_sparse()
    if kind == 7 and tensor.dim() > 1:
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    return tensor


def _spoil_any(draw: random.Random, value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return _spoil(draw, value)
    if isinstance(value, list) and value and isinstance(value[0], torch.Tensor):
        entries = list(value)
        kind = draw.randrange(3)
        if kind == 0:
            entries.pop()
        elif kind == 1:
            entries.extend(entries * draw.choice((1, 8)))
        else:
            at = draw.randrange(len(entries))
            entries[at] = _spoil(draw, entries[at])
        return entries
    if isinstance(value, list):
        return value[:-1] if draw.random() < 0.3 else [draw.choice((-3, 0, 1, 5)) for _ in value]
    if isinstance(value, bool):
        return not value
    if isinstance(value, float):
        return draw.choice((-1.0, 0.0, float("nan"), float("inf"), 1e300, -1e-300))
    if isinstance(value, str):
        return draw.choice(("", "avg", "max", "area", "nearest", "bilinear", "x" * 1000))
    return value


def _floats(draw: random.Random, *shape: int, dtype: torch.dtype) -> torch.Tensor:
    values = torch.randn(shape, dtype=torch.float64)
    if draw.random() < 0.1 and values.numel():
        values.flatten()[draw.randrange(values.numel())] = draw.choice((float("nan"), float("inf")))
    values = values.to(dtype)
    if len(shape) == 4 and draw.random() < 0.5:
        values = values.contiguous(memory_format=torch.channels_last)
    return values


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _pool(draw: random.Random, dtype: torch.dtype) -> dict[str, list[Any]]:
    batch, maps, channels = _size(draw), _size(draw), draw.choice((1, 3, 16, 33))
    features = _floats(draw, batch, channels, _size(draw), _size(draw), dtype=dtype)
    attention = _floats(draw, batch, maps, _size(draw), _size(draw), dtype=dtype)
    pool = draw.choice(("avg", "max"))
    normalize = draw.random() < 0.7
    settings = [pool, draw.random() < 0.7, normalize, 2.0, 1e-12, draw.random() < 0.5]
    matrix = _floats(draw, batch, maps * channels, dtype=dtype)
    argmax = torch.full((batch, maps, channels), draw.choice((-7, 0, 3, 2**31 - 1))).int()
    norm = torch.rand(batch, dtype=_wide(dtype))
    if not normalize:
        norm = norm[:0]
    if pool == "avg":
        argmax = argmax.flatten()[:0]
    return {
        "bilinear_attention_pool": [features, attention, *settings],
        "bilinear_attention_pool_backward": [
            matrix, features, attention, matrix.clone(), norm, argmax, *settings,
            [draw.random() < 0.7, draw.random() < 0.7],
        ],
    }  # fmt: skip


def _multiscale(draw: random.Random, dtype: torch.dtype) -> dict[str, list[Any]]:
    batch, maps, scales = _size(draw), _size(draw), draw.choice((1, 2, 3))
    parameters = draw.choice((dtype, torch.float32))
    projections = [
        _floats(draw, batch, maps, _size(draw), _size(draw), dtype=dtype) for _ in range(scales)
    ]
    groups = [[torch.rand(maps, dtype=parameters) for _ in range(scales)] for _ in range(4)]
    size = [_size(draw), _size(draw)]
    grad = _floats(draw, batch, maps, *size, dtype=dtype)
    mode, training = draw.choice(("area", "bilinear", "nearest")), draw.random() < 0.7
    corners = draw.random() < 0.5
    statistics = [torch.rand(scales, maps, dtype=_wide(dtype)) for _ in range(2)]
    sizes = [[x.shape[d] for x in projections] for d in (2, 3)]
    return {
        "resample_attention": [projections, size, mode, corners],
        "resample_attention_backward": [grad, *sizes, mode, corners],
        "multiscale_attention": [projections, *groups, size, training, 0.1, 1e-3, mode, corners],
        "multiscale_attention_backward": [
            grad, projections, *groups[:2], *statistics, training, mode, corners,
        ],
    }  # fmt: skip


def _loss(draw: random.Random, dtype: torch.dtype) -> dict[str, list[Any]]:
    batch, classes = _size(draw), _size(draw)
    logits = _floats(draw, batch, classes, dtype=dtype)
    views = [_floats(draw, batch, classes, dtype=dtype) for _ in range(draw.choice((1, 3)))]
    if draw.random() < 0.5:
        views = [torch.stack(views)]
    targets = torch.randint(-2, 12, (batch,)) * draw.choice((1, 1, 2**40))
    weights = draw.choice((None, torch.rand(classes, dtype=dtype)))
    grads = [draw.choice((None, torch.ones((), dtype=_wide(dtype)))) for _ in range(3)]
    return {
        "soft_distance_loss": [logits, views, targets, weights, 0.7, 0.01],
        "soft_distance_loss_backward": [*grads, logits, views, targets, weights, 0.7, 0.01],
    }


def _sample(draw: random.Random, dtype: torch.dtype) -> dict[str, list[Any]]:
    batch = _size(draw)
    attention = _floats(draw, batch, _size(draw), _size(draw), _size(draw), dtype=dtype)
    return {"sample_attention": [attention, torch.rand(batch, _size(draw)), 1e-12]}


def _guided(draw: random.Random, dtype: torch.dtype) -> dict[str, list[Any]]:
    batch, size = _size(draw), [_size(draw), _size(draw)]
    images = _floats(draw, batch, draw.choice((0, 1, 3)), *size, dtype=dtype)
    maps = draw.choice((1, 3))
    attention = _floats(draw, batch, maps, _size(draw), _size(draw), dtype=dtype)
    index = torch.randint(-1, maps + 1, (batch,)) * draw.choice((1, 1, 2**40))
    index = draw.choice((None, index))
    theta, offsets = torch.rand(batch), torch.rand(batch, 2) * draw.choice((1, 1, 1e30))
    indices = torch.randint(0, maps, (batch, 3))
    thetas = torch.rand(batch, 3)
    boxes = torch.randint(-1, 9, (batch, 4)).int() * draw.choice((1, 1, 2**20))
    both = torch.stack([boxes, boxes.flip(1)])
    grads = _floats(draw, 3 * batch, *images.shape[1:], dtype=dtype).view(3, *images.shape)
    guide, corners = [attention, index, theta], draw.random() < 0.5
    guides = [attention, indices, thetas, offsets]
    some = draw.choice((2, 3))
    sampled = [attention, torch.rand(batch, some), thetas[:, :some]]
    sampled_offsets = offsets if some == 3 else None
    return {
        "attention_boxes": [*guide, size, 0.1, corners],
        "attention_mixup": [images, *guide, 0.1, 0.4, corners],
        "attention_mixup_backward": [images, boxes, 0.4, corners],
        "attention_patch": [images, *guide, offsets, 0.1, corners],
        "attention_patch_backward": [images, boxes, offsets],
        "attention_dim": [images, *guide, 0.001, corners],
        "attention_views": [images, *guides, 0.1, 0.4, 0.001, corners],
        "sampled_views": [
            images, *sampled, sampled_offsets, 1e-12, 0.1, 0.4, 0.001, corners,
        ],
        "attention_views_backward": [
            grads[:some], attention, indices[:, :some], *sampled[2:], sampled_offsets,
            both[: some - 1], 0.4, 0.001, corners,
        ],
    }  # fmt: skip


BUILDERS: dict[str, Callable[[random.Random, torch.dtype], dict[str, list[Any]]]] = {
    "bilinear_pool": _pool,
    "multiscale_attention": _multiscale,
    "soft_distance": _loss,
    "attention_sampling": _sample,
    "attention_augment": _guided,
}


#: In messages of what no argument may cause: a kernel that reads outside, hangs or cannot start.
FAULTS = ("CUDA error", "emulated kernel", "INTERNAL ASSERT")


def fuzz(operation: str, library: Library, seed: int) -> tuple[int, int]:
    """Call every operator of one file with good and bad arguments; how many returned and raised."""
    torch.manual_seed(seed)
    draw = random.Random(seed)
    returned = raised = 0
    for _ in range(ROUNDS):
        calls = BUILDERS[operation](draw, draw.choice(FLOATS))
        calls = pytree.tree_map_only(torch.Tensor, lambda x: x.to(library.device), calls)
        for name, arguments in calls.items():
            for _ in range(draw.choice((0, 1, 1, 2))):
                at = draw.randrange(len(arguments))
                arguments[at] = _spoil_any(draw, arguments[at])
            try:
                getattr(native.operations(library.backend), name)(*arguments)
                if library.device == "cuda":
                    torch.cuda.synchronize()
                returned += 1
            except (RuntimeError, NotImplementedError, ValueError, TypeError, IndexError) as error:
                if any(fault in str(error) for fault in FAULTS):
                    raise
                raised += 1
    return returned, raised


def follow_an_argmax_from_outside(library: Library) -> bool:
    """Whether a backward that is given one keeps its shapes and gives numbers."""
    on: Any = {"device": library.device}
    features, attention = torch.ones(1, 2, 2, 2, **on), torch.ones(1, 3, 2, 2, **on)
    grad = torch.ones(1, 6, **on)
    argmax = torch.full((1, 3, 2), 2**31 - 1, dtype=torch.int32, **on)
    settings = ["max", False, False, 1.0, 0.0, False, [True, True]]
    grads = native.operations(library.backend).bilinear_attention_pool_backward(
        grad, features, attention, grad, grad.new_empty(0), argmax, *settings
    )
    assert [g.shape for g in grads] == [features.shape, attention.shape]
    return all(bool(g.isfinite().all()) for g in grads)


@every_library
def test_direct_calls_with_bad_arguments_leave_the_process_alive(library):
    """In a process of its own, so that a crash is a failure of this test and of no other."""
    code = """
from tests.kernels import test_native_fuzz as t
for operation in t.BUILDERS:
    print(operation, *t.fuzz(operation, library, seed=0), flush=True)
print(t.follow_an_argmax_from_outside(library))
"""
    *lines, followed = library.run(code, OMP_NUM_THREADS="2").splitlines()
    assert followed == "True"
    assert [line.split()[0] for line in lines] == list(BUILDERS)
    for line in lines:
        operation, returned, raised = line.split()
        assert min(int(returned), int(raised)) > ROUNDS // 10, operation


@every_library
def test_the_library_holds_every_operator(library):
    """The operators that the builders call are registered by the library, and by no other."""
    draw = random.Random(1)
    names = [name for build in BUILDERS.values() for name in build(draw, torch.float32)]
    code = f"""
import torch
from magsd_kernels import native
held = torch._C._dispatch_has_kernel_for_dispatch_key
for loaded in (False, True):
    if loaded:
        native.operations(library.backend)
    for name in {names}:
        print(held(f"magsd_{{library.backend}}::{{name}}", library.device.upper()))
"""
    assert library.run(code).split() == ["False"] * len(names) + ["True"] * len(names)


def test_no_operator_is_left_out():
    draw = random.Random(1)
    fuzzed = {name for build in BUILDERS.values() for name in build(draw, torch.float32)}
    known = [x.split("::") for x in torch._C._dispatch_get_all_op_names()]
    for backend in ("cpu", "cuda"):
        assert fuzzed == {name for space, name in known if space == f"magsd_{backend}"}
