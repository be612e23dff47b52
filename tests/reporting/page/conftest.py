"""Made predictions files, and the command that reports them."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from scipy.special import softmax
from typer.testing import CliRunner

from magsd import cli

CLASSES = ("covid-19", "no-finding", "pneumonia")


def _made(
    path: Path,
    classes: Sequence[str] = CLASSES,
    *,
    patients: int = 60,
    seed: int = 0,
    refined: bool = False,
    splits: Sequence[str] = ("validation", "test", "test"),
    bare: bool = False,
) -> Path:
    """Write predictions of two images a patient; labels and patients are the same for any seed.

    bare: label and probability columns alone, as other programs write them.
    """
    patient = np.repeat(np.arange(patients), 2)
    labels = (patient // len(splits)) % len(classes)
    noise = np.random.default_rng(seed)
    own = noise.normal(0, 1, (patients, len(classes)))[patient]
    true = np.eye(len(classes))[labels]
    logits = 2 * (own + noise.normal(0, 0.7, own.shape) + 1.5 * true)
    columns: dict[str, list[object]] = {"label": [classes[k] for k in labels]}
    if not bare:
        columns["key"] = [f"images/{i:04d}.png" for i in range(len(labels))]
        columns["patient"] = [f"p{p}" for p in patient]
        columns["split"] = [splits[p % len(splits)] for p in patient]
        columns["view"] = [("PA", "AP")[i % 2] for i in range(len(labels))]
    for prefix, values in ({"": logits} | ({"refined_": logits + true} if refined else {})).items():
        for k, each in enumerate(classes):
            if not bare:
                columns[f"{prefix}logit_{each}"] = values[:, k].tolist()
            columns[f"{prefix}probability_{each}"] = softmax(values, axis=1)[:, k].tolist()
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
    return path


def _report(*arguments: str | Path) -> str:
    text = ["report", *map(str, arguments), "--resamples", "100"]
    result = CliRunner(env={"COLUMNS": "200"}).invoke(cli.app, text)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="session")
def made() -> Callable[..., Path]:
    """Writes a file of predictions; see `_made`."""
    return _made


@pytest.fixture(scope="session")
def report() -> Callable[..., str]:
    """Output of `magsd report` with 100 resamples; its error is raised."""
    return _report


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of two models, the first with refined predictions."""
    root = tmp_path_factory.mktemp("report")
    first = _made(root / "first.csv", refined=True)
    second = _made(root / "second.csv", seed=1)
    _report(first, second, "--out", root / "out")
    return root / "out"
