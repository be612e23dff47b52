"""What `magsd report` is given: predictions, and what is known of the run that made them."""

from __future__ import annotations

import csv
import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from magsd.config import is_of_run
from magsd.errors import ConfigError, RunError


@dataclass(frozen=True)
class Input:
    """One file of predictions: its name in the report, and the run's folder where it is of one.

    folds: the runs of a cross-validation whose held-out predictions the file gathers.
    """

    name: str
    predictions: Path
    run: Path | None = None
    folds: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Facts:
    """What a report says of a file's origin; empty where nothing is known.

    rows: label and text, in the page's order. sides: side -> class -> (images, patients), from the
    run's split.csv, which has the training side, too. configuration: all values of the run.
    source: what the run's images came from.
    """

    rows: list[tuple[str, str]] = field(default_factory=list)
    sides: dict[str, dict[str, tuple[int, int]]] = field(default_factory=dict)
    configuration: dict[str, Any] = field(default_factory=dict)
    source: str | None = None


def find_inputs(paths: Sequence[Path], names: Sequence[str] = ()) -> list[Input]:
    """The predictions that runs' folders, folders of a cross-validation and files hold.

    names: names in the report, as many as there are predictions; default those of the folders and
    files. Raises `RunError` for a path that holds none, `ConfigError` for names that do not fit.
    """
    found = [each for path in paths for each in _inputs_of(path)]
    if names and len(names) != len(found):
        raise ConfigError(
            f"--name is given {len(names)} times for {len(found)} files of predictions:"
            f" {', '.join(str(each.predictions) for each in found)}"
        )
    chosen = list(names) or _apart([each.name for each in found], found)
    for name, count in Counter(chosen).items():
        if count > 1:
            raise ConfigError(f"--name {name}: given {count} times; names must differ")
    return [
        Input(name, each.predictions, each.run, each.folds)
        for name, each in zip(chosen, found, strict=True)
    ]


def _inputs_of(path: Path) -> list[Input]:
    if path.is_file():
        return [Input(path.stem, path)]
    if not path.is_dir():
        raise RunError(f"{path}: no such file or folder; expected a run, or a predictions.csv")
    if is_of_run(path / "config.yaml"):
        file = path / "predictions.csv"
        if not file.is_file():
            raise RunError(
                f"{path} holds no predictions.csv: the run has not ended, or is of an earlier"
                f" version; write a file with: magsd evaluate {path} --predictions FILE, and give"
                " that"
            )
        return [Input(path.resolve().name, file, run=path)]
    gathered = sorted(path.glob("*/seed*/predictions.csv"))
    if gathered:
        return [_gathered(file) for file in _in_order(path, gathered)]
    if (path / "predictions.csv").is_file():
        return [Input(path.resolve().name, path / "predictions.csv")]
    raise RunError(
        f"{path} is neither a run's folder nor one of a cross-validation with predictions, and"
        " holds no predictions.csv"
    )


def _gathered(file: Path) -> Input:
    """Out-of-fold predictions of one model and seed, by the runs that the file names."""
    named = {f"fold{row.get('fold')}" for row in _rows(file)}
    folds = tuple(
        folder
        for folder in sorted(file.parent.glob("fold*"))
        if folder.name in named and is_of_run(folder / "config.yaml")
    )
    name = file.parent.parent.name
    if len(list(file.parent.parent.glob("seed*/predictions.csv"))) > 1:
        name = f"{name} {file.parent.name}"
    return Input(name, file, folds=folds)


def _in_order(out: Path, files: list[Path]) -> list[Path]:
    """Models in the order of results.csv: the others are compared with the first."""
    models = [row.get("model", "") for row in _rows(out / "results.csv")]
    place = {model: k for k, model in reversed(list(enumerate(models)))}
    return sorted(files, key=lambda file: place.get(file.parent.parent.name, len(models)))


def _apart(names: list[str], found: list[Input]) -> list[str]:
    """Names that differ: those that several share get the folder's name before them."""
    counts = Counter(names)
    wider = [
        name if counts[name] == 1 else f"{_folder(each).name}/{name}"
        for name, each in zip(names, found, strict=True)
    ]
    if len(set(wider)) == len(wider):
        return wider
    return [f"{name} ({number})" for number, name in enumerate(wider, start=1)]


def _folder(each: Input) -> Path:
    return (each.run or each.predictions).resolve().parent


def facts_of(each: Input) -> Facts:
    """Everything that the folder of an input says about it."""
    runs = [each.run] if each.run is not None else list(each.folds)
    rows: list[tuple[str, str]] = []
    configuration: dict[str, Any] = {}
    source = None
    if runs:
        configuration = _configuration(runs[0])
        rows += _settings(configuration, cross_validated=each.run is None, folds=len(runs))
        source = configuration.get("data", {}).get("source")
    rows.append(("predictions", f"{each.predictions.name}, SHA-256 {_sha256(each.predictions)}"))
    for run in runs:
        best = run / "checkpoints" / "best.pt"
        if best.is_file():
            label = "checkpoint" if each.run is not None else f"checkpoint of {run.name}"
            rows.append((label, f"{best.name}, SHA-256 {_sha256(best)}"))
    return Facts(
        rows,
        _sides(each.run / "split.csv") if each.run is not None else {},
        configuration,
        source,
    )


def _configuration(run: Path) -> dict[str, Any]:
    from magsd.config import load_config

    return load_config(run / "config.yaml").to_dict()


def _settings(
    configuration: dict[str, Any], *, cross_validated: bool, folds: int
) -> list[tuple[str, str]]:
    data, model = configuration["data"], configuration["model"]
    train, optim = configuration["train"], configuration["optim"]
    weights = model.get("pretrained")
    start = "random weights" if weights is False else "pretrained weights"
    if isinstance(weights, str):
        start += f" ({Path(weights).name})"
    images = f"{data['image_size']} x {data['image_size']} pixels"
    images += f", {model.get('in_channels', 1)} channel(s)" + (", CLAHE" if data["clahe"] else "")
    return [
        ("model", f"{model['name']}, backbone {model['backbone']}, {start}"),
        ("source", str(data["source"])),
        ("split", _split(data, cross_validated, folds)),
        ("images", images),
        (
            "training",
            f"{train['epochs']} epochs, batches of {train['batch_size']}, {optim['name']}, learning"
            f" rate {optim['lr']:g}, seed {train['seed']}",
        ),
    ]


def _split(data: dict[str, Any], cross_validated: bool, folds: int) -> str:
    """How images were divided, in words."""
    parts = f"{data['folds']} folds by patient, stratified by class, seed {data['split_seed']}"
    test = data.get("test", "none")
    held = "test" if test == "folds" else "validation"
    if cross_validated:
        return f"{parts}; each fold is the {held} side of one of {folds} models"
    text = f"{parts}; fold {data['fold']} is the {held} side"
    if data["split"] != "folds":
        text = f"the published split where there is one, else {text}"
    if data["split"] == "published":
        text = "the published split"
    if test not in ("folds", "none"):
        text += f"; the test side is {test}"
    return text + (", nothing is kept aside for a test" if test == "none" else "")


def _sides(split: Path) -> dict[str, dict[str, tuple[int, int]]]:
    """Images and patients by side and class, from a run's split.csv; of shards nothing."""
    rows = _rows(split)
    if not rows or not {"label", "patient", "split"} <= rows[0].keys():
        return {}
    return count_sides([(row["split"], row["label"], row["patient"]) for row in rows])


def _rows(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV that the report can do without; none of a file that cannot be read."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error):
        return []


def count_sides(rows: Sequence[tuple[str, str, str]]) -> dict[str, dict[str, tuple[int, int]]]:
    """(side, class, patient) of images -> side -> class -> (images, patients)."""
    images: Counter[tuple[str, str]] = Counter()
    patients: dict[tuple[str, str], set[str]] = {}
    for side, label, patient in rows:
        images[side, label] += 1
        patients.setdefault((side, label), set()).add(patient)
    counts: dict[str, dict[str, tuple[int, int]]] = {}
    for (side, label), number in images.items():
        counts.setdefault(side, {})[label] = (number, len(patients[side, label]))
    return counts


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()
