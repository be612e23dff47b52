"""Which runs a cross-validation consists of, and that they can be compared.

The folds are stratified by class and keep a patient's images together (`split_by_patient`). A fold
is a run's test side, and its epoch is selected on a part of the other images; with data.test=none
the fold is the validation side, on which the epoch is selected, too. A seed chooses both the
partition into folds (`data.split_seed`) and everything random in training (`train.seed`), so that
several seeds are repeated k-fold cross-validation. All models train on the same partitions: their
runs pair up by seed and fold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from magsd.config import Config, load_config, resolve_key
from magsd.errors import ConfigError
from magsd.training.run_folder import RunFolder
from magsd.training.run_start import changed_values

# What the plan sets itself, with the option that says so.
_SET_HERE = {
    "data.fold": "--folds",
    "data.split": "--folds",
    "data.split_seed": "--seeds",
    "train.seed": "--seeds",
    "model.name": "--model",
}
# On these the images and the partition depend, which all models must share.
_SHARED = ("data.source", "data.test", "data.folds", "data.skip_bad")
# What may differ between calls: it changes where and how a run is computed, not what.
_FREE = (
    "data.cache_dir",
    "train.checkpoint_interval",
    "train.cuda_graph",
    "train.device",
    "train.eval_batch_size",
    "train.images_on_device",
    "train.kernels",
    "train.log_interval",
    "train.overlays",
    "train.recompute",
    "train.tensorboard",
)


@dataclass(frozen=True)
class PlannedRun:
    """One training: `config` holds everything, `model` is its name in tables."""

    model: str
    seed: int
    fold: int
    folder: RunFolder
    config: Config

    @property
    def title(self) -> str:
        """The run in words."""
        return f"{self.model}, seed {self.seed}, fold {self.fold}"


def plan_runs(
    out: str | Path,
    base: Config,
    models: Sequence[str],
    *,
    seeds: Sequence[int] = (0,),
    folds: Sequence[int] | None = None,
    overrides: Sequence[str] = (),
) -> list[PlannedRun]:
    """The runs in the order in which they are trained: by seed, then fold, then model.

    models: as `model=` takes them: names of packaged models, or YAML files, applied over `base`.
    folds: which of the `data.folds` parts; None for all. overrides: key=value pairs, which come
    last; each goes to the models that read it. Raises `ConfigError` for what cannot be compared or
    run, for a pair that no model reads, and where a folder holds a run of another configuration.
    """
    _check_overrides(overrides)
    configs = _model_configs(base, models, overrides)
    _check_read(base, models, overrides, configs)
    _check_shared(configs)
    count = next(iter(configs.values())).data.folds
    chosen = list(range(count)) if folds is None else list(folds)
    _check_numbers("--seeds", seeds)
    _check_numbers("--folds", chosen, below=count)
    runs = [
        PlannedRun(
            model,
            seed,
            fold,
            RunFolder(Path(out) / model / f"seed{seed}" / f"fold{fold}"),
            _of_fold(config, seed, fold),
        )
        for seed in seeds
        for fold in chosen
        for model, config in configs.items()
    ]
    for run in runs:
        _check_unchanged(run)
    return runs


def _model_configs(
    base: Config, models: Sequence[str], overrides: Sequence[str]
) -> dict[str, Config]:
    """Name in tables and folders -> configuration, in the given order."""
    configs: dict[str, Config] = {}
    for model in models:
        # Never a path, which would lead out of the folder of the cross-validation.
        name = Path(model).name.removesuffix(".yaml").removesuffix(".yml")
        if name in configs:
            raise ConfigError(f"--model {model}: there is a model {name} already; rename the file")
        configs[name] = load_config(None, [f"model={model}"], base=base, shared=overrides)
    if not configs:
        raise ConfigError("cross-validation needs at least one model: --model NAME")
    return configs


def _of_fold(config: Config, seed: int, fold: int) -> Config:
    pairs = [
        "data.split=folds",
        f"data.split_seed={seed}",
        f"train.seed={seed}",
        f"data.fold={fold}",
    ]
    return load_config(None, pairs, base=config)


def _check_overrides(overrides: Sequence[str]) -> None:
    for pair in overrides:
        key = pair.partition("=")[0].strip()
        for full, option in _SET_HERE.items():
            # A bare "model" is what --model takes.
            if key in (full, full.partition(".")[2]) or (key, full) == ("model", "model.name"):
                raise ConfigError(f"{pair}: cross-validation sets {full} itself; use {option}")


def _check_read(
    base: Config, models: Sequence[str], overrides: Sequence[str], configs: dict[str, Config]
) -> None:
    """Raises `ConfigError` for a pair that no model reads."""
    for pair in overrides:
        key = pair.partition("=")[0].strip()
        if not any(
            resolve_key(key, config.model.name) in config.flat() for config in configs.values()
        ):
            # As the only model's own pair, whose error says which models read it.
            load_config(None, [f"model={models[0]}", pair], base=base, shared=overrides)


def _check_shared(configs: dict[str, Config]) -> None:
    (first, reference), *others = configs.items()
    wanted = reference.flat()
    if reference.data.test not in ("folds", "none"):
        raise ConfigError(
            f"data.test={reference.data.test}: cross-validation tests on its own folds; say"
            " data.test=folds, or data.test=none to select and to measure on the same fold"
        )
    for name, config in others:
        values = config.flat()
        for key in _SHARED:
            if values[key] != wanted[key]:
                raise ConfigError(
                    f"models must share their folds: {key} is {wanted[key]} for {first}, "
                    f"{values[key]} for {name}; set it for all of them by {key}=VALUE"
                )


def _check_numbers(option: str, numbers: Sequence[int], below: int | None = None) -> None:
    wrong = [n for n in numbers if n < 0 or (below is not None and n >= below)]
    if wrong or not numbers or len(set(numbers)) < len(numbers):
        limits = "of at least 0" if below is None else f"from 0 to {below - 1}"
        given = ",".join(map(str, numbers))
        raise ConfigError(f"{option} {given}: expected different whole numbers {limits}")


def _check_unchanged(run: PlannedRun) -> None:
    if not run.folder.is_run():
        return
    values = changed_values(run.folder.load_config(), run.config)
    changed = [text for key, text in values.items() if key not in _FREE]
    if changed:
        raise ConfigError(
            f"{run.folder.root} holds a run of another configuration: {'; '.join(changed)}; "
            "choose another --out, or remove that folder"
        )
