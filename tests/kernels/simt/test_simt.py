"""The shim that runs CUDA kernels on the host: planted faults are caught, correct kernels pass."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
SOURCES = FOLDER.parents[2] / "csrc"
CASES = FOLDER / "faults.cu"

SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g")
BUILDS = {
    "g++": ("g++",),
    "g++-sanitized": ("g++", *SANITIZE),
    "g++-sanitized-swapcontext": ("g++", *SANITIZE, "-DMAGSD_SIMT_UCONTEXT"),
    "clang++": ("clang++",),
    "clang++-sanitized": ("clang++", *SANITIZE),
}

WRONG = "the result is wrong"
WAIT = "they would wait for ever"
ELSEWHERE = "stand at different positions"
OUTSIDE = "AddressSanitizer: heap-buffer-overflow"
#: What catches each fault: the comparison of the result, words of the launch's refusal, or, in the
#: builds that have them, the sanitizers.
FAULTS = {
    "read_after_write": WRONG,
    "write_after_read": WRONG,
    "read_before_anyone_wrote": WRONG,
    "lanes_without_syncwarp": WRONG,
    "order_of_2_blocks": WRONG,
    "order_of_9_blocks": WRONG,
    "barrier_that_some_skip": "95 wait at __syncthreads, 0 at a warp function, 1 have ended",
    "barrier_after_some_have_left": WAIT,
    "barriers_at_two_places": f"the threads of a block {ELSEWHERE}: __syncthreads in line",
    "shuffle_that_some_skip": f"the lanes of a warp {ELSEWHERE}: __shfl_xor_sync in line",
    "shuffle_in_a_loop_of_unequal_length": WAIT,
    "mask_of_half_a_warp": "a mask of less than a warp",
    "lanes_at_two_functions": f"the lanes of a warp {ELSEWHERE}: .*(__ballot_sync|__shfl_sync)",
    "lanes_exchange_two_types": "exchange values of different types",
    "block_of_no_whole_warps": "a multiple of 32; got 80",
    "block_too_large": "32 to 1024 threads",
    "grid_too_large": "of more than can be launched",
    "grid_of_nothing": "a grid of no block",
    "too_much_shared": "more than 48 KB shared",
    "too_much_shared_of_both_kinds": "more than 227 KB shared",
    "dynamic_shared_too_large": "too much dynamic shared memory",
    "shared_read_past_the_end": OUTSIDE,
    "shared_write_before_the_start": OUTSIDE,
    "dynamic_shared_past_the_end": OUTSIDE,
    "global_read_past_the_end": OUTSIDE,
    "global_write_past_the_end": OUTSIDE,
    "peer_read_before_a_barrier": WRONG,
    "peer_read_behind_a_barrier_of_the_block": WRONG,
    "peer_that_ends_while_it_is_read": WRONG,
    "peer_write_after_read": WRONG,
    "peer_out_of_range": "block 3 of a cluster of 3",
    "peer_of_global_memory": "does not lie in shared memory",
    "peer_read_past_the_end": OUTSIDE,
    "cluster_barrier_that_a_block_skips": f"64 at the cluster's barrier, 32 have ended: {WAIT}",
    "cluster_barrier_that_a_thread_skips": f"95 at the cluster's barrier, 1 have ended: {WAIT}",
    "cluster_barriers_at_two_places": f"the threads of a cluster {ELSEWHERE}: cluster_arrive in",
    "cluster_wait_without_arrival": "waits at the barrier of its cluster where it did not arrive",
    "cluster_arrival_twice": "arrives twice at the barrier of its cluster",
    "cluster_arrival_without_wait": "arrives at its cluster's barrier and ends",
    "cluster_too_large": "a cluster must hold 1 to 8 blocks and divide the grid; got 9 of 72",
    "cluster_that_does_not_divide_the_grid": "divide the grid; got 4 of 10",
    "cluster_on_an_older_gpu": "this GPU has no clusters",
    "misaligned_row_of_ldmatrix": "a row of ldmatrix is not aligned",
    "ldmatrix_past_the_end": OUTSIDE,
    "misaligned_float4": "runtime error: .*misaligned address",
}
FOR_SANITIZERS = {name for name, sign in FAULTS.items() if re.search("Sanitizer|runtime", sign)}
#: Right with the planted fault too: the shim itself must stand it.
SOUND = (
    "launch_after_a_refused_one",
    "launch_after_a_refused_cluster",
    "everything_offered",
    "everything_of_newer_gpus",
)


@pytest.fixture(
    scope="module",
    params=[pytest.param(n, marks=[] if n == "g++" else [pytest.mark.slow]) for n in BUILDS],
)
def program(request: pytest.FixtureRequest, made_once: Callable[..., Path]) -> Path:
    """faults.cu and the shim, compiled."""
    name = request.param
    if not (SOURCES / "simt").is_dir():
        pytest.skip("this checkout holds no csrc/simt")
    if shutil.which(BUILDS[name][0]) is None:
        pytest.skip(f"no {BUILDS[name][0]}")
    binary = made_once(f"simt {name}", lambda folder: compile_into(folder, name)) / name
    if not binary.is_file():
        pytest.skip(f"{BUILDS[name][0]} has no sanitizers here")
    return binary


def compile_into(folder: Path, name: str) -> None:
    """The program by this name, unless it is to have sanitizers that the compiler lacks."""
    compiler, *flags = BUILDS[name]
    if "-g" in flags:
        (folder / "empty.cpp").write_text("#include <sanitizer/asan_interface.h>\nint main() {}\n")
        probe = run(compiler, *SANITIZE, folder / "empty.cpp", "-o", folder / "empty")
        if probe.returncode != 0:
            return
    result = run(
        compiler, "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas",
        *flags, f"-I{SOURCES}", "-x", "c++", CASES, *sorted((SOURCES / "simt").glob("*.cpp")),
        "-o", folder / name,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0"}
    environment.pop("LD_PRELOAD", None)
    return subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=environment,
    )


@pytest.mark.parametrize("name", [*FAULTS, *SOUND])
def test_a_correct_kernel_passes(program: Path, name: str):
    result = run(program, name, "0")
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_caught(program: Path, name: str):
    if name in FOR_SANITIZERS and "sanitized" not in program.name:
        pytest.skip("this build has no sanitizers")
    result = run(program, name, "1")
    if FAULTS[name] == WRONG:
        assert result.returncode == 10, result.stderr
    else:
        assert result.returncode not in (0, 10)
        assert re.search(FAULTS[name], result.stderr), result.stderr


@pytest.mark.parametrize("name", SOUND)
def test_the_shim_stands(program: Path, name: str):
    result = run(program, name, "1")
    assert result.returncode == 0, result.stderr


def test_every_case_is_run():
    written = re.findall(r"(?:BOTH|OF_CLUSTER)\((\w+), |\{\"(\w+)\",\s+\[", CASES.read_text())
    names = {a or b for a, b in written} - {"name"}
    assert names == {*FAULTS, *SOUND}


def test_a_width_is_not_taken_for_a_line(tmp_path: Path):
    """CUDA's fourth argument of a shuffle is not offered; it must not compile to something else."""
    compiler = next((c for c in ("g++", "clang++") if shutil.which(c)), None)
    if compiler is None:
        pytest.skip("no C++ compiler")
    for argument, compiles in (("", True), (", 16", False)):
        source = tmp_path / "width.cpp"
        source.write_text(
            '#include "simt/simt.h"\n'
            f"int f(int v) {{ return __shfl_xor_sync(0xffffffffu, v, 1{argument}); }}\n"
        )
        result = run(compiler, "-std=c++17", "-fsyntax-only", f"-I{SOURCES}", source)
        assert (result.returncode == 0) == compiles, result.stderr
