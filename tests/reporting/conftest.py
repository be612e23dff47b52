"""Tables of predictions made of random numbers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from scipy.special import softmax

from magsd.reporting.predictions import PredictionTable

MakeTable = Callable[..., PredictionTable]


def _make(
    rows: int = 12, *, refined: bool = True, skill: float = 1.0, seed: int = 0, **changes
) -> PredictionTable:
    """Two images a patient; `skill` is added to the logit of the true class."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, rows)
    # Float32 logits, as models give them.
    logits = rng.normal(size=(2, rows, 3)).astype(np.float32).astype(np.float64)
    logits[:, np.arange(rows), labels] += skill
    values = {
        "name": "run",
        "classes": ("a", "Überguss, links", "c"),
        "keys": np.array([f"images/{i}.png" for i in range(rows)]),
        "patients": np.array([f"p{i // 2}" for i in range(rows)]),
        "splits": np.array(["validation", "test"])[(np.arange(rows) // 2) % 2],
        "labels": labels,
        "probabilities": softmax(logits[0], axis=1),
        "logits": logits[0],
        "refined_probabilities": softmax(logits[1], axis=1) if refined else None,
        "refined_logits": logits[1] if refined else None,
        "extra": {"sex": np.array(["f", 'm "x"\ny', ""])[np.arange(rows) % 3]},
    }
    return PredictionTable(**(values | changes))


@pytest.fixture
def make_table() -> MakeTable:
    return _make
