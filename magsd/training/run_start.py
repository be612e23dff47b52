"""What is looked at and written in a run's folder before its first step."""

from __future__ import annotations

from typing import Any

from magsd.config import Config
from magsd.data.run_data import RunData
from magsd.distributed import note_launch
from magsd.errors import ConfigError, RunError
from magsd.outputs import check_file
from magsd.reporting.predictions import is_predictions
from magsd.training.checkpoint import load_checkpoint
from magsd.training.run_folder import RunFolder

# What the stored state depends on; any other value may change when a run resumes.
FIXED_ON_RESUME = (
    "model.",
    "data.image_size",
    "data.clahe",
    "data.folds",
    "data.fold",
    "data.split",
    "data.test",
    "data.shuffle_buffer",
    "train.seed",
    "train.batch_size",
    "train.ema",
    "train.monitor",  # the best so far was found by it
    "optim.name",
    "optim.decay_norms",
)


def claim(folder: RunFolder, config: Config, *, resume: bool, overwrite: bool) -> None:
    """Raises where the run cannot be resumed, or where the folder is not free for it."""
    if resume:
        folder.require_run()
        check_file(folder.predictions, "--out", is_own=is_predictions)
        _check_resumable(folder.load_config(), config)
        folder.lock()
    else:
        folder.require_apart(config.data.source)
        folder.require_free(overwrite=overwrite)


def begin(
    folder: RunFolder,
    config: Config,
    data: RunData,
    *,
    resume: bool,
    overwrite: bool,
) -> None:
    """Write what a run's folder holds before its first step."""
    if resume:
        folder.write_config(config)
        # They are of the best weights so far, and those may change.
        for path in (folder.predictions, folder.operating, folder.evaluation):
            path.unlink(missing_ok=True)
    else:
        folder.lock()
        folder.create(config, overwrite=overwrite)
    note_launch(folder.root)
    if not folder.split.is_file():
        data.write_split(folder.split)


def stored_state(folder: RunFolder) -> dict[str, Any] | None:
    """What `--resume` starts from, or None for a run that ended before its first checkpoint."""
    if not folder.last.is_file() and folder.best.is_file():
        raise RunError(
            f"no checkpoint at {folder.last}, from which a run resumes; {folder.best} is there and "
            "can be evaluated. Put back a copy of the first, or start again in another --out"
        )
    return load_checkpoint(folder.last) if folder.last.is_file() else None


def _check_resumable(before: Config, now: Config) -> None:
    """Raises `ConfigError` if a value differs on which the stored state depends."""
    changed = [
        text for key, text in changed_values(before, now).items() if key.startswith(FIXED_ON_RESUME)
    ]
    if changed:
        raise ConfigError(f"a resumed run cannot change: {'; '.join(changed)}")


def changed_values(before: Config, now: Config) -> dict[str, str]:
    """Dotted key of each value that differs -> what it was and what it is now, in words."""
    old, new = before.flat(), now.flat()
    keys = [key for key in old | new if key not in old or key not in new or old[key] != new[key]]
    return {key: f"{key} was {old.get(key)}, now {new.get(key)}" for key in keys}
