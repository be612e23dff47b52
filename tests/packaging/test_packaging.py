"""The distribution: versions, extras, type marker, README, and what a light install can import."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.resources
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import magsd_kernels

ROOT = Path(__file__).parents[2]
TRAIN_ONLY = (
    "timm",
    "torchvision",
    "cv2",
    "sklearn",
    "matplotlib",
    "typer",
    "rich",
    "yaml",
    "tensorboard",
    "safetensors",
    "huggingface_hub",
)


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, check=False,
        # -c looks in its working directory first: what is installed, not the checkout.
        cwd=Path(magsd_kernels.__file__).parents[1],
    )  # fmt: skip


def test_version_of_the_distribution_is_that_of_the_package():
    assert importlib.metadata.version("magsd") == magsd_kernels.__version__


def test_base_requirements_are_torch_and_numpy_only():
    requirements = importlib.metadata.requires("magsd") or []
    base = {re.split(r"[<>=\[; ]", r)[0] for r in requirements if "extra ==" not in r}
    assert base == {"torch", "numpy"}


def test_every_package_that_is_imported_is_required():
    # Which distribution provides an import is known of installed ones only.
    pytest.importorskip("timm", reason="needs the train extra")
    requirements = importlib.metadata.requires("magsd") or []
    extras = re.compile(r"""extra == ['"](train|dicom|shards)['"]""")
    wanted = [r for r in requirements if "extra ==" not in r or extras.search(r)]
    required = {re.split(r"[<>=\[; ]", r)[0].lower().replace("-", "_") for r in wanted}
    providers = importlib.metadata.packages_distributions()
    imported = set()
    for folder in ("magsd", "magsd_kernels"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Import):
                    imported |= {alias.name.partition(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.module:
                    imported.add(node.module.partition(".")[0])
    # triton comes with torch where it exists; its backend is unavailable elsewhere. Type checkers
    # alone import _typeshed, which they bring.
    own = {"magsd", "magsd_kernels", "triton", "_typeshed"}
    foreign = imported - set(sys.stdlib_module_names) - own
    lacking = {
        name
        for name in foreign
        if not {d.lower().replace("-", "_") for d in providers.get(name, [name])} & required
    }
    assert not lacking, f"imported, but in no requirement: {sorted(lacking)}"


@pytest.mark.parametrize("package", ["magsd_kernels", "magsd"])
def test_type_marker_is_installed(package: str):
    assert importlib.resources.files(package).joinpath("py.typed").is_file()


def test_kernels_run_without_the_train_extra():
    blocked = ", ".join(repr(name) for name in TRAIN_ONLY)
    code = f"""
import sys
sys.modules.update(dict.fromkeys([{blocked}]))
import torch, magsd_kernels
layer = magsd_kernels.MultiscaleAttention((4, 8), 2)
attention = layer((torch.randn(2, 4, 6, 6), torch.randn(2, 8, 3, 3)))
print(tuple(magsd_kernels.bilinear_attention_pool(torch.randn(2, 8, 3, 3), attention).shape))
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "(2, 16)"


def test_training_without_its_extra_says_what_to_install():
    blocked = ", ".join(repr(name) for name in TRAIN_ONLY)
    code = f"""
import sys
sys.modules.update(dict.fromkeys([{blocked}]))
from magsd.cli import main
sys.argv = ["magsd", "train"]
main()
"""
    result = run_python(code)
    assert result.returncode != 0
    assert "pip install 'magsd[train]'" in result.stderr + result.stdout
    assert "Traceback" not in result.stderr


def test_readme_gives_the_two_commands_and_every_environment_variable():
    readme = (ROOT / "README.md").read_text()
    assert "pip install '.[train]' && magsd train\n" in readme
    assert "pip install '.[train,test]' && pytest\n" in readme
    table = set(re.findall(r"^\| `(MAGSD_\w+)`", readme, flags=re.MULTILINE))
    read = set()
    for folder in ("magsd", "magsd_kernels", "csrc", "tests"):
        for path in (ROOT / folder).rglob("*.py"):
            if path != Path(__file__):
                read |= set(re.findall(r"[\"'](MAGSD_[A-Z_]+)[\"']", path.read_text()))
    assert read <= table, f"not in the README's table: {sorted(read - table)}"
    assert table <= read, f"in the README's table but read nowhere: {sorted(table - read)}"


def test_readme_python_runs():
    readme = (ROOT / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)

    class Backbone(torch.nn.Conv2d):
        def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
            fine = super().forward(images)
            return [fine, torch.nn.functional.avg_pool2d(fine, 2)]

    net = names["Net"](Backbone(1, 4, 4, stride=4), (4, 4), 3)
    loss = names["loss"](net, torch.randn(2, 1, 32, 32), torch.tensor([0, 2]))
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def test_readme_pictures_exist():
    readme = (ROOT / "README.md").read_text()
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", readme)
    assert pictures
    assert all((ROOT / picture).is_file() for picture in pictures)
