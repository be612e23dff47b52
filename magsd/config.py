"""Every number of a training run in typed dataclasses; their defaults are the published recipe.

A YAML file and `key=value` pairs override them. Keys are dotted (`optim.lr`); a name that only one
section has may stand alone (`lr`). Unknown keys are refused with the nearest valid name.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_type_hints

import yaml

from magsd.coerce import coerce, describe
from magsd.data.augment import AugmentConfig
from magsd.errors import ConfigError
from magsd.models import ModelConfig
from magsd.ranges import RANGES
from magsd.unread import unread_keys

RUN_MARK = "# magsd run"
_log = logging.getLogger(__name__)
_PACKAGED = Path(str(resources.files("magsd") / "configs"))


@dataclass
class DataConfig:
    """Where images come from, how they are prepared and split.

    split: "auto" takes the split that a data set publishes, where it does, else a fold by patient.
    validation: shards to validate on, where `source` names shards.
    shuffle_buffer: images that each process shuffles at a time, where `source` names shards.
    """

    source: str = "phantom"
    image_size: int = 224
    clahe: bool = True
    clahe_clip: float = 4.0
    clahe_tiles: int = 4
    cache_dir: str | None = None
    skip_bad: bool = False
    validation: str | None = None
    shuffle_buffer: int = 1000
    split: Literal["auto", "published", "folds"] = "auto"
    folds: int = 5
    fold: int = 0
    split_seed: int = 0
    augment: AugmentConfig = field(default_factory=AugmentConfig)


@dataclass
class ViewsConfig:
    """Ranges from which each image's thresholds are drawn, and the constants of the views.

    MAG-SD takes mix-up, dim and patch; `weight` is the share of the crop in mix-up, at 1 the crop
    itself. WS-DAN takes crop and drop.
    """

    mixup_theta: tuple[float, float] = (0.4, 0.6)
    dim_theta: tuple[float, float] = (0.2, 0.5)
    patch_theta: tuple[float, float] = (0.4, 0.6)
    crop_theta: tuple[float, float] = (0.4, 0.6)
    drop_theta: tuple[float, float] = (0.2, 0.5)
    padding: float = 0.1
    weight: float = 0.4
    floor: float = 0.001


@dataclass
class LossConfig:
    """What is minimized.

    name: "soft_distance" (cross entropy of the image, and how far the views' predictions are from
        its own), "cross_entropy" (mean over the image and the views), or "published": the first
        for MAG-SD, the second with the center loss for WS-DAN. The plain model has no views.
    confidence, smoothing: of the soft distance.
    center_weight, center_rate: of WS-DAN's center loss, and how far a center moves in a step.
    class_weights: of every cross entropy: "none", "balanced", or one number per class, in order.
    """

    name: Literal["published", "soft_distance", "cross_entropy"] = "published"
    confidence: float = 0.7
    smoothing: float = 0.01
    center_weight: float = 1.0
    center_rate: float = 0.05
    class_weights: Literal["none", "balanced"] | list[float] = "none"


@dataclass
class OptimConfig:
    """Optimizer and learning-rate schedule; epochs may be fractions for `warmup_epochs`."""

    name: Literal["sgd", "adamw"] = "sgd"
    lr: float = 1e-3
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 5e-4
    decay_norms: bool = True
    betas: tuple[float, float] = (0.9, 0.999)
    schedule: Literal["step", "cosine", "constant"] = "step"
    milestones: tuple[int, ...] = (75, 125)
    gamma: float = 0.1
    warmup_epochs: float = 0.0
    final_lr: float = 0.0
    clip_norm: float | None = None


@dataclass
class TrainConfig:
    """Length, precision, device, and what is written how often (steps; 0: at epochs' ends only).

    views: "separate" passes the three views through the network one by one, each with its own
        batch statistics, as published; "merged" passes them as one batch of three times the size,
        with common statistics.
    precision: of the forward passes; "tf32" is float32 whose products may run in TF32 on a GPU.
    recompute: the backbone's activations are computed again in the backward instead of being kept.
    compile: torch.compile for the backbone.
    cuda_graph: on a GPU, record the step in a CUDA graph; a line says so where that does not go.
    batch_size: images of a step, which all processes share.
    sync_batchnorm: where several processes train on GPUs, batch statistics are those of all of
        them; otherwise each process normalizes by its own images.
    images_on_device: keep all images on the GPU; "auto" does where they take less than half of it.
    """

    epochs: int = 150
    batch_size: int = 16
    eval_batch_size: int = 32
    seed: int = 0
    device: str = "auto"
    kernels: str = "auto"
    views: Literal["separate", "merged"] = "separate"
    precision: Literal["float32", "tf32", "bfloat16", "float16"] = "float32"
    channels_last: bool = False
    recompute: bool = False
    compile: bool = False
    cuda_graph: bool = True
    images_on_device: Literal["auto", "on", "off"] = "auto"
    sync_batchnorm: bool = False
    deterministic: bool = False
    monitor: Literal["accuracy", "balanced_accuracy", "loss"] = "accuracy"
    log_interval: int = 20
    checkpoint_interval: int = 0
    tensorboard: bool = True
    overlays: int = 16


@dataclass
class Config:
    """A whole run."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    views: ViewsConfig = field(default_factory=ViewsConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def to_dict(self) -> dict[str, Any]:
        """Nested plain types (tuples as lists), fit for YAML, JSON and `torch.load`."""
        plain: dict[str, Any] = _plain(asdict(self))
        return plain

    def flat(self) -> dict[str, Any]:
        """Dotted key -> plain value."""
        return {key: _plain(_get(self, key)) for key in valid_keys()}

    def validate(self) -> Config:
        """Check ranges. Raises `ConfigError` that names key, value and what was expected."""
        for keys, holds, expected in RANGES:
            for key in keys.split():
                value = _get(self, key)
                if value is not None and not holds(value):
                    raise ConfigError(f"{key}={_plain(value)}: expected {expected}")
        if self.data.fold >= self.data.folds:
            raise ConfigError(
                f"data.fold={self.data.fold}: expected 0 to data.folds - 1 = {self.data.folds - 1}"
            )
        return self


def valid_keys(cls: type = Config, prefix: str = "") -> list[str]:
    """Every dotted leaf key."""
    keys: list[str] = []
    hints = get_type_hints(cls)
    for item in fields(cls):
        if is_dataclass(hints[item.name]):
            keys += valid_keys(hints[item.name], f"{prefix}{item.name}.")
        else:
            keys.append(prefix + item.name)
    return keys


def resolve_key(key: str) -> str:
    """Full dotted name of `key`, which may lack leading sections where it stays unique."""
    keys = valid_keys()
    if key in keys:
        return key
    matches = [full for full in keys if full.endswith("." + key)]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise ConfigError(f"key {key!r} stands in several sections: say {' or '.join(matches)}")
    raise ConfigError(f"unknown key {key!r}; {_nearest(key, keys)}")


def _nearest(key: str, keys: list[str]) -> str:
    """The closest full name, comparing short keys with leaves and dotted keys with whole names."""
    by_leaf: dict[str, str] = {full.rsplit(".", 1)[1]: full for full in reversed(keys)}
    if key.rsplit(".", 1)[-1] in by_leaf:  # the right name in the wrong section
        return f"did you mean {by_leaf[key.rsplit('.', 1)[-1]]!r}?"
    pool = {full: full for full in keys} | ({} if "." in key else by_leaf)
    close = difflib.get_close_matches(key, pool, n=1, cutoff=0.5)
    if not close and "." in key:
        close = difflib.get_close_matches(key.rsplit(".", 1)[1], by_leaf, n=1, cutoff=0.5)
        pool = by_leaf
    if close:
        return f"did you mean {pool[close[0]]!r}?"
    return "valid sections: " + ", ".join(sorted({full.split(".")[0] for full in keys}))


def load_config(
    file: str | Path | None = None,
    overrides: Iterable[str] = (),
    *,
    base: Config | None = None,
) -> Config:
    """`base` (else the published recipe), then a YAML file, then `key=value` pairs.

    `file` is a path or the name of a packaged configuration. A pair `model=NAME` applies a packaged
    model, or the YAML file of that path, before the other pairs. Warns of keys that a user's own
    file or pairs set and the chosen model, loss or optimizer never reads. Raises `ConfigError`.
    """
    config = base if base is not None else Config()
    chosen: list[str] = []
    if file is not None:
        chosen += _apply_file(config, _find(file, packaged_configs()), where=str(file))
    pairs = [_pair(text) for text in overrides]
    for key, text in pairs:
        if key == "model":
            path = _find(text, packaged_models(), "model")
            chosen += _apply_file(config, path, where=f"model={text}")
    for key, text in pairs:
        if key != "model":
            chosen.append(resolve_key(key))
            _set(config, chosen[-1], text, where="command line", from_text=True)
    config.validate()
    for key, why in unread_keys(config).items():
        if key in chosen:
            _log.warning("%s=%s has no effect: %s", key, _plain(_get(config, key)), why)
    return config


def _apply_file(config: Config, path: Path, *, where: str) -> list[str]:
    """Set what a file says; returns its keys where a user wrote it, no run nor this package."""
    keys = apply_mapping(config, _read_yaml(path), where=where)
    return [] if path.is_relative_to(_PACKAGED) or is_of_run(path) else keys


def _pair(text: str) -> tuple[str, str]:
    key, separator, value = text.partition("=")
    if not separator or not key:
        raise ConfigError(f"{text!r} is not of the form key=value")
    return key.strip(), value.strip()


def named_source(overrides: Iterable[str]) -> str | None:
    """The image source that `key=value` pairs choose, the last one where several do."""
    found = None
    for pair in overrides:
        key, _, value = pair.partition("=")
        if key.strip() in ("source", "data.source"):
            found = value.strip()
    return found


def packaged_configs() -> dict[str, Path]:
    """Name -> path of the recipes that come with the package."""
    return _yaml_files(_PACKAGED)


def packaged_models() -> dict[str, Path]:
    """Name -> path of the models that come with the package, for `model=NAME`."""
    return _yaml_files(_PACKAGED / "model")


def _yaml_files(folder: Path) -> dict[str, Path]:
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def dump_yaml(config: Config) -> str:
    """The configuration as YAML, opened by the mark that tells a run's folder."""
    body = yaml.safe_dump(config.to_dict(), sort_keys=False, default_flow_style=False)
    return f"{RUN_MARK}: every value that this run used\n{body}"


def is_of_run(path: Path) -> bool:
    """True for the config.yaml that a run wrote."""
    try:
        with path.open(encoding="utf-8") as file:
            return file.readline().startswith(RUN_MARK)
    except (OSError, UnicodeDecodeError):
        return False


def apply_mapping(config: Config, values: Mapping[str, Any], *, where: str) -> list[str]:
    """Set nested or dotted keys of `values` on `config` in place; returns their full names."""
    keys = []
    for key, value in _flatten(values, where):
        try:
            full = resolve_key(key)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None
        _set(config, full, value, where=where)
        keys.append(full)
    return keys


def _flatten(values: Any, where: str, prefix: str = "") -> list[tuple[str, Any]]:
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where}: {prefix.rstrip('.') or 'the file'} must hold keys and values")
    sections = {key.rsplit(".", n)[0] for key in valid_keys() for n in range(1, key.count(".") + 1)}
    pairs: list[tuple[str, Any]] = []
    for key, value in values.items():
        full = f"{prefix}{key}"
        if full in sections:
            pairs += _flatten(value if value is not None else {}, where, full + ".")
        else:
            pairs.append((full, value))
    return pairs


def _find(file: str | Path, packaged: Mapping[str, Path], what: str = "configuration") -> Path:
    path = Path(file)
    if path.is_file():
        return path
    if str(file) in packaged:
        return packaged[str(file)]
    raise ConfigError(f"no {what} file {path}; packaged ones: {', '.join(packaged)}")


def _read_yaml(path: Path) -> Any:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path} cannot be read as YAML: {error}") from error
    return {} if values is None else values


def _get(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = getattr(config, part)
    return config


def _set(config: Any, key: str, value: Any, *, where: str, from_text: bool = False) -> None:
    *sections, leaf = key.split(".")
    target = _get(config, ".".join(sections)) if sections else config
    hint = get_type_hints(type(target))[leaf]
    try:
        typed = coerce(value, hint, from_text=from_text)
    except (TypeError, ValueError, yaml.YAMLError):
        raise ConfigError(f"{where}: {key}={value!r}: expected {describe(hint)}") from None
    try:
        changed = replace(target, **{leaf: typed})
    except ValueError as error:
        raise ConfigError(f"{where}: {key}={value!r}: {error}") from None
    *outer, section = sections
    setattr(_get(config, ".".join(outer)) if outer else config, section, changed)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
