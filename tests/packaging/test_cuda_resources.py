"""Registers, shared memory, stack and spills of the CUDA kernels, as ptxas reported them.

After a build of the CUDA library for the default architectures,
`cp magsd_kernels/lib/cuda_resources.json csrc/cuda/resources.json` writes the table down anew.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import magsd_kernels

ROOT = Path(__file__).parents[2]
BUILT = Path(magsd_kernels.__file__).parent / "lib" / "cuda_resources.json"
WRITTEN = ROOT / "csrc" / "cuda" / "resources.json"
COLUMNS = ["registers", "shared", "stack", "spills"]

LOG = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN5magsd4cuda2op12_GLOBAL__N_14sinkIfEEvPT_' for 'sm_80'
ptxas info    : Function properties for _ZN5magsd4cuda2op12_GLOBAL__N_14sinkIfEEvPT_
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 0 barriers, 412 bytes cmem[0]
ptxas info    : Compile time = 2.134 ms
ptxas info    : Compiling entry function '_ZN5magsd4cuda2op12_GLOBAL__N_14sinkIfEEvPT_' for 'sm_90'
ptxas info    : Function properties for _ZN5magsd4cuda2op12_GLOBAL__N_14sinkIfEEvPT_
    16 bytes stack frame, 12 bytes spill stores, 20 bytes spill loads
ptxas info    : Used 48 registers, used 1 barriers, 16 bytes cumulative stack size, 4096 bytes smem
"""


@pytest.fixture
def built() -> dict[str, Any]:
    """The table of the library that was built."""
    if not BUILT.is_file():
        pytest.skip("the CUDA library is not built")
    return json.loads(BUILT.read_text())


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
def test_no_kernel_spills(built, architecture):
    rows = {
        name: dict(zip(built["columns"], entry[architecture], strict=True))
        for name, entry in built["kernels"].items()
        if architecture in entry
    }
    if not rows:
        pytest.skip(f"the CUDA library is not built for {architecture}")
    assert len(rows) == len(built["kernels"])
    assert not {name: row for name, row in rows.items() if row["spills"] or row["stack"]}


def test_resources_are_those_written_down(built):
    written = json.loads(WRITTEN.read_text())
    if built["compiler"] != written["compiler"]:
        pytest.skip(f"written down for {written['compiler']}, built by {built['compiler']}")
    assert built["columns"] == written["columns"]
    architectures = {a for entry in built["kernels"].values() for a in entry}
    kept = {
        name: {a: row for a, row in entry.items() if a in architectures}
        for name, entry in written["kernels"].items()
    }
    assert built["kernels"] == kept


def test_what_is_written_down_spills_nowhere_that_matters():
    written = json.loads(WRITTEN.read_text())
    assert written["columns"] == COLUMNS
    for name, entry in written["kernels"].items():
        for architecture in ("sm_80", "sm_90", "sm_100"):
            assert entry[architecture][2:] == [0, 0], name


@pytest.mark.skipif(shutil.which("c++filt") is None, reason="no c++filt")
def test_the_report_of_ptxas_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.syspath_prepend(ROOT / "csrc")
    import ptxas

    (tmp_path / "drain.o.log").write_text(LOG)
    (tmp_path / "removed.o.log").write_text(LOG)
    path = tmp_path / "resources.json"
    ptxas.write_resources(tmp_path, [tmp_path / "drain.cu"], "nvcc 1.2.3", path)
    assert json.loads(path.read_text()) == {
        "compiler": "nvcc 1.2.3",
        "columns": COLUMNS,
        "kernels": {"drain.cu: sink<float>": {"sm_80": [40, 0, 0, 0], "sm_90": [48, 4096, 16, 32]}},
    }
