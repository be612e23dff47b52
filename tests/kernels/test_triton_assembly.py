"""Every Triton kernel, compiled ahead of time at the sizes that the package is measured at.

Nothing spills, dense layouts are read and written 16 bytes at a time, products run on tensor cores
where their precision allows it. No GPU is needed.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("Triton interprets its kernels here", allow_module_level=True)

import triton.language as tl  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

import magsd_kernels.triton  # noqa: E402
from magsd_kernels.backends import OLDEST_OF_TRITON  # noqa: E402
from magsd_kernels.cases import Size  # noqa: E402
from magsd_kernels.triton._common import Tunable, tunable, with_warps  # noqa: E402

from .assembly import SHARED, TARGETS, Kernel, compiled, launch, name_of  # noqa: E402
from .support import fresh_python  # noqa: E402

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LAYOUTS = ("contiguous", "channels_last")


def pooled(batch: int, channels: int, side: int, low: int = 7) -> Size:
    sizes = {"channels": channels, "features": (side, side), "low": (low, low)}
    return Size(batch, maps=32, **sizes)


def scaled(batch: int, side: int = 7) -> Size:
    scales = tuple((n, n) for n in (28, 14, 7))
    return Size(batch, maps=32, scales=scales, output=(side, side))


def viewed(batch: int, planes: int, side: int, low: int) -> Size:
    return Size(batch, maps=32, planes=planes, image=(side, side), low=(low, low))


def normed(channels: int, side: int) -> Size:
    return Size(64, channels=channels, features=(side, side))


#: Names of the package's cases, a size, and options in place of the cases' own.
CASES: dict[str, tuple[tuple[str, ...], Size, dict[str, Any]]] = {
    "pool 7x7": (("pool_same_size",), pooled(256, 2048, 7), {"scale": 100.0}),
    "pool 14x14": (("pool_same_size",), pooled(64, 2048, 14), {"scale": 100.0}),
    "pool 28x28": (("pool_same_size",), pooled(64, 512, 28), {"scale": 100.0}),
    "pool resized": (("pool_avg",), pooled(64, 2048, 14), {"scale": 100.0}),
    "pool max": (("pool_same_size",), pooled(64, 2048, 7), {"pool": "max", "scale": 100.0}),
    "multiscale": (("multiscale_train",), scaled(256), {}),
    "multiscale evaluation": (("multiscale_eval",), scaled(64), {}),
    "multiscale 14x14 bilinear": (("multiscale_train",), scaled(64, 14), {"mode": "bilinear"}),
    "resample": (("resample_area",), scaled(64), {}),
    "views": (("views",), viewed(64, 1, 224, 7), {}),
    "sampled boxes": (("sampled_views",), viewed(64, 1, 224, 7), {}),
    "single views": (("boxes", "crop", "patch", "drop"), viewed(16, 3, 448, 14), {}),
    "sampling": (("sample",), viewed(64, 1, 224, 7), {}),
    "distance": (("loss",), Size(64), {}),
    "distance of many rows": (("loss",), Size(4096), {}),
    "norm 112x112": (("norm_train", "norm_residual_relu"), normed(64, 112), {}),
    "norm 56x56": (("norm_train", "norm_residual_relu"), normed(256, 56), {}),
    "norm 7x7": (("norm_train", "norm_residual_relu"), normed(2048, 7), {}),
    "norm of few channels": (("norm_train", "norm_eval"), normed(24, 56), {"act": "silu"}),
}
NORMS = [case for case in CASES if case.startswith("norm ")]
PRODUCTS = ("pool 7x7", "pool 14x14", "pool 28x28", "pool resized")
#: Each distinct kernel for each GPU; every dtype and layout for one GPU of either maker.
SPANNING = [
    (torch.bfloat16, "channels_last"),
    (torch.float64, "contiguous"),
    (torch.float32, "contiguous"),
]
#: Where every configuration is compiled for each GPU.
EVERY = SPANNING[:2]
MATRIX = [
    (gpu, case, dtype, layout)
    for gpu in TARGETS
    for case in CASES
    for dtype in DTYPES
    for layout in LAYOUTS
    if gpu in ("sm_90", "gfx942") or (dtype, layout) in SPANNING
]


@functools.cache
def kernels_of(gpu: str, case: str, dtype: torch.dtype, layout: str) -> list[Kernel]:
    every = (dtype, layout) in (SPANNING if gpu == "sm_90" else EVERY)
    return compiled(gpu, lambda: launched(case, dtype, layout), every_config=every)


def launched(case: str, dtype: torch.dtype, layout: str, tf32: bool = False) -> None:
    """Launch the forward and backward kernels of a case."""
    names, size, options = CASES[case]
    for name in names:
        launch(name, size, dtype, layout, options, allow_tf32=tf32)


def empty(size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(size, dtype=dtype, device="meta")


def named(gpu, case, dtype, layout):
    names = f"{gpu}-{case}-{str(dtype)[6:]}-{layout}".replace(" ", "_")
    rest = gpu not in ("sm_90", "gfx942") or (dtype, layout) not in SPANNING
    return pytest.param(
        gpu, case, dtype, layout, id=names, marks=[pytest.mark.slow] if rest else []
    )


in_every_way = pytest.mark.parametrize(
    ("gpu", "case", "dtype", "layout"), [named(*entry) for entry in MATRIX]
)


def spilled(kernel: Kernel) -> int:
    """Registers and bytes of a thread that lie in memory, and scalar ones in a vector register."""
    found = kernel.resources()
    names = ("vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size")
    return sum(found.get(name, 0) for name in (*names, "STACK", "LOCAL"))


@in_every_way
def test_nothing_spills_and_shared_memory_suffices(gpu, case, dtype, layout):
    for kernel in kernels_of(gpu, case, dtype, layout):
        assert spilled(kernel) == 0, (kernel.name, kernel.resources())
        assert kernel.shared <= SHARED[gpu], kernel.name


@pytest.mark.parametrize("gpu", TARGETS)
@pytest.mark.parametrize(
    "case", [*PRODUCTS, *NORMS, "multiscale", "multiscale evaluation", "resample"]
)
def test_dense_channels_move_sixteen_bytes_at_a_time(gpu, case):
    """All kernels that pass over features or maps, which excludes the sums of small shares."""
    for kernel in kernels_of(gpu, case, torch.bfloat16, "channels_last"):
        if not kernel.name.endswith("_attention_gradient_kernel"):
            assert kernel.vector > 0, kernel.name
            if case != "pool resized":  # Its maps are gathered.
                assert kernel.half_words == 0, kernel.name


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, "0x10"), (torch.bfloat16, "0x8")])
def test_planes_of_a_multiple_of_four_pixels_are_copied_in_vectors(dtype, size):
    """Rows of 196 elements begin at a multiple of 16 bytes in float32, of 8 in bfloat16."""
    for kernel in compiled("sm_90", lambda: launched("pool 14x14", dtype, "contiguous")):
        if kernel.name.endswith(("_forward_kernel", "_along_kernel")):
            assert kernel.count(rf"cp\.async\.\w+\.shared\.global.*, {size},", "") > 0
            assert kernel.count(r"cp\.async\.\w+\.shared\.global.*, 0x4,", "") == 0
            assert kernel.half_words == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", NORMS)
def test_planes_of_any_size_are_normalized_sixteen_bytes_at_a_time(case, dtype):
    """Planes of 49 elements begin anywhere; those of several channels are taken together."""
    for kernel in kernels_of("sm_90", case, dtype, "contiguous"):
        assert kernel.vector > 0, kernel.name
        assert kernel.half_words == 0, kernel.name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", ["views", "single views"])
def test_views_are_written_sixteen_bytes_at_a_time(case, dtype, layout):
    kernels = kernels_of("sm_90", case, dtype, layout)
    found = [k for k in kernels if k.name.endswith("_views_kernel")]
    assert found
    assert all(k.vector > 0 for k in found)


@pytest.mark.parametrize("gpu", TARGETS)
@pytest.mark.parametrize("case", PRODUCTS)
def test_half_precision_products_run_on_tensor_cores(gpu, case):
    found = kernels_of(gpu, case, torch.bfloat16, "channels_last")
    products = [k for k in found if not k.name.endswith("_attention_gradient_kernel")]
    assert len(products) >= 4
    assert all(k.matrix > 0 for k in products)


@pytest.mark.parametrize("gpu", [gpu for gpu in TARGETS if gpu.startswith("sm")])
@pytest.mark.parametrize("case", ["pool 7x7", "pool 14x14"])
def test_float32_products_are_rounded_to_tf32_where_that_is_allowed_only(gpu, case):
    exact = kernels_of(gpu, case, torch.float32, "contiguous")
    assert all(k.matrix == 0 for k in exact)
    assert sum(k.count(r"fma\.rn", "") > 0 for k in exact) >= 4
    allowed = compiled(gpu, lambda: launched(case, torch.float32, "channels_last", tf32=True))
    for kernel in allowed:
        assert spilled(kernel) == 0, (kernel.name, kernel.resources())
    assert sum(k.matrix > 0 and "tf32" in k.code for k in allowed) == 4


def test_the_oldest_gpu_that_runs_triton_is_compiled_for():
    assert f"sm_{''.join(map(str, OLDEST_OF_TRITON))}" in TARGETS


def all_kernels() -> set[str]:
    """Every function of the package's Triton modules that is launched."""
    names = set()
    for module in pkgutil.iter_modules(magsd_kernels.triton.__path__):
        inside = importlib.import_module(f"magsd_kernels.triton.{module.name}")
        for name, value in vars(inside).items():
            kernel = value.kernel if isinstance(value, Tunable) else value
            if name.endswith("_kernel") and isinstance(kernel, JITFunction):
                names.add(name_of(kernel))
    return names


def test_no_kernel_is_left_out():
    seen = {
        kernel.name
        for case in CASES
        for dtype, layout in SPANNING
        for kernel in kernels_of("sm_90", case, dtype, layout)
    }
    assert len(all_kernels()) >= 14
    assert seen == all_kernels()


@triton.jit
def _spilling_kernel(given, to, SIZE: tl.constexpr):
    x = tl.load(given + tl.arange(0, SIZE))
    tl.debug_barrier()
    tl.store(to + tl.arange(0, SIZE), x + tl.sum(tl.exp(x), 0))


@triton.jit
def _scalar_kernel(given, to, SIZE: tl.constexpr):
    tl.store(to + tl.arange(0, SIZE) * 3, tl.load(given + tl.arange(0, SIZE) * 3))


@triton.jit
def _dense_kernel(given, to, SIZE: tl.constexpr):
    tl.store(to + tl.arange(0, SIZE), tl.load(given + tl.arange(0, SIZE)))


@pytest.mark.parametrize("gpu", TARGETS)
def test_what_is_looked_for_is_found(gpu):
    def one(kernel, dtype, size, warps=1):
        given = empty(size, dtype=dtype)
        call = functools.partial(kernel[(1,)], given, given, SIZE=size, num_warps=warps)
        return compiled(gpu, call)[0]

    # As many numbers a thread as it can have registers, or twice that.
    assert spilled(one(_spilling_kernel, torch.float32, 64 * 8 * 256, warps=8)) > 0
    scalar, dense = (one(k, torch.bfloat16, 1024) for k in (_scalar_kernel, _dense_kernel))
    assert (scalar.vector, dense.half_words, dense.matrix) == (0, 0, 0)
    assert scalar.half_words > 0
    assert dense.vector > 0
    assert spilled(scalar) == spilled(dense) == 0


def test_tuning_is_asked_for():
    configs = with_warps(4, 8)
    plain, tuned = (tunable(configs, ["SIZE"], choice)(_dense_kernel) for choice in (False, True))
    assert plain.configs == tuned.configs == configs
    assert isinstance(tuned, triton.runtime.Autotuner)
    default = compiled("sm_90", lambda: plain[(1,)](empty(64), empty(64), SIZE=64))
    assert [k.binary.metadata.num_warps for k in default] == [4]


@pytest.mark.parametrize(
    ("environment", "kind"),
    [
        ({"MAGSD_TRITON_AUTOTUNE": "0"}, "Tunable"),
        ({"MAGSD_TRITON_AUTOTUNE": "1"}, "Autotuner"),
    ],
    ids=["0", "1"],
)
def test_the_environment_asks_for_tuning(environment, kind):
    code = """
from magsd_kernels.triton import bilinear_pool
print(type(bilinear_pool._forward_kernel).__name__)
"""
    result = fresh_python(code, **environment)
    assert result.stdout.strip() == kind, result.stderr
