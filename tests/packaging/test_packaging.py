"""The distribution: versions, extras, type marker, README, and what a light install can import."""

from __future__ import annotations

import importlib.metadata
import importlib.resources
import re
import subprocess
import sys
from pathlib import Path

import pytest

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
    "pandas",
    "tensorboard",
    "safetensors",
    "huggingface_hub",
)


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_version_of_the_distribution_is_that_of_the_package():
    assert importlib.metadata.version("magsd") == magsd_kernels.__version__


def test_base_requirements_are_torch_and_numpy_only():
    requirements = importlib.metadata.requires("magsd") or []
    base = {re.split(r"[<>=\[; ]", r)[0] for r in requirements if "extra ==" not in r}
    assert base == {"torch", "numpy"}


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
    for folder in ("magsd", "magsd_kernels", "tests"):
        for path in (ROOT / folder).rglob("*.py"):
            if path != Path(__file__):
                read |= set(re.findall(r"[\"'](MAGSD_[A-Z]+)[\"']", path.read_text()))
    assert read <= table, f"not in the README's table: {sorted(read - table)}"
    assert table <= read, f"in the README's table but read nowhere: {sorted(table - read)}"


def test_readme_pictures_exist():
    readme = (ROOT / "README.md").read_text()
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", readme)
    assert pictures
    assert all((ROOT / picture).is_file() for picture in pictures)
