"""How the Triton kernels divide the pixels of all scales among programs."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from magsd_kernels.triton._scales import partition

SIDES = (28, 14, 7)


@pytest.mark.parametrize("batch", [1, 16, 256])
@pytest.mark.parametrize("loads", [(1, 1, 1), (2, 5, 17)], ids=str)
@pytest.mark.parametrize("pixels", [32, 64, 128])
def test_no_program_loads_much_more_than_another(batch, loads, pixels):
    maps = [torch.empty(batch, 32, side, side, device="meta") for side in SIDES]
    parts = partition(maps, pixels, loads)
    tiles = [length // pixels for length in parts.lengths]
    for side, count, length in zip(SIDES, parts.counts, parts.lengths, strict=True):
        assert length % pixels == 0
        assert (count - 1) * length < batch * side * side <= count * length
    # A part is a tile at least, however many loads that is.
    work = [n * one for n, one in zip(tiles, loads, strict=True) if n > 1]
    assert max(work, default=0) <= 2 * min(work, default=0)
    if batch == 256:
        assert 400 <= sum(parts.counts) <= 600
