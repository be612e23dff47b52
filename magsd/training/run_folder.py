"""A run's folder: what lies where, and the care not to mix or lose runs."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

from magsd.config import Config, dump_yaml, is_of_run, load_config
from magsd.errors import RunError
from magsd.outputs import check_folder, disk_errors, remove_leftovers, write_atomically
from magsd.paths import expand

_OWN = (
    "config.yaml",
    "split.csv",
    "metrics.csv",
    "checkpoints",
    "tensorboard",
    "plots",
    "overlays",
    "evaluation.json",
    "predictions.csv",
    "operating.json",
)


class RunFolder:
    """Paths of a run under `root`."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self.config = self.root / "config.yaml"
        self.split = self.root / "split.csv"
        self.metrics = self.root / "metrics.csv"
        self.checkpoints = self.root / "checkpoints"
        self.last = self.checkpoints / "last.pt"
        self.best = self.checkpoints / "best.pt"
        self.tensorboard = self.root / "tensorboard"
        self.plots = self.root / "plots"
        self.overlays = self.root / "overlays"
        self.evaluation = self.root / "evaluation.json"
        self.predictions = self.root / "predictions.csv"
        self.operating = self.root / "operating.json"
        self._lock: Any = None

    def is_run(self) -> bool:
        """True if a run of this project wrote the folder."""
        return is_of_run(self.config)

    def require_run(self) -> None:
        """Raises `RunError` if no run lies here."""
        if not self.is_run():
            raise RunError(f"{self.root} holds no run (no config.yaml written by `magsd train`)")

    def load_config(self) -> Config:
        """The configuration that the run used."""
        self.require_run()
        return load_config(self.config)

    def require_free(self, *, overwrite: bool) -> None:
        """Raises `RunError` if another run lies here, unless `overwrite`, or files of its names."""
        check_folder(self.root, "--out")
        present = self._present()
        if present and not self.is_run():
            raise RunError(
                f"{self.root} holds {', '.join(present)}, not written by `magsd train`; "
                "choose another --out"
            )
        # A run that ended before its first checkpoint (a wrong path, say) has nothing to lose.
        if present and not overwrite and (self.last.exists() or self.best.exists()):
            raise RunError(
                f"{self.root} holds another run; continue it with --resume, replace it with "
                "--overwrite, or choose another --out"
            )

    def require_apart(self, source: str) -> None:
        """Raises `RunError` where the run's pictures would be taken for images of a source."""
        kind, _, place = source.partition(":")
        if kind == "folder" and self.root.resolve().is_relative_to(expand(place).resolve()):
            raise RunError(
                f"--out {self.root}: lies within {source}, where its pictures would be taken for"
                " images; choose a folder elsewhere"
            )

    def create(self, config: Config, *, overwrite: bool) -> None:
        """Make the folder and write config.yaml.

        Raises `RunError` as `require_free`. With `overwrite` a run's own files are removed, never
        anything else.
        """
        self.require_free(overwrite=overwrite)
        self.root.mkdir(parents=True, exist_ok=True)
        for name in self._present():
            path = self.root / name
            # config.yaml marks the folder as a run and stays until the new one replaces it: after
            # a kill in between, the rest can still be overwritten.
            if path != self.config:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        self.write_config(config)

    def _present(self) -> list[str]:
        return [name for name in _OWN if (self.root / name).exists()]

    def write_config(self, config: Config) -> None:
        """Write config.yaml, atomically."""
        text = dump_yaml(config).encode()
        write_atomically(self.config, lambda file: file.write(text))

    def lock(self) -> None:
        """Keep a second process out for as long as this one lives.

        Raises `RunError` if another process trains here.
        """
        try:
            import fcntl
        except ImportError:  # no such locks on this platform
            return
        check_folder(self.root, "--out")
        self.root.mkdir(parents=True, exist_ok=True)
        with disk_errors(self.root, "free some space"):
            self._lock = open(self.root / ".lock", "w")  # noqa: SIM115 (held until unlock)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.unlock()
            raise RunError(f"another process is training in {self.root}") from None
        except OSError:  # a file system without locks
            self.unlock()
            return
        remove_leftovers(self.checkpoints)
        remove_leftovers(self.root)

    def unlock(self) -> None:
        """Let other processes in; the end of the process does the same."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def default_run_folder(source: str, root: Path = Path("runs")) -> Path:
    """A folder under `runs/` that does not exist yet, named after the source and the time."""
    kind = source.partition(":")[0] or "run"
    base = root / f"{kind}-{time.strftime('%Y%m%d-%H%M%S')}"
    path, number = base, 2
    while path.exists():
        path = base.with_name(f"{base.name}-{number}")
        number += 1
    return path
