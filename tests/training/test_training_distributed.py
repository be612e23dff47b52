"""Several processes train as one does: the same images, gradients, figures, and no file twice."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

from magsd.cli import train
from magsd.config import Config, LossConfig, ViewsConfig, load_config
from magsd.data import BatchLoader, Part, share_bounds, split_by_patient
from magsd.errors import ConfigError, DataError
from magsd.models import ModelConfig, build_model
from magsd.training import load_run
from magsd.training.checkpoint import load_checkpoint
from magsd.training.distributed import (
    Team,
    note_launch,
    restarted,
    synchronise_batchnorm,
    team_of,
)
from magsd.training.metrics_log import COLUMNS, MetricsLog, read_metrics
from magsd.training.precision import Precision
from magsd.training.progress import TrainingProgress
from magsd.training.run import open_images, plain_loader, precision_of, train_run, training_loader
from magsd.training.run_folder import RunFolder
from magsd.training.signals import StopRequest
from magsd.training.step import Share, make_step
from magsd.training.trainer import Interrupted, Trainer
from magsd.training.validation import validate
from magsd_kernels import AttentionViews

IMAGES = 12  # of the small run's training set
STEPS = 3  # its epoch

#: One process dies, or gets a signal, in the step after AT steps; on the first try only.
BROKEN = """
import os, signal
from magsd.training.trainer import Trainer
step = Trainer._one_step
def one_step(self, *arguments):
    first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    if first and self.team.rank == 1 and self.global_step == int(os.environ["AT"]):
        if os.environ["WHAT"] == "die":
            os._exit(1)
        os.kill(os.getpid(), int(os.environ["WHAT"]))
    step(self, *arguments)
Trainer._one_step = one_step
from magsd.cli import main
main()
"""

#: What `save_gradients` below is called by.
GRADIENTS = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_training_distributed import save_gradients
save_gradients(*sys.argv[1:])
"""


def torchrun(
    program: list[str], *, options: tuple[str, ...] = (), **environment: object
) -> subprocess.CompletedProcess[str]:
    """Two processes of a program; the options are torchrun's."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *options]
    return subprocess.run(
        [sys.executable, *launcher, *program],
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "COLUMNS": "200",
            "PYTHONPATH": os.pathsep.join(sys.path),
            **{name: str(value) for name, value in environment.items()},
        },
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def train_on_two(
    arguments: list[str], *, script: Path | None = None, **how: Any
) -> subprocess.CompletedProcess[str]:
    program = ["-m", "magsd"] if script is None else [str(script)]
    return torchrun([*program, "train", *arguments], **how)


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    path = tmp_path / "broken.py"
    path.write_text(BROKEN)
    return path


@pytest.fixture(scope="module")
def two(small_pairs: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A whole run of two processes, and what it printed."""
    out = tmp_path_factory.mktemp("two") / "run"
    done = train_on_two(["--out", str(out), *small_pairs])
    assert done.returncode == 0, done.stdout + done.stderr
    return out, done.stdout + done.stderr


# What each process does alone.


@pytest.fixture(scope="module")
def images(small_pairs: list[str]):
    config = load_config(None, small_pairs)
    return open_images(config, config.data.source)


@pytest.mark.parametrize("ranks", [2, 3])
def test_parts_of_a_batch_are_the_batch(ranks: int, images, small_config) -> None:
    """Order, labels, and every augmented pixel."""
    classes, cache = images
    config = small_config("batch_size=8")
    whole = training_loader(config, cache, list(range(22)), classes)
    parts = [
        training_loader(config, cache, list(range(22)), classes, Team(rank, ranks))
        for rank in range(ranks)
    ]
    assert {len(part) for part in parts} == {len(whole)} == {3}
    for batch, *own in zip(whole.epoch(1), *(part.epoch(1) for part in parts), strict=True):
        assert [i for part in own for i in part.indices] == batch.indices
        assert all(len(part.indices) >= 2 for part in own)
        assert torch.equal(torch.cat([part.labels for part in own]), batch.labels)
        assert torch.equal(torch.cat([part.images for part in own]), batch.images)
        for part in own:
            assert part.places == batch.places
            first = part.part.first
            assert batch.indices[first : first + len(part.indices)] == part.indices


def test_a_last_batch_too_small_for_all_is_left_out(images, small_config) -> None:
    classes, cache = images
    config = small_config("batch_size=8")

    def steps(count: int, size: int) -> int:
        return len(training_loader(config, cache, list(range(count)), classes, Team(0, size)))

    assert [steps(count, 1) for count in (8, 9, 10)] == [1, 1, 2]
    assert [steps(count, 2) for count in (8, 11, 12)] == [1, 1, 2]
    with pytest.raises(DataError, match="5 training images for 3 processes: expected at least 6"):
        steps(5, 3)


def test_bounds_share_everything_once() -> None:
    for count in range(12):
        for ranks in (1, 2, 5):
            bounds = [share_bounds(count, rank, ranks) for rank in range(ranks)]
            assert [i for ends in bounds for i in range(*ends)] == list(range(count))
            sizes = [last - first for first, last in bounds]
            assert max(sizes) - min(sizes) <= 1


def small_model(name: str, backbone: str = "test_resnet") -> nn.Module:
    config = ModelConfig(name=name, backbone=backbone, pretrained=False, attention_maps=4)
    return build_model(config, 4)


@pytest.mark.parametrize("name", ["magsd", "plain"])
def test_a_part_without_weight_takes_part_without_a_nan(name: str) -> None:
    """All its images are of a class of weight 0: 0 / 0 for it, nothing for the whole batch."""
    model = small_model(name)
    step = make_step(name, ViewsConfig(), LossConfig(), torch.tensor([0.0, 1, 1, 1]))
    labels = torch.zeros(2, dtype=torch.int64)
    share = Share(Part(2, 6), 0.0, 2 / 3)
    images = torch.randn(2, 1, 48, 48)
    result = step(model, images, labels, torch.Generator().manual_seed(0), share)
    assert float(result.cross_entropy) == 0
    result.loss.backward()
    gradients = [p.grad for p in model.parameters()]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
    alone = step(model, images, labels, torch.Generator().manual_seed(0))
    assert alone.cross_entropy.isnan()


def test_views_of_given_uniforms() -> None:
    attention = torch.rand(5, 4, 6, 6)
    views = AttentionViews()
    drawn = views.draw(attention, torch.Generator().manual_seed(3))
    uniforms = torch.rand(5, 8, generator=torch.Generator().manual_seed(3))
    for one, other in zip(drawn, views.draw(attention, uniforms=uniforms), strict=True):
        assert torch.equal(one, other)
    some = views.draw(attention[2:4], uniforms=uniforms[2:4])
    assert all(torch.equal(a[2:4], b) for a, b in zip(drawn, some, strict=True))
    with pytest.raises(ValueError, match=r"AttentionViews: uniforms must have shape \(5, 8\)"):
        views.draw(attention, uniforms=uniforms[:4])


@pytest.mark.parametrize("backbone", ["test_resnet", "test_efficientnet"])
def test_synchronised_batch_norms_keep_activations_and_names(backbone: str) -> None:
    """timm's fused norms hold an activation that torch's own conversion drops."""
    model = small_model("magsd", backbone)
    names = list(model.state_dict())
    images = torch.randn(2, 1, 48, 48)
    before = model.eval()(images).logits
    synchronise_batchnorm(model)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert norms
    assert all(isinstance(norm, nn.SyncBatchNorm) for norm in norms)
    assert list(model.state_dict()) == names
    torch.testing.assert_close(model(images).logits, before)


# What torchrun says.


@pytest.fixture
def launch(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets what torchrun tells its processes."""

    def set_variables(name: str = "job", *, ranks: int = 1, restarts: int = 0) -> None:
        for key, value in {
            "TORCHELASTIC_RUN_ID": name,
            "TORCHELASTIC_RESTART_COUNT": restarts,
            "RANK": 0,
            "LOCAL_RANK": 0,
            "WORLD_SIZE": ranks,
        }.items():
            monkeypatch.setenv(key, str(value))

    return set_variables


@pytest.mark.parametrize("name", ["job", "none"])
def test_only_a_run_of_the_same_start_is_gone_on_with(name: str, tmp_path: Path, launch) -> None:
    alone = Team()
    launch(name)
    assert not restarted(alone, tmp_path)
    launch(name, restarts=1)
    assert not restarted(alone, tmp_path)
    note_launch(tmp_path)
    assert restarted(alone, tmp_path)
    launch(name)
    assert not restarted(alone, tmp_path)
    launch("another", restarts=1)
    assert not restarted(alone, tmp_path)


def test_nothing_is_noted_without_torchrun(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "8")  # of some other launcher: not ours
    note_launch(tmp_path)
    assert not list(tmp_path.iterdir())
    with team_of(load_config().train) as team:
        assert (team.rank, team.size, team.leads) == (0, 1, True)


def test_settings_that_several_processes_cannot_train_with(
    small_config: Callable[..., Config], launch
) -> None:
    launch(ranks=3)
    for pair, message in (
        ("batch_size=5", r"batch_size=5 is shared by 3 processes; .*at least 6"),
        ("sync_batchnorm=true", r"sync_batchnorm=true needs GPUs"),
    ):
        with pytest.raises(ConfigError, match=message), team_of(small_config(pair).train):
            pytest.fail("joined")
    with pytest.raises(ConfigError, match="under torchrun the run's folder must be given: --out"):
        train(out=None, config=None, data=None, kernels=None, overrides=[])


# Two processes against one.


def save_gradients(out: str, *pairs: str) -> None:
    """Train an epoch in float64 with fixed batch statistics; keep what each step gave."""
    kept = []
    for setting in SETTINGS:
        config = load_config(None, [*pairs, *setting])
        with team_of(config.train) as team:
            kept.append(one_epoch(config, team, Path(out)))
    if team.leads:
        torch.save(kept, out)


SETTINGS = (
    ("class_weights=[0.25, 3.0, 0.5, 1.0]",),
    ("class_weights=balanced", "views=merged"),
    ("model.name=plain", "class_weights=balanced"),
)


def one_epoch(config: Config, team: Team, folder: Path) -> dict[str, Any]:
    classes, cache = open_images(config, config.data.source)
    split = split_by_patient(cache.records, folds=2, seed=0)
    # An uneven set, so that the balanced weights differ: the last batch has five images.
    chosen = [i for i in split.train if cache.records[i].label != "normal"]
    chosen += [i for i in split.train if i not in chosen][:3]
    chosen = sorted(set(chosen))[:12]
    torch.manual_seed(team.rank)  # the leader's weights must reach the others
    trainer = Trainer(
        config,
        build_model(config.model, len(classes)).double(),
        training_loader(config, cache, chosen, classes, team),
        part_of_validation(config, cache, split.validation[:11], classes, team),
        RunFolder(folder),
        precision_of(config),
        team=team,
    )
    model = trainer.model.eval()
    model.train = lambda mode=True: model  # type: ignore[method-assign]
    one_step, gradients = trainer._one_step, []

    def recorded(images: torch.Tensor, labels: torch.Tensor) -> None:
        one_step(images.double(), labels)
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))

    trainer._one_step = recorded  # type: ignore[method-assign]
    progress = TrainingProgress(Console(quiet=True), 1, len(trainer.train_loader), 0)
    trainer._train_epoch(MetricsLog(None, None), progress, StopRequest())
    model.float()
    measured = validate(model, trainer.validation_loader, trainer.precision, team=team)
    return {"gradients": gradients, "figures": trainer.read_sums() | measured}


def part_of_validation(
    config: Config, cache: Any, indices: list[int], classes: tuple[str, ...], team: Team
) -> BatchLoader:
    first, last = share_bounds(len(indices), team.rank, team.size)
    return plain_loader(config, cache, indices[first:last], classes)


def test_gradients_of_two_are_those_of_one(tmp_path: Path, small_pairs: list[str]) -> None:
    pairs = [*small_pairs, "data.source=phantom:n=32,size=32", "batch_size=7"]
    script = tmp_path / "gradients.py"
    script.write_text(GRADIENTS)
    out = tmp_path / "two.pt"
    done = torchrun([str(script), str(out), *pairs])
    assert done.returncode == 0, done.stdout + done.stderr
    save_gradients(str(tmp_path / "one.pt"), *pairs)
    one, two = (torch.load(tmp_path / f"{name}.pt") for name in ("one", "two"))
    for wanted, found in zip(one, two, strict=True):
        assert len(wanted["gradients"]) == len(found["gradients"]) == 2
        for mine, other in zip(wanted["gradients"], found["gradients"], strict=True):
            assert float((mine - other).norm() / mine.norm()) < 1e-10
        for name, value in wanted["figures"].items():
            exact = name.endswith("accuracy") or name == "first_bad"
            bound = 0.0 if exact else 1e-6 if name.startswith("validation") else 1e-10
            assert found["figures"][name] == pytest.approx(value, rel=bound, abs=0.0), name


def counts(row: dict[str, str]) -> float:
    return float(row["train_accuracy"]) * IMAGES


def test_run_of_two(two: tuple[Path, str]) -> None:
    out, printed = two
    rows = read_metrics(out / "metrics.csv")
    assert tuple(rows[0]) == COLUMNS
    assert [(row["epoch"], row["step"]) for row in rows] == [("1", "3"), ("2", "6")]
    assert all(abs(counts(row) - round(counts(row))) < 1e-6 for row in rows)
    assert printed.count("epoch 2/2") == printed.count("best epoch") == 1
    assert "Warning" not in printed
    assert (out / "evaluation.json").is_file()
    names = {path.name for path in out.rglob("*") if path.is_file()}
    assert not [name for name in names if name.endswith(".part")]
    saved = load_checkpoint(out / "checkpoints" / "last.pt")
    assert (saved["epoch"], saved["global_step"]) == (2, 2 * STEPS)
    assert not [key for key in saved["model"] if key.startswith("module")]


def test_validation_of_two_is_that_of_its_checkpoint(two: tuple[Path, str]) -> None:
    """The best weights, measured by one process: the same sums, no image twice or left out."""
    out, _ = two
    run = load_run(out)
    row = read_metrics(out / "metrics.csv")[run.epoch - 1]
    _, cache = open_images(run.config, run.config.data.source)
    indices = split_by_patient(cache.records, folds=2, seed=0).validation
    loader = plain_loader(run.config, cache, indices, run.classes)
    measured = validate(run.model, loader, Precision(torch.device("cpu")))
    for name, value in measured.items():
        assert float(row[name]) == pytest.approx(value, rel=1e-5), name


def test_a_killed_process_ends_in_the_same_run(
    tmp_path: Path, broken: Path, two: tuple[Path, str], small_pairs: list[str], same_state
) -> None:
    """torchrun starts both again, and they go on from the first epoch's end."""
    out = tmp_path / "run"
    done = train_on_two(
        ["--out", str(out), *small_pairs],
        script=broken,
        options=("--max-restarts=1",),
        WHAT="die",
        AT=STEPS + 1,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "going on after epoch 1, step 0 of the next" in done.stdout
    for name in ("last.pt", "best.pt"):
        one, other = (load_checkpoint(run / "checkpoints" / name) for run in (two[0], out))
        # One process's generators, which several do not draw from.
        for state in (one, other):
            state.pop("config"), state.pop("random", None)
        same_state(one, other)


def test_a_signal_to_one_stops_both_and_one_goes_on(
    tmp_path: Path, broken: Path, small_pairs: list[str], small_config, console: Console
) -> None:
    out = tmp_path / "run"
    stopped = train_on_two(
        ["--out", str(out), *small_pairs], script=broken, WHAT=int(signal.SIGTERM), AT=0
    )
    assert stopped.returncode != 0
    assert stopped.stdout.count(f"--resume --out {out}") == 1, stopped.stdout + stopped.stderr
    saved = load_checkpoint(out / "checkpoints" / "last.pt")
    assert (saved["epoch"], saved["step"]) == (0, 2)  # where the sums are read
    train_run(small_config(), out, resume=True, console=console)
    check_rows(out)


def test_two_go_on_where_one_stopped(
    tmp_path: Path, small_pairs: list[str], small_config, console: Console, monkeypatch
) -> None:
    out = tmp_path / "run"
    one_step = Trainer._one_step

    def signalled(self: Trainer, *arguments: Any) -> None:
        if self.global_step == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        one_step(self, *arguments)

    monkeypatch.setattr(Trainer, "_one_step", signalled)
    with pytest.raises(Interrupted):
        train_run(small_config(), out, console=console)
    done = train_on_two(["--out", str(out), "--resume"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "going on after epoch 0, step 1 of the next" in done.stdout
    check_rows(out)


def check_rows(out: Path) -> None:
    """Both epochs are whole: every image counted once, whoever counted it."""
    rows = read_metrics(out / "metrics.csv")
    assert [(row["epoch"], row["step"]) for row in rows] == [("1", "3"), ("2", "6")]
    sums = load_checkpoint(out / "checkpoints" / "last.pt")["images_seen"]
    assert sums == 2 * IMAGES
    assert all(abs(counts(row) - round(counts(row))) < 1e-6 for row in rows)


def test_another_run_in_the_folder_is_neither_replaced_nor_gone_on_with(
    tmp_path: Path, two: tuple[Path, str], small_pairs: list[str]
) -> None:
    out = tmp_path / "run"
    shutil.copytree(two[0], out)
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    done = train_on_two(
        ["--out", str(out), *small_pairs, "epochs=3"], options=("--max-restarts=1",)
    )
    assert done.returncode != 0
    assert done.stderr.count("holds another run") == 2, done.stderr
    assert before == {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
