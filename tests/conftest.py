"""Fixtures for every test folder; among them a run small enough to train in a second."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

SMALL = (
    "data.source=phantom:n=24,size=32",
    "image_size=32",
    "folds=2",
    "backbone=test_resnet",
    "backbone_args={output_stride: 16}",
    "attention_maps=4",
    "pretrained=false",
    "batch_size=4",
    "eval_batch_size=8",
    "epochs=2",
    "lr=1e-3",
    "tensorboard=false",
    "train.device=cpu",
    "log_interval=2",
    "overlays=0",
)


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Folder with real radiographs and weights; tests that need it skip where it is absent."""
    path = Path(os.environ.get("MAGSD_SHARED", Path(__file__).parents[2] / "shared"))
    if not (path / "data" / "cxr3" / "labels.csv").is_file():
        pytest.skip(f"real radiographs not found under {path} (set MAGSD_SHARED)")
    return path


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def small_pairs(cache_dir: Path) -> list[str]:
    """key=value pairs of the small run: three steps an epoch."""
    return [*SMALL, f"cache_dir={cache_dir}"]
