"""Which runs a cross-validation consists of, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from magsd.config import Config, load_config
from magsd.crossval.plan import plan_runs
from magsd.errors import ConfigError


@pytest.fixture
def base() -> Config:
    return load_config("phantom")


def test_seed_chooses_partition_and_training_for_all_models(base: Config, tmp_path: Path) -> None:
    (tmp_path / "three-scales.yaml").write_text("model:\n  scales: 3\noptim.lr: 0.5\n")
    models = ["plain", str(tmp_path / "three-scales.yaml")]
    runs = plan_runs(tmp_path, base, models, seeds=(4, 7), folds=(0, 2), overrides=["lr=0.25"])
    places = [(run.seed, run.fold, run.model) for run in runs]
    assert places == [(s, f, m) for s in (4, 7) for f in (0, 2) for m in ("plain", "three-scales")]
    for run in runs:
        data, train = run.config.data, run.config.train
        assert (data.split_seed, train.seed, data.fold) == (run.seed, run.seed, run.fold)
        assert run.folder.root == tmp_path / run.model / f"seed{run.seed}" / f"fold{run.fold}"
        assert run.config.optim.lr == 0.25  # pairs come after the model's file
    assert [runs[0].config.model.name, runs[1].config.model.name] == ["plain", "magsd"]
    assert runs[1].config.model.scales == 3
    assert base == load_config("phantom")


def test_all_folds_by_default(base: Config, tmp_path: Path) -> None:
    runs = plan_runs(tmp_path, base, ["plain"], overrides=["folds=3"])
    assert [run.fold for run in runs] == [0, 1, 2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"models": []}, "at least one model"),
        ({"models": ["plain", "plain"]}, "a model plain already"),
        ({"models": ["nothing"]}, "nothing"),
        ({"models": ["missing.yaml"]}, r"missing\.yaml"),
        ({"folds": [0, 5]}, r"--folds 0,5: .*0 to 4"),
        ({"folds": []}, "--folds"),
        ({"seeds": [1, 1]}, "--seeds 1,1: expected different"),
        ({"seeds": [-1]}, "at least 0"),
        ({"overrides": ["fold=1"]}, r"data\.fold itself; use --folds"),
        ({"overrides": ["train.seed=1"]}, "--seeds"),
        ({"overrides": ["model.name=plain"]}, "--model"),
        ({"overrides": ["model=plain"]}, "--model"),
        ({"overrides": ["epoch=1"]}, "unknown key 'epoch'"),
        ({"overrides": ["data.test=csv:x.csv"]}, "cross-validation tests on its own folds"),
        (
            {"models": ["plain", "wsdan"], "overrides": ["level=-2", "scales=3"]},
            r"model\.scales=3 has no effect: .* only magsd reads it",
        ),
        ({"overrides": ["momentum=0.5"]}, r"optim\.momentum=0\.5 has no effect: .*adamw"),
    ],
)
def test_refusals(changes: dict, message: str, base: Config, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_runs(**({"out": tmp_path, "base": base, "models": ["plain"]} | changes))


def test_model_file_of_any_name_keeps_its_runs_in_the_folder(base: Config, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("model.scales: 1\n")
    (run, *_) = plan_runs(tmp_path / "out", base, [str(tmp_path / "mine")])
    assert (run.model, run.config.model.scales) == ("mine", 1)
    assert run.folder.root == tmp_path / "out" / "mine" / "seed0" / "fold0"


def test_models_must_share_their_folds(base: Config, tmp_path: Path) -> None:
    (tmp_path / "other.yaml").write_text("data.folds: 3\n")
    models = ["plain", str(tmp_path / "other.yaml")]
    with pytest.raises(ConfigError, match=r"data\.folds is 5 for plain, 3 for other"):
        plan_runs(tmp_path / "out", base, models)
    assert plan_runs(tmp_path / "out", base, models, overrides=["folds=4"])


def test_folder_of_a_run_with_two_sides(base: Config, tmp_path: Path) -> None:
    """One of before there was a test side is refused, and goes on with data.test=none."""
    (run, *_) = plan_runs(tmp_path, base, ["plain"])
    run.folder.create(run.config, overwrite=False)
    text = run.folder.config.read_text()
    assert "  test: folds\n" in text
    run.folder.config.write_text(text.replace("  test: folds\n", ""))
    with pytest.raises(ConfigError, match=r"data\.test was none, now folds"):
        plan_runs(tmp_path, base, ["plain"])
    assert plan_runs(tmp_path, base, ["plain"], overrides=["data.test=none"])


def test_folder_of_another_configuration(base: Config, tmp_path: Path) -> None:
    (run, *_) = plan_runs(tmp_path, base, ["plain"])
    run.folder.create(run.config, overwrite=False)
    assert plan_runs(tmp_path, base, ["plain"], overrides=["train.device=cpu"])
    with pytest.raises(ConfigError, match=r"fold0 holds .*optim\.lr was 0\.003, now 1\.0"):
        plan_runs(tmp_path, base, ["plain"], overrides=["lr=1"])


def test_a_pair_goes_to_the_models_that_read_it(base: Config, tmp_path: Path) -> None:
    pairs = ["attention_maps=4", "level=-2", "optim.name=sgd", "momentum=0.5", "padding=0.3"]
    models = ["plain", "magsd", "wsdan"]
    runs = plan_runs(tmp_path, base, models, folds=(0,), overrides=pairs)
    plain, magsd, wsdan = (run.config.flat() for run in runs)
    assert not {"model.attention_maps", "model.level", "views.padding"} & set(plain)
    assert (magsd["model.attention_maps"], magsd["views.padding"]) == (4, 0.3)
    assert (wsdan["model.attention_maps"], wsdan["model.level"]) == (4, -2)
    assert {each["optim.momentum"] for each in (plain, magsd, wsdan)} == {0.5}


def test_a_models_own_file_must_be_read(base: Config, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("model: {name: plain, fusion: up}\n")
    with pytest.raises(ConfigError, match=r"mine\.yaml: model\.fusion=up has no effect"):
        plan_runs(tmp_path / "out", base, ["magsd", str(tmp_path / "mine.yaml")])
