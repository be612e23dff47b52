"""Configuration: published defaults, overrides, refusals."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from magsd.config import (
    RUN_MARK,
    Config,
    dump_yaml,
    load_config,
    named_source,
    packaged_configs,
    packaged_models,
    resolve_key,
    valid_keys,
)
from magsd.errors import ConfigError
from magsd.methods import methods

BASELINES = ("plain", "resnet18", "resnet50", "vgg16", "inception_v3", "densenet121")


def test_defaults_are_the_published_recipe() -> None:
    config = Config()
    assert (config.optim.name, config.optim.lr, config.optim.momentum) == ("sgd", 1e-3, 0.9)
    assert (config.optim.nesterov, config.optim.weight_decay) == (True, 5e-4)
    assert (config.optim.schedule, config.optim.milestones, config.optim.gamma) == (
        "step",
        (75, 125),
        0.1,
    )
    assert (config.train.epochs, config.train.batch_size, config.data.image_size) == (150, 16, 224)
    assert (config.data.clahe, config.data.clahe_clip, config.data.clahe_tiles) == (True, 4.0, 4)
    assert (config.data.folds, config.model.backbone, config.model.pretrained) == (
        5,
        "resnet50",
        True,
    )
    assert (config.model.attention_maps, config.model.scales) == (32, 2)
    views = config.views
    assert (views.mixup_theta, views.dim_theta, views.patch_theta) == (
        (0.4, 0.6),
        (0.2, 0.5),
        (0.4, 0.6),
    )
    assert (views.padding, views.weight, views.floor) == (0.1, 0.4, 0.001)
    assert (config.loss.confidence, config.loss.smoothing) == (0.7, 0.01)
    augment = config.data.augment
    assert (augment.probability, augment.brightness, augment.contrast) == (0.5, 0.5, 0.7)
    assert (augment.rotation, augment.crop_scale, augment.crop_ratio) == (
        120.0,
        (0.6, 1.0),
        (0.75, 1.33),
    )


def test_published_file_states_the_defaults() -> None:
    assert load_config("published") == Config()


@pytest.mark.parametrize("name", sorted(packaged_configs()))
def test_packaged_files_load(name: str) -> None:
    assert load_config(name).validate() is not None


def test_phantom_is_small_and_needs_no_download() -> None:
    config = load_config("phantom")
    assert config.model.pretrained is False
    assert config.data.source.startswith("phantom")


def test_file_then_command_line(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("train:\n  epochs: 7\n  batch_size: 4\noptim.lr: 1e-4\n")
    config = load_config(file, ["epochs=9", "model.backbone_args={output_stride: 16}"])
    assert (config.train.epochs, config.train.batch_size, config.optim.lr) == (9, 4, 1e-4)
    assert config.model.backbone_args == {"output_stride": 16}


@pytest.mark.parametrize(
    ("pair", "key", "value"),
    [
        ("lr=1e-2", "optim.lr", 1e-2),
        ("lr=1", "optim.lr", 1.0),
        ("milestones=[1, 2, 3]", "optim.milestones", (1, 2, 3)),
        ("milestones=4,7", "optim.milestones", (4, 7)),
        ("mixup_theta=[0.1,0.2]", "views.mixup_theta", (0.1, 0.2)),
        ("class_weights=balanced", "loss.class_weights", "balanced"),
        ("class_weights=[1,2,3]", "loss.class_weights", [1.0, 2.0, 3.0]),
        ("clip_norm=null", "optim.clip_norm", None),
        ("clip_norm=2", "optim.clip_norm", 2.0),
        ("cache_dir=/x/y", "data.cache_dir", "/x/y"),
        ("pretrained=false", "model.pretrained", False),
        ("pretrained=/w.safetensors", "model.pretrained", "/w.safetensors"),
        ("source=csv:a=b.csv", "data.source", "csv:a=b.csv"),
        ("rotation=15", "data.augment.rotation", 15.0),
        ("data.augment.enabled=false", "data.augment.enabled", False),
    ],
)
def test_values_take_their_types(pair: str, key: str, value: object) -> None:
    found: object = load_config(None, [pair])
    for part in key.split("."):
        found = getattr(found, part)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("pair", "nearest"),
    [
        ("epoch=3", "train.epochs"),
        ("optim.learning_rte=3", "optim"),
        ("optim.lrr=3", "optim.lr"),
        ("train.lr=3", "optim.lr"),
        ("bacth_size=3", "train.batch_size"),
        ("data.augment.rotatoin=3", "data.augment.rotation"),
    ],
)
def test_unknown_key_names_the_nearest(pair: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown key.*{nearest}"):
        load_config(None, [pair])


def test_unknown_key_in_a_file_names_file_and_nearest(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("optim:\n  momentun: 0.5\n")
    with pytest.raises(ConfigError, match=r"c\.yaml.*momentun.*optim\.momentum"):
        load_config(file)


def test_ambiguous_short_key_lists_both() -> None:
    with pytest.raises(ConfigError, match=r"model\.name or loss\.name or optim\.name"):
        resolve_key("name")


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("epochs=1.5", "expected int"),
        ("epochs=true", "expected int"),
        ("epochs=0", "at least 1"),
        ("lr=fast", "expected float"),
        ("lr=nan", "more than 0"),
        ("lr=-1", "more than 0"),
        ("precision=fp8", "float32 or tf32 or bfloat16"),
        ("optim.name=adam", "sgd or adamw"),
        ("model.name=other", f"expected {' or '.join(sorted(methods()))}"),
        ("refine_weight=1.5", "0 to 1"),
        ("fusion=sum", "down or up or shuffle or cascade"),
        ("mixup_theta=[0.6,0.4]", "low <= high"),
        ("mixup_theta=[0.6]", r"\[float, float\]"),
        ("fold=5", "0 to data.folds - 1 = 4"),
        ("crop_scale=[0.9,0.1]", "crop_scale"),
        ("class_weights=[-1,2]", "none, balanced"),
        ("skip_bad=maybe", "expected bool"),
        ("milestones=[", "expected a list of int"),
        ("epochs", "key=value"),
    ],
)
def test_wrong_values_are_refused_with_the_key(pair: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(None, [pair])
    assert pair.split("=")[0] in str(caught.value)


@pytest.mark.parametrize("text", ["- a\n- b\n", "train: 5\n", "a: [\n"])
def test_files_that_are_no_configuration(tmp_path: Path, text: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"c\.yaml"):
        load_config(file)


def test_missing_file_lists_packaged_ones(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="phantom"):
        load_config(tmp_path / "none.yaml")


def test_a_dumped_configuration_loads_as_it_was(tmp_path: Path) -> None:
    config = load_config("phantom", ["class_weights=[1,2,3,4]", "clip_norm=1.5"])
    text = dump_yaml(config)
    assert text.startswith(RUN_MARK)
    assert yaml.safe_load(text) == config.to_dict()
    file = tmp_path / "config.yaml"
    file.write_text(text)
    assert load_config(file) == config


@pytest.mark.parametrize("name", methods())
def test_every_key_of_a_method_resolves_and_flat_has_those_that_are_read(name: str) -> None:
    keys = valid_keys(name)
    assert len(set(keys)) == len(keys) > 40
    assert all(resolve_key(key, name) == key for key in keys)
    config = Config.of(name)
    assert set(config.flat()) == set(keys) - set(config.unread())
    assert set(valid_keys()) >= set(keys)


def test_loading_does_not_change_the_defaults() -> None:
    load_config(None, ["epochs=3", "rotation=1", "backbone_args={a: 1}"])
    assert Config().train.epochs == 150
    assert Config().data.augment.rotation == 120.0
    assert Config().model.backbone_args == {}


def test_named_source() -> None:
    assert named_source(["epochs=3"]) is None
    assert named_source(["source=a", "data.source=folder:x=y"]) == "folder:x=y"


@pytest.mark.parametrize("name", sorted(packaged_models()))
def test_a_packaged_model_keeps_data_and_recipe(name: str) -> None:
    config, base = load_config("phantom", [f"model={name}"]), load_config("phantom")
    assert (config.data, config.optim, config.train) == (base.data, base.optim, base.train)
    assert config.model.name == ("plain" if name in BASELINES else name.partition("-")[0])


@pytest.mark.parametrize("name", sorted(packaged_models()))
def test_a_packaged_model_is_the_same_over_any_base(name: str, tmp_path: Path) -> None:
    """But for what goes with the images and the backbone: sizes, and which of its maps is taken."""
    other = tmp_path / "other.yaml"
    other.write_text(
        "model: {name: magsd, scales: 3, fusion: up, pool: max, regularizer: dropout, dropout: 0.9,"
        " refine_weight: 1.0}\nloss.name: cross_entropy\nviews.weight: 1.0\n"
    )
    kept = ("model.backbone", "model.in_channels", "model.attention_maps", "model.level")
    kept += ("model.pretrained",)
    found = []
    for base in (load_config(), load_config(other), load_config("wsdan")):
        values = load_config(None, [f"model={name}"], base=base).flat()
        makers = {key for key in values if key.startswith(("model.", "loss.", "views."))}
        found.append({key: values[key] for key in makers - set(kept)})
    assert found[0] == found[1] == found[2]


PINNED = json.loads((Path(__file__).parent / "models" / "packaged_models.json").read_text())


@pytest.mark.parametrize("case", PINNED)
def test_a_packaged_model_over_a_recipe_has_these_values(case: str) -> None:
    base, name = case.split("/")
    found = load_config(base or None, [f"model={name}"]).flat()
    makers = {k: v for k, v in found.items() if k.startswith(("model.", "loss.", "views."))}
    wanted = dict(PINNED[case])
    assert found.get("train.views") == wanted.pop("train.views", None)
    assert makers == wanted


def test_all_packaged_models_are_pinned() -> None:
    assert {case.split("/")[1] for case in PINNED} == set(packaged_models())


def test_single_values_win_over_the_model_whatever_their_order() -> None:
    config = load_config(None, ["scales=2", "model=magsd-3-scales", "lr=0.5"])
    assert (config.model.scales, config.optim.lr) == (2, 0.5)


def test_a_model_may_be_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("model.attention_maps: 7\n")
    assert load_config(None, [f"model={file}"]).model.attention_maps == 7
    with pytest.raises(ConfigError, match=r"no model file other; packaged ones: .*wsdan"):
        load_config(None, ["model=other"])


def test_crop_model_has_no_mixup() -> None:
    config = load_config(None, ["model=magsd-crop"])
    assert (config.views.weight, config.model.refine_weight) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("pairs", "key", "why"),
    [
        (["model=plain", "attention_maps=64"], "model.attention_maps=64", "model.name is plain"),
        (["scales=3", "model=wsdan"], "model.scales=3", "only magsd reads it"),
        (["level=-2"], "model.level=-2", "only wsdan reads it"),
        (["model=wsdan", "confidence=0.5"], "loss.confidence=0.5", "only loss.name=soft_distance"),
        (
            ["loss.name=cross_entropy", "smoothing=0.1"],
            "loss.smoothing=0.1",
            "only loss.name=published or soft_distance reads it",
        ),
        (
            ["model=plain", "loss.name=published"],
            "loss.name=published",
            r"magsd and (.* and )?wsdan read it",
        ),
        (
            ["model=plain", "train.views=merged"],
            "train.views=merged",
            r"magsd and (.* and )?wsdan read it",
        ),
        (["dropout=0.2"], "model.dropout=0.2", "model.regularizer is l2"),
        (["optim.name=adamw", "momentum=0.8"], "optim.momentum=0.8", "optim.name is adamw"),
        (["optim.name=adamw", "nesterov=true"], "optim.nesterov=true", "only optim.name=sgd"),
        (["optim.name=sgd", "betas=0.8,0.9"], "optim.betas=0.8,0.9", "only optim.name=adamw"),
        (["schedule=constant", "gamma=0.5"], "optim.gamma=0.5", "optim.schedule is constant"),
        (["schedule=cosine", "milestones=3"], "optim.milestones=3", "only optim.schedule=step"),
        (["schedule=step", "final_lr=0"], "optim.final_lr=0", "only optim.schedule=cosine"),
    ],
)
def test_a_key_that_nothing_reads_is_refused(pairs: list[str], key: str, why: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config("phantom", pairs)
    assert f"{key} has no effect: " in str(caught.value)
    assert re.search(why, str(caught.value))


def test_a_key_of_a_users_file_that_nothing_reads_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("model:\n  name: plain\n  fusion: up\n")
    for pairs, path in (([], file), ([f"model={file}"], None)):
        with pytest.raises(ConfigError, match=r"mine\.yaml: model\.fusion=up has no effect"):
            load_config(path, pairs)
    assert load_config(file, ["model=magsd-up"]).model.name == "magsd"  # the last choice counts


def test_keys_that_no_user_chose_are_left_out_where_nothing_reads_them(tmp_path: Path) -> None:
    for base in packaged_configs():
        for model in packaged_models():
            load_config(base, [f"model={model}"])
    run = tmp_path / "config.yaml"
    # A run of an earlier version holds the keys of all models.
    run.write_text(dump_yaml(load_config("phantom", ["model=plain"])) + "views: {weight: 0.1}\n")
    config = load_config(run)
    assert config == load_config("phantom", ["model=plain"])
    assert "views.weight" not in config.flat()
    pairs = ["model=plain", "attention_maps=7", "lr=1"]
    config = load_config("phantom", pairs[:1], shared=pairs[1:])
    assert "model.attention_maps" not in config.flat()
    assert config.optim.lr == 1
    # What the recipe says for another optimizer does not come back.
    config = load_config("wsdan", ["optim.name=adamw"])
    assert load_config(None, ["optim.name=sgd"], base=config).optim.nesterov is True
    load_config("wsdan", ["level=-1", "center_rate=0.1"])
    load_config("published", ["dropout=0.1", "model=magsd-dropout", "mixup_theta=[0.1,0.2]"])


def test_a_run_of_before_has_no_test_side(tmp_path: Path) -> None:
    """Its folds were validated on; the default of today would change what its results are of."""
    file = tmp_path / "config.yaml"
    text = dump_yaml(load_config("phantom"))
    assert load_config("phantom").data.test == "folds"
    file.write_text(text)
    assert load_config(file).data.test == "folds"
    old = text.replace("  test: folds\n", "")
    assert old != text
    file.write_text(old)
    assert load_config(file).data.test == "none"
    assert load_config(file, ["data.test=folds"]).data.test == "folds"
    file.write_text(old.partition("\n")[2])  # a user's own file
    assert load_config(file).data.test == "folds"


@pytest.mark.parametrize("value", ["fold", "yes", "null", ""])
def test_what_no_test_side_can_be(value: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.test=.*: expected folds, none, or an image"):
        load_config("phantom", [f"data.test={value}"])


def test_a_configuration_as_base_stays_as_it_is() -> None:
    base = load_config("phantom")
    assert load_config(None, ["model=wsdan", "lr=1"], base=base).model.name == "wsdan"
    assert base == load_config("phantom")


def test_sections_of_two_methods_do_not_go_together() -> None:
    config = Config.of("wsdan")
    config.model = Config.of("plain").model
    with pytest.raises(ConfigError, match=r"views: expected a ViewsConfig with model\.name=plain"):
        config.validate()


def test_the_keys_of_a_model_are_those_of_its_network() -> None:
    common = {"name", "backbone", "in_channels", "pretrained", "backbone_args"}
    own = {
        "magsd": "attention_maps scales fusion pool regularizer dropout refine_weight",
        "wsdan": "attention_maps level pool",
        "plain": "",
    }
    for name, keys in own.items():
        found = {key for key in valid_keys(name) if key.startswith("model.")}
        assert found == {f"model.{key}" for key in common | set(keys.split())}
