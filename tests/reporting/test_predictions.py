"""Tables of predictions: files of ours and of others, and what is wrong with them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.special import softmax

from magsd.reporting.predictions import (
    PredictionTable,
    read_predictions,
    write_predictions,
)


def make_table(
    rows: int = 12, *, refined: bool = True, seed: int = 0, **changes
) -> PredictionTable:
    rng = np.random.default_rng(seed)
    # Float32 logits, as models give them.
    logits = rng.normal(size=(rows, 3)).astype(np.float32).astype(np.float64)
    other = rng.normal(size=(rows, 3)).astype(np.float32).astype(np.float64)
    values = {
        "name": "run",
        "classes": ("a", "Überguss, links", "c"),
        "keys": np.array([f"images/{i}.png" for i in range(rows)]),
        "patients": np.array([f"p{i // 2}" for i in range(rows)]),
        "splits": np.array(["validation", "test"])[(np.arange(rows) // 2) % 2],
        "labels": rng.integers(0, 3, rows),
        "probabilities": softmax(logits, axis=1),
        "logits": logits,
        "refined_probabilities": softmax(other, axis=1) if refined else None,
        "refined_logits": other if refined else None,
        "extra": {"sex": np.array(["f", 'm "x"\ny', ""] * (rows // 3))},
    }
    return PredictionTable(**(values | changes))


def same(first: PredictionTable, second: PredictionTable) -> None:
    assert (first.name, first.classes, first.warnings) == (
        second.name,
        second.classes,
        second.warnings,
    )
    assert list(first.extra) == list(second.extra)
    arrays = ("keys", "patients", "splits", "labels", "probabilities", "logits")
    for name in (*arrays, "refined_probabilities", "refined_logits"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))
    for name, values in first.extra.items():
        np.testing.assert_array_equal(values, second.extra[name])


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("refined", [True, False])
def test_a_written_table_reads_back_bit_for_bit(tmp_path: Path, refined: bool) -> None:
    table = make_table(refined=refined)
    write_predictions(tmp_path / "run" / "predictions.csv", table)
    same(read_predictions(tmp_path / "run" / "predictions.csv"), table)
