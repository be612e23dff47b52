"""A run on color images with a published split, from the source to the overlays."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from rich.console import Console

from magsd.config import Config
from magsd.data import read_split
from magsd.errors import ConfigError
from magsd.training.report import finish_run
from magsd.training.run import train_run

CLASSES = ("001.Red", "002.Blue")


@pytest.fixture
def birds(tmp_path: Path) -> Path:
    """Twelve red and blue images in the layout of CUB-200-2011; every third is a test image."""
    root = tmp_path / "CUB_200_2011"
    random = np.random.default_rng(0)
    names = [f"{label}/{i}.jpg" for label in CLASSES for i in range(6)]
    for number, name in enumerate(names):
        path = root / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        image = random.integers(0, 60, (40, 32, 3)).astype(np.uint8)
        image[..., 2 if number < 6 else 0] += 150
        cv2.imwrite(str(path), image)
    columns = {
        "images": names,
        "image_class_labels": [1] * 6 + [2] * 6,
        "train_test_split": [int(i % 3 != 0) for i in range(12)],
        "bounding_boxes": ["8 8 16 16"] * 12,
    }
    for name, values in columns.items():
        text = "".join(f"{i} {value}\n" for i, value in enumerate(values, 1))
        (root / f"{name}.txt").write_text(text)
    (root / "classes.txt").write_text("".join(f"{i} {c}\n" for i, c in enumerate(CLASSES, 1)))
    return tmp_path


def test_run(
    birds: Path,
    tmp_path: Path,
    small_config: Callable[..., Config],
    console: Console,
) -> None:
    config = small_config(f"data.source=cub:{birds}", "in_channels=3", "overlays=2", "epochs=1")
    trained = train_run(config, tmp_path / "run", console=console)
    records = trained.data.cache.records
    assert trained.data.cache.images.shape == (12, 32, 32, 3)
    assert trained.data.split.test == [0, 3, 6, 9]
    assert {records[i].label for i in trained.data.split.validation} == {"001.Red", "002.Blue"}
    assert read_split(trained.folder.split, records) == trained.data.split
    report = finish_run(trained, console)
    assert report.raw.images == 4
    assert report.localization is not None  # the birds' boxes
    sheet = cv2.imread(str(next(trained.folder.overlays.glob("*.png"))))
    assert sheet is not None
    longer = small_config(f"data.source=cub:{birds}", "in_channels=3", "epochs=2")
    again = train_run(longer, tmp_path / "run", resume=True, console=console)
    assert again.data.split == trained.data.split
    longer.data.split = "folds"
    with pytest.raises(ConfigError, match=r"data\.split was auto, now folds"):
        train_run(longer, tmp_path / "run", resume=True, console=console)
