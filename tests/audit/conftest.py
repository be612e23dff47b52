"""Pictures that are cheap to make, and no two of which are alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

Picture = Callable[..., NDArray[np.uint8]]


@pytest.fixture(scope="session")
def picture() -> Picture:
    """picture(seed, height=96, width=96): spots of several sizes, (height, width) uint8."""

    def make(seed: int, height: int = 96, width: int = 96) -> NDArray[np.uint8]:
        noise = np.random.default_rng(seed).normal(size=(96, 96)).astype(np.float32)
        image = sum(s * cv2.GaussianBlur(noise, (0, 0), s) for s in (2, 4, 8))
        image = cv2.normalize(image, None, 30, 220, cv2.NORM_MINMAX).astype(np.uint8)
        return np.asarray(cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA))

    return make


@pytest.fixture(scope="session", autouse=True)
def few_trees() -> Iterator[None]:
    """What is planted is plain enough for a small forest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("magsd.audit.shortcuts._TREES", 10)
        yield
