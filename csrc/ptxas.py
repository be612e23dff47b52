"""What the compiled CUDA kernels take of a multiprocessor, as ptxas reported it."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path


def kernel_resources(folder: Path) -> dict[str, dict[str, dict[str, int]]]:
    """`<file>: <kernel>` -> architecture -> registers, bytes of shared memory, stack and spills."""
    table: dict[tuple[str, str], dict[str, dict[str, int]]] = {}
    for log in sorted(folder.glob("*.log")):
        kernel = architecture = ""
        spills: dict[str, int] = {}
        for line in log.read_text(errors="replace").splitlines():
            if found := re.search(r"Compiling entry function '(\S+)' for '(\w+)'", line):
                kernel, architecture, spills = found[1], found[2], {}
            elif found := re.search(
                r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line
            ):
                spills = {"stack": int(found[1]), "spills": int(found[2]) + int(found[3])}
            elif found := re.search(r"Used (\d+) registers", line):
                shared = re.search(r"(\d+) bytes smem", line)
                table.setdefault((log.name.partition(".")[0], kernel), {})[architecture] = {
                    "registers": int(found[1]),
                    "shared": int(shared[1]) if shared else 0,
                    **spills,
                }
    names = _demangled([mangled for _, mangled in table])
    return {f"{file}: {names[mangled]}": table[file, mangled] for file, mangled in table}


def _demangled(names: list[str]) -> dict[str, str]:
    tool = shutil.which("c++filt") or shutil.which("cu++filt")
    if tool is None or not names:
        return {name: name for name in names}
    plain = subprocess.run(
        [tool], input="\n".join(names), capture_output=True, text=True, check=True
    ).stdout.splitlines()
    # Without the return type, the namespaces that all share and the parameters.
    short = [re.sub(r"^void |magsd::cuda::|\(anonymous namespace\)::", "", p) for p in plain]
    return dict(zip(names, map(_without_parameters, short), strict=True))


def _without_parameters(function: str) -> str:
    """Up to the first parenthesis outside the template's arguments."""
    depth = 0
    for i, character in enumerate(function):
        depth += (character == "<") - (character == ">")
        if character == "(" and depth == 0:
            return function[:i]
    return function
