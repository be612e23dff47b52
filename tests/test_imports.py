"""No module imports itself by way of others, so that any of them may be imported first."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def modules_of(package: str) -> dict[str, Path]:
    """Name -> file of every module of a package of the checkout."""
    found = {}
    for path in (ROOT / package).rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def statements(body: list[ast.stmt]) -> Iterator[ast.Import | ast.ImportFrom]:
    """Imports that run with the module: not in functions, not for type checkers alone."""
    for node in body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from statements(node.orelse)
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            for part in ("body", "orelse", "finalbody"):
                yield from statements(getattr(node, part, []))
            for handler in getattr(node, "handlers", []):
                yield from statements(handler.body)


def imported(name: str, path: Path, modules: dict[str, Path]) -> set[str]:
    """Modules that a module runs when it is imported, the packages around them included."""
    found: set[str] = set()

    def run(target: str) -> None:
        parts = target.split(".")
        chain = [".".join(parts[: n + 1]) for n in range(len(parts))]
        # The packages around the importing module itself are running already.
        around = [each for each in chain[:-1] if not f"{name}.".startswith(f"{each}.")]
        found.update(each for each in [*around, target] if each in modules)

    for node in statements(ast.parse(path.read_text(encoding="utf-8")).body):
        if isinstance(node, ast.Import):
            for alias in node.names:
                run(alias.name)
            continue
        assert not node.level, f"{name}: imports are absolute"
        for alias in node.names:
            member = f"{node.module}.{alias.name}"
            run(member if member in modules else str(node.module))
    return found - {name}


def cycle(graph: dict[str, set[str]]) -> list[str]:
    """Modules of which each imports the next and the last the first; empty without any."""
    done: set[str] = set()

    def search(name: str, path: list[str]) -> list[str]:
        if name in path:
            return path[path.index(name) :]
        if name in done:
            return []
        for other in sorted(graph[name]):
            found = search(other, [*path, name])
            if found:
                return found
        done.add(name)
        return []

    for name in sorted(graph):
        found = search(name, [])
        if found:
            return found
    return []


@pytest.mark.parametrize("package", ["magsd", "magsd_kernels", "benchmarks"])
def test_no_module_imports_itself_by_way_of_others(package: str) -> None:
    modules = {}
    for each in ("magsd", "magsd_kernels", "benchmarks"):
        modules |= modules_of(each)
    own = {name for name in modules if name.split(".")[0] == package}
    assert len(own) > 10
    graph = {name: imported(name, path, modules) for name, path in modules.items()}
    found = cycle({name: graph[name] & own for name in own})
    assert not found, " imports ".join([*found, found[0]])


def test_a_cycle_is_found_and_a_tree_is_none() -> None:
    tree = {"a": {"b", "c"}, "b": {"c"}, "c": set[str]()}
    assert cycle(tree) == []
    assert cycle(tree | {"c": {"a"}}) == ["a", "b", "c"]
