"""A small model and a small cache of drawn images."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from magsd.data import BatchLoader, ImageCache, Record
from magsd.models import ModelConfig, Preprocessing, build_model

CLASSES = ("left", "none", "right")
SIZE = 64


def draw(label: str, seed: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Noise, with a bright disc on one side and its mask."""
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 90, (SIZE, SIZE)).astype(np.uint8)
    if label == "none":
        return image, None
    y, x = np.mgrid[:SIZE, :SIZE]
    mask = (y - 32) ** 2 + (x - (16 if label == "left" else 48)) ** 2 < 100
    return np.where(mask, image + 150, image).astype(np.uint8), mask.astype(np.uint8)


@pytest.fixture
def classes() -> tuple[str, ...]:
    return CLASSES


@pytest.fixture
def cache() -> ImageCache:
    """Twelve images, the classes in turn; images of "none" have no mask."""
    labels = [CLASSES[i % 3] for i in range(12)]
    drawn = [draw(label, i) for i, label in enumerate(labels)]
    return ImageCache(
        images=np.stack([image for image, _ in drawn]),
        masks=np.stack([np.zeros((SIZE, SIZE), np.uint8) if m is None else m for _, m in drawn]),
        has_mask=np.array([m is not None for _, m in drawn]),
        records=tuple(
            Record(key=f"img/{i:02d}", label=label, patient=str(i), mask_kind=None)
            for i, label in enumerate(labels)
        ),
        bad=[],
    )


@pytest.fixture(params=["magsd", "plain"])
def model(request):
    torch.manual_seed(0)
    config = ModelConfig(name=request.param, backbone="resnet18", pretrained=False)
    return build_model(config, 3, classes=CLASSES, preprocessing=Preprocessing(SIZE, None)).eval()


@pytest.fixture
def make_loader(cache, classes):
    """Loader over the given rows of the cache, or of another one."""

    def make(indices=range(12), batch_size=5, of=cache):
        return BatchLoader(
            of,
            list(indices),
            classes,
            batch_size=batch_size,
            shuffle=False,
            seed=0,
            augment=None,
            device="cpu",
        )

    return make
