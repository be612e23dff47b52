"""Guided views of sizes at which kernels cut their work differently."""

from __future__ import annotations

import pytest
import torch

import magsd_kernels as mk

from .support import Target, all_dtypes, both_corners, dtype_id, random, uniform
from .test_attention_views import check_views, views_guide

wide_and_narrow = pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=dtype_id)


@wide_and_narrow
@both_corners
@pytest.mark.parametrize("width", [1201, 1096], ids=["odd", "vectors"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_long_rows(target, dtype, align_corners, width, layout):
    """Rows of several tiles, read one element or several at a time."""
    check_views(target, dtype, (3, width), (2, 3), layout, align_corners=align_corners)


@all_dtypes
@both_corners
def test_pixels_of_many_channels(target, dtype, align_corners):
    """Rows too long for shared memory: the same bits as those of planes of one channel."""
    if target.backend != "cuda":
        pytest.skip("stages no rows in shared memory")
    images = random(2, 4700, 3, 5, seed=34, dtype=dtype).to(target.device)
    g = {k: v.to(target.device) for k, v in views_guide(batch=2, low=(3, 2)).items()}
    planes, pixels = (
        target.call(mk.attention_views, x, **g, align_corners=align_corners)
        for x in (images, images.contiguous(memory_format=torch.channels_last))
    )
    assert torch.equal(planes, pixels)


@wide_and_narrow
@both_corners
@pytest.mark.parametrize("low", [(60, 7), (130, 90)], ids=["small", "large"])
def test_maps_larger_than_the_image(target, dtype, align_corners, low):
    """Rows of the image sample rows of the map that do not follow one another."""
    check_views(target, dtype, (25, 16), low, align_corners=align_corners)


@both_corners
def test_wide_crop_of_one_pixel(target, align_corners):
    """A box of one pixel receives the gradient of a whole long row."""
    # Several tiles of every kernel; the interpreter takes a millisecond for each of the outputs.
    width, column = (2001, 1500) if target.interpreted else (9001, 7000)
    grad = random(1, 1, 2, width, seed=1).to(target.device)
    boxes = torch.tensor([[1, column, 2, column + 1]], dtype=torch.int32, device=target.device)
    found = mixup_backward(target, grad, boxes, 0.25, align_corners)
    wanted = 0.75 * grad
    wanted[0, 0, 1, column] += 0.25 * grad.sum()
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-9)


@all_dtypes
@pytest.mark.parametrize(
    "box",
    [(-5, -5, 99, 99), (7, 7, 3, 3), (50, 50, 60, 60), (-9, -9, -3, -3), (2**31 - 1, -(2**31)) * 2],
    ids=["around", "backwards", "behind", "before", "extreme"],
)
def test_boxes_from_outside(target, dtype, box):
    """Called past the contract, a compiled backward raises or stays inside the image."""
    if target.backend == "reference":
        pytest.skip("is not compiled")
    grad = random(1, 2, 9, 8, dtype=dtype).to(target.device)
    boxes = torch.tensor([box], dtype=torch.int32, device=target.device)
    offsets = uniform(1, 2).to(target.device)
    operators = torch.ops.magsd
    for run in (
        lambda: mixup_backward(target, grad, boxes, 0.4, False),
        lambda: operators.attention_patch_backward(grad, boxes, offsets, target.backend),
    ):
        if target.backend == "cpu":
            with pytest.raises(RuntimeError, match="box"):
                run()
        else:
            found = run()
            assert found.shape == grad.shape
            assert found.isfinite().all()


def mixup_backward(
    target: Target, grad: torch.Tensor, boxes: torch.Tensor, weight: float, align_corners: bool
) -> torch.Tensor:
    operator = torch.ops.magsd.attention_mixup_backward
    result: torch.Tensor = operator(grad, boxes, weight, align_corners, target.backend)
    return result
