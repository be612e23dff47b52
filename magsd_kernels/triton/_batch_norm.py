"""How batch norm cuts its tensors, and its statistics: what the kernels of both directions share.

A tensor is seen as items of channels of pixels: the images of a contiguous one; every pixel of a
channels_last one, whose channels have one pixel each. A program takes some channels of a part of a
group's items. A tile is some items by LANES elements that lie side by side in each. A lane stays in
its channel, so that a program fetches the parameters once and every access is wide, however few
pixels a channel has. A channel of many pixels has a program of its own, and takes several steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from magsd_kernels._layout import is_channels_last
from magsd_kernels.triton._common import accumulation, block, offset_type, tile
from magsd_kernels.triton._resampling import entry

_PROGRAMS = 512  # about as many: several for each multiprocessor, whatever GPU it is
_COMBINED = 8192  # most parts times channels that a program combines at once
_TILE = 4096  # elements in flight
_RUN = 2048  # elements side by side that a tile takes of an item


@dataclass(frozen=True)
class Plan:
    """How a call is cut.

    Attributes:
        arguments: sizes and settings by their names in a kernel. `sizes` are the items of a group,
            its parts, the items of a part, the steps of an item and the blocks of channels. `units`
            and `UNITS` multiply to the elements of an item, its channels and the pixels of each;
            so the compiler knows what divides them, and compiles few kernels.
        programs: of a pass.
        blocks: of channels.
        parts: of a group.
        rows: of a tile.
    """

    arguments: dict[str, object]
    programs: int
    blocks: int
    parts: int
    rows: int


def plan(x: torch.Tensor, groups: int) -> Plan:
    """The cut of a dense (groups * B, C, H, W) tensor, and of others of its strides."""
    batch, channels, height, width = x.shape
    items, pixels = batch // groups, height * width
    if is_channels_last(x):
        items, pixels = items * pixels, 1
    share = 4 if x.dtype == torch.float64 else 1  # It takes twice the registers, and is rare.
    planes, lanes = _lanes(channels, pixels, _RUN // share)
    rows = block(items, max(tile(_TILE // share) // lanes, 1))
    blocks = triton.cdiv(channels, planes)
    tiles = triton.cdiv(items, rows)
    most = max(min(_PROGRAMS // (blocks * groups), _COMBINED // share // planes, tiles), 1)
    length = triton.cdiv(tiles, most) * rows
    parts = triton.cdiv(items, max(length, 1))
    steps = triton.cdiv(planes * pixels, lanes)
    counts = (channels * pixels, channels, pixels)
    units = tuple(math.gcd(count, 16) for count in counts)
    arguments = {
        "sizes": (items, parts, length, steps, blocks), "UNITS": units,
        "units": tuple(count // unit for count, unit in zip(counts, units, strict=True)),
        "ROWS": rows, "PLANES": planes, "SPAN": lanes // planes,
        "PARTS": block(parts, _COMBINED), "INDEX": offset_type(x), "ACC": accumulation(x.dtype),
    }  # fmt: skip
    return Plan(arguments, blocks * parts * groups, blocks, parts, rows)


def _lanes(channels: int, pixels: int, run: int) -> tuple[int, int]:
    """Channels of a program, and elements side by side, both powers of two."""
    if pixels == 1:
        planes = block(channels, 64 if channels >= 512 else 32)
        return planes, planes
    # Together they begin at a multiple of 16 elements.
    planes = 16 // math.gcd(pixels, 16)
    if planes * pixels > 2 * run:
        planes = 1
    while 2 * planes * pixels <= run and planes < channels:
        planes *= 2
    lanes: int = triton.next_power_of_2(planes * pixels)
    return planes, min(lanes, run) if planes == 1 else lanes


@triton.jit
def count_of(i: tl.constexpr, units, UNITS: tl.constexpr):
    """The i-th of the elements of an item, its channels and the pixels of each."""
    UNIT: tl.constexpr = entry(UNITS, i)
    return units[i] * UNIT


@triton.jit
def program_of(program, sizes):
    """A program's block of channels, part and group, and the items that it begins and ends at."""
    block = program % sizes[4]
    part = program // sizes[4] % sizes[1]
    group = program // (sizes[4] * sizes[1])
    begin = group * sizes[0] + part * sizes[2]
    end = group * sizes[0] + tl.minimum(sizes[0], (part + 1) * sizes[2])
    return block, part, group, begin, end


@triton.jit
def tiles_of(begin, end, sizes, ROWS: tl.constexpr):
    """How many tiles a program passes over."""
    return tl.cdiv(end - begin, ROWS) * sizes[3]


@triton.jit
def tile_at(
    i, block, begin, end, sizes, units, UNITS: tl.constexpr, ROWS: tl.constexpr,
    PLANES: tl.constexpr, SPAN: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Offsets of the i-th tile's elements, and which of them are there."""
    whole = tl.cast(units[0], INDEX) * entry(UNITS, 0)
    run = count_of(2, units, UNITS) * PLANES
    item = begin + i // sizes[3] * ROWS + tl.arange(0, ROWS)[:, None]
    lane = i % sizes[3] * (PLANES * SPAN) + tl.arange(0, PLANES * SPAN)[None, :]
    place = tl.cast(block, INDEX) * run + lane
    inside = (item < end) & (lane < run) & (place < whole)
    return item.to(INDEX) * whole + place, inside


@triton.jit
def channels_of(block, units, UNITS: tl.constexpr, PLANES: tl.constexpr):
    """A program's channels, and which of them are there."""
    channel = block * PLANES + tl.arange(0, PLANES)
    return channel, channel < count_of(1, units, UNITS)


@triton.jit
def to_lanes(values, units, UNITS: tl.constexpr, PLANES: tl.constexpr, SPAN: tl.constexpr):
    """(PLANES) values of channels -> (1, LANES), or (1, 1) where the lanes share a channel."""
    if PLANES > 1 and SPAN > 1:
        plane = tl.arange(0, PLANES * SPAN) // count_of(2, units, UNITS)
        values = tl.gather(values, tl.minimum(plane, PLANES - 1), 0)
    return values[None, :]


@triton.jit
def by_channel(values, units, UNITS: tl.constexpr, PLANES: tl.constexpr, SPAN: tl.constexpr):
    """(LANES) values -> (PLANES, SPAN), 0 where a channel has fewer pixels."""
    if PLANES > 1 and SPAN > 1:
        pixels = count_of(2, units, UNITS)
        lane = tl.arange(0, PLANES * SPAN)
        pixel = lane % SPAN
        at = lane // SPAN * pixels + tl.minimum(pixel, pixels - 1)
        values = tl.where(pixel < pixels, tl.gather(values, at, 0), 0.0)
    return tl.reshape(values, [PLANES, SPAN])


@triton.jit
def combined(base, rest, squares, size, AXIS: tl.constexpr):
    """Mean, squared deviations and size along an axis of parts that have them (Chan et al. 1983).

    A mean is base + rest, which are added up last, so that a far mean costs no digits of the
    distances of the parts.
    """
    total = tl.sum(size, AXIS)
    middle = tl.sum(base * size, AXIS) / tl.maximum(total, 1.0)
    apart = tl.where(size > 0, base - tl.expand_dims(middle, AXIS) + rest, 0.0)
    mean = tl.sum(apart * size, AXIS) / tl.maximum(total, 1.0)
    apart -= tl.expand_dims(mean, AXIS)
    return middle, mean, tl.sum(squares + apart * apart * size, AXIS), total


@triton.jit
def load_parts(
    parts, group, block, sizes, units, UNITS: tl.constexpr, PLANES: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """Both (PARTS, PLANES) values that a group's programs have stored, and which are there."""
    channel, present = channels_of(block, units, UNITS, PLANES)
    channels = count_of(1, units, UNITS)
    part = tl.arange(0, PARTS)[:, None]
    at = parts + ((group * sizes[1] + part) * (2 * channels) + channel[None, :])
    present = (part < sizes[1]) & present[None, :]
    first = tl.load(at, mask=present, other=0.0)
    return first, tl.load(at + channels, mask=present, other=0.0), present


@triton.jit
def store_part(
    first, second, parts, program, sizes, units, UNITS: tl.constexpr, PLANES: tl.constexpr
):
    """Two (PLANES) values of a program -> parts (groups, parts, 2, C)."""
    block, part, group, _, _ = program_of(program, sizes)
    channel, present = channels_of(block, units, UNITS, PLANES)
    channels = count_of(1, units, UNITS)
    to = parts + ((group * sizes[1] + part) * (2 * channels) + channel)
    tl.store(to, first, mask=present)
    tl.store(to + channels, second, mask=present)


@triton.jit
def normalization(
    mean, rstd, weight, bias, steps, block, units, UNITS: tl.constexpr, PLANES: tl.constexpr
):
    """(PLANES) factor and bias of x - mean."""
    channel, present = channels_of(block, units, UNITS, PLANES)
    gain = tl.load(weight + channel * steps[0], mask=present, other=0.0).to(mean.dtype)
    offset = tl.load(bias + channel * steps[1], mask=present, other=0.0).to(mean.dtype)
    return gain * rstd, offset


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))
