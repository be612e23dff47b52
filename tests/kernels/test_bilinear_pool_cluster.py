"""bilinear_attention_pool in half precision on GPUs with clusters, and what older ones do."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import pytest
import torch

import magsd_kernels as mk
from magsd_kernels import native

from .support import (
    Target,
    assert_agrees,
    attention_maps,
    available_targets,
    blocks,
    dtype_id,
    identical,
    launches,
    make_strided,
    poisoned_memory,
    random,
)
from .test_bilinear_pool import check_in_place

half_dtypes = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=dtype_id)
both_layouts = pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
only_with_clusters = pytest.mark.parametrize("capability", [90], ids=["clusters"], indirect=True)


@pytest.fixture(
    scope="module", params=[t for t in available_targets() if t.backend == "cuda"], ids=str
)
def target(request: pytest.FixtureRequest) -> Target:
    return request.param


@pytest.fixture(params=[90, 80], ids=["clusters", "none"])
def capability(request: pytest.FixtureRequest, target: Target) -> Iterator[int]:
    """The compute capability of the GPU, emulated or not, is at least 9.0, or less."""
    if target.device == "cuda":
        if (torch.cuda.get_device_capability() >= (9, 0)) != (request.param >= 90):
            pytest.skip("another GPU")
        yield request.param
        return
    emulate = ctypes.CDLL(str(native.library("cuda"))).magsd_emulate_capability
    emulate(request.param)
    yield request.param
    emulate(90)


def inputs_of(target, dtype, layout, features, maps):
    """Rectified features: else entries cancel to nearly 0, and their root enlarges any rounding."""
    f = random(*features, seed=1).abs() + 0.1
    a = attention_maps(features[0], maps, *features[2:], seed=2, dtype=torch.float64)
    return [make_strided(x.to(target.device, dtype), layout) for x in (f, a)]


@half_dtypes
@both_layouts
@pytest.mark.parametrize(
    ("features", "maps"),
    [
        ((2, 8, 3, 3), 3),  # channels for one block
        ((1, 40, 1, 1), 32),
        ((3, 64, 7, 7), 32),
        ((1, 88, 14, 14), 17),
        ((2, 104, 4, 4), 5),
        ((1, 328, 5, 13), 32),  # halves of unequal length
        ((1, 1064, 2, 3), 2),
        ((1, 2048, 2, 2), 32),
    ],
    ids=str,
)
def test_sizes(target, capability, dtype, layout, features, maps):
    check_in_place(target, inputs_of(target, dtype, layout, features, maps))


#: Sizes of features, maps, and blocks of an image, forward and backward; None: no cluster.
CLUSTERS = [
    ((1, 2048, 7, 7), 32, 4, 4),
    ((1, 2048, 14, 14), 32, 4, 8),
    ((1, 136, 28, 28), 5, 4, 8),  # 17 octets, 3 a block: the last two blocks have none
    ((1, 136, 39, 40), 5, 8, None),
    ((1, 2048, 15, 14), 32, 8, 8),
    ((1, 2056, 2, 2), 3, 8, 8),  # more channels than four blocks have registers for
    ((1, 4096, 1, 2), 32, 8, 8),
    ((1, 4104, 1, 2), 32, None, None),
]


@half_dtypes
@both_layouts
@only_with_clusters
@pytest.mark.parametrize(
    ("features", "maps"), [row[:2] for row in CLUSTERS if 8 in row[2:]], ids=str
)
def test_eight_blocks(target, capability, dtype, layout, features, maps):
    check_in_place(target, inputs_of(target, dtype, layout, features, maps))


@both_layouts
@only_with_clusters
@pytest.mark.parametrize(("features", "maps", "forward", "backward"), CLUSTERS, ids=str)
def test_blocks_of_an_image(target, capability, layout, features, maps, forward, backward):
    """The smallest cluster whose shared memory and registers take the image, each way."""
    inputs = inputs_of(target, torch.float16, layout, features, maps)
    inputs = [x.requires_grad_() for x in inputs]
    found = []

    def pool():
        found.append(target.call(mk.bilinear_attention_pool, *inputs))

    def backpropagate():
        torch.autograd.grad(found[-1].sum(), inputs)

    for call, wanted in ((pool, forward), (backpropagate, backward)):
        if wanted is not None:
            assert blocks(target, call) == wanted
        else:
            assert launches(target, call) > 1


@half_dtypes
@both_layouts
@pytest.mark.parametrize("signed_sqrt", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
def test_options(target, capability, dtype, layout, signed_sqrt, normalize):
    inputs = inputs_of(target, dtype, layout, (2, 40, 5, 5), 5)
    check_in_place(
        target, inputs, signed_sqrt=signed_sqrt, normalize=normalize, scale=3.0, eps=1e-3
    )


@both_layouts
def test_signs(target, capability, layout):
    """Negative features, and channels and maps that are 0."""
    f, a = inputs_of(target, torch.float16, layout, (2, 48, 5, 5), 6)
    f[:, ::3] *= -1
    f[:, 7], a[:, 2] = 0, 0
    check_in_place(target, [f, a])


@half_dtypes
@both_layouts
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("channels", [72, 2056], ids=["four blocks", "eight blocks"])
def test_what_is_not_finite_stays_in_its_channel(
    target, capability, dtype, layout, normalize, value, channels
):
    """Beside a channel's pixels lie others', and fewer maps exist than are multiplied."""
    f, a = inputs_of(target, dtype, layout, (2, channels, 5, 5), 3)
    a += 0.1
    f[0, 3, 4, 4], f[0, 64, 0, 0] = value, value
    out = target.call(mk.bilinear_attention_pool, f, a, normalize=normalize)
    wanted = mk.bilinear_attention_pool(
        f.cpu().double(), a.cpu().double(), normalize=normalize, backend="reference"
    )
    assert_agrees(out, wanted)
    if not normalize:
        assert int(out.isfinite().sum()) == 3 * channels + 3 * (channels - 2)


def results_of(target, inputs):
    leaves = [x.requires_grad_() for x in inputs]
    out = target.call(mk.bilinear_attention_pool, *leaves)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]


@half_dtypes
@both_layouts
@pytest.mark.parametrize(
    "features", [(2, 72, 7, 7), (2, 2056, 3, 3)], ids=["four blocks", "eight blocks"]
)
def test_does_not_read_uninitialized_memory(target, capability, dtype, layout, features):
    inputs = inputs_of(target, dtype, layout, features, 5)
    clean = results_of(target, inputs)
    with poisoned_memory():
        poisoned = results_of(target, inputs)
    assert all(identical(a, b) for a, b in zip(poisoned, clean, strict=True))


@half_dtypes
@both_layouts
@pytest.mark.parametrize(
    "features", [(5, 136, 7, 7), (3, 2056, 3, 3)], ids=["four blocks", "eight blocks"]
)
def test_results_are_deterministic(target, capability, dtype, layout, features):
    inputs = inputs_of(target, dtype, layout, features, 7)
    first = results_of(target, inputs)
    for _ in range(3):
        again = results_of(target, inputs)
        assert all(identical(a, b) for a, b in zip(again, first, strict=True))


def forward_launches(target, dtype, features, maps, size=None, channels_last=False, offset=0):
    layout = "channels_last" if channels_last else "contiguous"
    f, a = inputs_of(target, dtype, layout, features, maps)
    if size is not None:
        a = attention_maps(features[0], maps, *size).to(target.device, dtype)
    if offset:
        parent = torch.empty(f.numel() + offset, dtype=dtype, device=target.device)
        f = parent[offset:].view(f.shape).copy_(f)
    return launches(target, lambda: target.call(mk.bilinear_attention_pool, f, a))


@half_dtypes
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize(
    ("features", "maps"),
    [((1, 2048, 7, 7), 32), ((1, 1024, 14, 14), 32), ((1, 2048, 14, 14), 32)],
    ids=str,
)
def test_one_launch(target, capability, dtype, channels_last, features, maps):
    """One image does not fill a GPU: without clusters the two passes are two launches."""
    found = forward_launches(target, dtype, features, maps, channels_last=channels_last)
    assert found == (1 if capability >= 90 else 2)


@half_dtypes
@both_layouts
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("features", [(2, 2048, 7, 7), (1, 2048, 14, 14)], ids=str)
def test_launches_of_the_backward(target, capability, dtype, layout, normalize, features):
    inputs = [x.requires_grad_() for x in inputs_of(target, dtype, layout, features, 32)]
    out = target.call(mk.bilinear_attention_pool, *inputs, normalize=normalize)
    direction = random(*out.shape, seed=3, dtype=dtype).to(target.device)

    def backward():
        return torch.autograd.grad(out, inputs, direction, retain_graph=True)

    assert launches(target, backward) == (1 if capability >= 90 else 2 + normalize)


@half_dtypes
@both_layouts
def test_gradient_of_one_input_alone(target, capability, dtype, layout):
    inputs = [x.requires_grad_() for x in inputs_of(target, dtype, layout, (2, 88, 7, 7), 5)]
    out = target.call(mk.bilinear_attention_pool, *inputs)
    direction = random(*out.shape, seed=3, dtype=dtype).to(target.device)
    both = torch.autograd.grad(out, inputs, direction)
    for i in range(2):
        leaves = [x.detach().requires_grad_(i == j) for j, x in enumerate(inputs)]
        out = target.call(mk.bilinear_attention_pool, *leaves)
        (alone,) = torch.autograd.grad(out, leaves[i], direction)
        assert identical(alone, both[i])


@half_dtypes
@both_layouts
@pytest.mark.parametrize("size", [2.0**-10, 1.0, 2.0**10])
def test_gradients_of_any_size(target, capability, dtype, layout, size):
    """The gradient of the pooled matrix may leave the range of float16; those of the inputs do not.

    Of small features the root is steep: what the norm leaves is large against them.
    """
    f, a = inputs_of(target, dtype, layout, (2, 48, 5, 5), 6)
    f *= size
    f[:, 1] *= 2.0**-6
    check_in_place(target, [f, a], scale=0.01 * size)
    check_in_place(target, [f, a], scale=0.01, normalize=False)


@pytest.mark.parametrize(
    "arguments",
    [
        {"dtype": torch.float32},
        {"features": (1, 68, 5, 5)},
        {"features": (1, 4104, 2, 2)},
        {"features": (1, 512, 40, 40)},
        {"maps": 33},
        {"size": (3, 4)},
        {"offset": 1},
    ],
    ids=str,
)
def test_what_clusters_do_not_take(target, capability, arguments):
    options = {"dtype": torch.bfloat16, "features": (1, 64, 5, 5), "maps": 5}
    assert forward_launches(target, **(options | arguments)) == 2
