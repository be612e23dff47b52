"""What the compiled CUDA kernels take of a multiprocessor, as ptxas reported it."""

from __future__ import annotations

import functools
import json
import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

#: Of a kernel, for one architecture: registers of a thread; bytes of a block's static shared
#: memory, of a thread's stack, and of what is spilled to it and read back.
RESOURCES = ("registers", "shared", "stack", "spills")
_REPORT = re.compile(
    r"Compiling entry function '(?P<kernel>\S+)' for '(?P<architecture>\w+)'"
    r".*?(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores,"
    r" (?P<loads>\d+) bytes spill loads"
    r".*?Used (?P<registers>\d+) registers(?:[^\n]*?(?P<shared>\d+) bytes smem)?",
    re.DOTALL,
)


def write_resources(folder: Path, sources: Iterable[Path], compiler: str, path: Path) -> None:
    """Write the reports in `folder` as JSON, one line per kernel, so that changes can be read."""
    table: dict[str, dict[str, list[int]]] = {}
    for source in sources:
        log = (folder / f"{source.stem}.o.log").read_text(errors="replace")
        for found in _REPORT.finditer(log):
            spills = int(found["stores"]) + int(found["loads"])
            row = [int(found["registers"]), int(found["shared"] or 0), int(found["stack"]), spills]
            kernel = f"{source.name}: {_demangled(found['kernel'])}"
            table.setdefault(kernel, {})[found["architecture"]] = row
    lines = [f"  {json.dumps(name)}: {json.dumps(table[name])}" for name in sorted(table)]
    head = f'{{\n "compiler": {json.dumps(compiler)},\n "columns": {json.dumps(RESOURCES)},\n'
    path.write_text(head + ' "kernels": {\n' + ",\n".join(lines) + "\n }\n}\n")


@functools.cache
def _demangled(name: str) -> str:
    """The kernel's name and template arguments, without the namespaces, which its file tells."""
    tool = shutil.which("c++filt") or shutil.which("cu++filt")
    if tool is None:
        return name
    result = subprocess.run([tool, "-p", name], capture_output=True, text=True, check=False)
    namespaces = r"magsd::(cuda::)?([a-z_]+::)?|\(anonymous namespace\)::|c10::"
    return re.sub(namespaces, "", result.stdout.strip())
