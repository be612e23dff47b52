"""Every number of a training run in typed dataclasses; their defaults are the published recipe.

A YAML file and `key=value` pairs override them. Keys are dotted (`optim.lr`); a name that only one
section has may stand alone (`lr`). The sections `model`, `views` and `loss` are those of the method
that `model.name` chooses. A key that does not exist, or that nothing would read, is refused.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import Field, dataclass, field, fields, is_dataclass, replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_type_hints

import yaml

from magsd.coerce import coerce, describe
from magsd.data.augment import AugmentConfig
from magsd.errors import ConfigError
from magsd.models.config import ModelConfig
from magsd.reporting.rules import Rule
from magsd.schema import Check, at_least, between, more_than, setting

if TYPE_CHECKING:
    from magsd.methods import Method

RUN_MARK = "# magsd run"
_PAIRS = "command line"
_PACKAGED = Path(str(resources.files("magsd") / "configs"))


_TEST = Check(
    lambda v: v in ("folds", "none") or ":" in v or v == "phantom",
    "folds, none, or an image source such as csv:FILE",
)
#: What a run did that was written before there was such a key.
_BEFORE: list[tuple[str, Any]] = [("data.test", "none")]


@dataclass
class DataConfig:
    """Where images come from, how they are prepared and split.

    split: "auto" takes the split that a data set publishes, where it does, else a fold by patient.
    test: on what nothing is chosen. "folds": part `fold` of `folds`, or the published test images;
        the validation images are then part of the others. Another source: all its images. "none":
        there is no such side, and results are those of the validation images.
    validation: shards to validate on, where `source` names shards.
    shuffle_buffer: images that each process shuffles at a time, where `source` names shards.
    """

    source: str = "phantom"
    image_size: int = setting(224, between(16, 4096))
    clahe: bool = True
    clahe_clip: float = setting(4.0, more_than(0))
    clahe_tiles: int = setting(4, at_least(1))
    cache_dir: str | None = None
    skip_bad: bool = False
    validation: str | None = None
    test: str = setting("folds", _TEST)
    shuffle_buffer: int = setting(1000, at_least(1))
    split: Literal["auto", "published", "folds"] = "auto"
    folds: int = setting(5, at_least(2))
    fold: int = setting(0, at_least(0))
    split_seed: int = setting(0, at_least(0))
    augment: AugmentConfig = field(default_factory=AugmentConfig)


@dataclass
class ViewsConfig:
    """Of a method's views: base of such sections, and the one of a method without views."""


_WEIGHTS = Check(
    lambda v: isinstance(v, str) or all(w >= 0 for w in v),
    "none, balanced, or numbers of at least 0",
)


@dataclass
class LossConfig:
    """What is minimized: base of such sections.

    class_weights: of every cross entropy: "none", "balanced", or one number per class, in order.
    """

    class_weights: Literal["none", "balanced"] | list[float] = setting("none", _WEIGHTS)


_DECAY = Check(lambda v: 0 <= v < 1, "a number in [0, 1)")
_BETAS = Check(lambda v: all(0 <= b < 1 for b in v), "two numbers in [0, 1)")


@dataclass
class OptimConfig:
    """Optimizer and learning-rate schedule; epochs may be fractions for `warmup_epochs`."""

    name: Literal["sgd", "adamw"] = "sgd"
    lr: float = setting(1e-3, more_than(0))
    momentum: float = setting(0.9, between(0, 1), when=("name", "sgd"))
    nesterov: bool = setting(True, when=("name", "sgd"))
    weight_decay: float = setting(5e-4, at_least(0))
    decay_norms: bool = True
    betas: tuple[float, float] = setting((0.9, 0.999), _BETAS, when=("name", "adamw"))
    schedule: Literal["step", "cosine", "constant"] = "step"
    milestones: tuple[int, ...] = setting((75, 125), when=("schedule", "step"))
    gamma: float = setting(0.1, between(0, 1), when=("schedule", "step"))
    warmup_epochs: float = setting(0.0, at_least(0))
    final_lr: float = setting(0.0, at_least(0), when=("schedule", "cosine"))
    clip_norm: float | None = setting(None, more_than(0))


def _is_rule(text: str) -> bool:
    try:
        Rule.parse(text)
    except ConfigError:
        return False
    return True


_RULE = Check(_is_rule, "argmax, youden, sensitivity=0.95, specificity=0.9 or cost=5:1")


@dataclass
class TrainConfig:
    """Length, precision, device, and what is written how often (steps; 0: at epochs' ends only).

    views: "grouped" passes the views through the network as one batch in which each has its own
        batch statistics; "separate" passes them one by one, which gives the same up to rounding.
        Where dropout would be drawn otherwise, or a batch norm cannot tell the views apart,
        "grouped" passes them one by one too, and a line says why. "merged" passes them as one batch
        with common statistics, not as published.
    fuse_norm: batch norm, residual addition and activation of the backbone in one operation.
    precision: of the forward passes; "tf32" is float32 whose products may run in TF32 on a GPU.
    recompute: the backbone's activations are computed again in the backward instead of being kept.
    compile: torch.compile for the backbone.
    cuda_graph: on a GPU, record the step in a CUDA graph; a line says so where that does not go.
    batch_size: images of a step, which all processes share.
    ema: decay of an exponential moving average of the weights, which is what is validated and kept
        as the best; 0 for none. See `magsd.training.averaging`.
    sync_batchnorm: where several processes train on GPUs, batch statistics are those of all of
        them; otherwise each process normalizes by its own images.
    images_on_device: keep all images on the GPU; "auto" does where they take less than half of it.
    operating_point: how each class's threshold is chosen on the validation images: "youden" (the
        highest sensitivity + specificity), "sensitivity=0.95" or "specificity=0.9" (at least that),
        "cost=5:1" (of a false negative to a false positive), or "argmax" (no thresholds).
    """

    epochs: int = setting(150, at_least(1))
    batch_size: int = setting(16, at_least(2))
    eval_batch_size: int = setting(32, at_least(1))
    seed: int = setting(0, at_least(0))
    device: str = "auto"
    kernels: str = "auto"
    views: Literal["grouped", "separate", "merged"] = setting("grouped", needs="views")
    fuse_norm: bool = True
    precision: Literal["float32", "tf32", "bfloat16", "float16"] = "float32"
    channels_last: bool = False
    recompute: bool = False
    compile: bool = False
    cuda_graph: bool = True
    images_on_device: Literal["auto", "on", "off"] = "auto"
    sync_batchnorm: bool = False
    deterministic: bool = False
    ema: float = setting(0.0, _DECAY)
    monitor: Literal["accuracy", "balanced_accuracy", "loss"] = "accuracy"
    operating_point: str = setting("youden", _RULE)
    log_interval: int = setting(20, at_least(1))
    checkpoint_interval: int = setting(0, at_least(0))
    tensorboard: bool = True
    overlays: int = setting(16, at_least(0))


def _default(section: str) -> Callable[[], Any]:
    def make() -> Any:
        from magsd.methods import method  # which needs torch and timm

        return getattr(method(ModelConfig().name), section)()

    return make


@dataclass
class Config:
    """A whole run; `model`, `views` and `loss` are the sections of one method."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=_default("model"))
    views: ViewsConfig = field(default_factory=_default("views"))
    loss: LossConfig = field(default_factory=_default("loss"))
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    @classmethod
    def of(cls, name: str) -> Config:
        """The defaults of the method `name`. Raises `ConfigError` for one that does not exist."""
        from magsd.methods import method

        chosen = method(name)
        return cls(model=chosen.model(), views=chosen.views(), loss=chosen.loss())

    def to_dict(self) -> dict[str, Any]:
        """What is read, in nested plain types (tuples as lists), for YAML, JSON, `torch.load`."""
        nested: dict[str, Any] = {}
        for full, value in self.flat().items():
            *sections, leaf = full.split(".")
            place = nested
            for section in sections:
                place = place.setdefault(section, {})
            place[leaf] = value
        return nested

    def flat(self) -> dict[str, Any]:
        """Dotted key -> plain value, of all that is read."""
        unread = self.unread()
        return {
            full: _plain(getattr(section, item.name))
            for full, section, item in _leaves(self)
            if full not in unread
        }

    def unread(self) -> dict[str, str]:
        """Dotted key that nothing reads under the other choices -> why, in words."""
        found: dict[str, str] = {}
        for full, section, item in _leaves(self):
            name, *readers = item.metadata.get("when") or (None,)
            if name is not None and getattr(section, name) not in readers:
                now, other = getattr(section, name), f"{full.rpartition('.')[0]}.{name}"
                found[full] = f"{other} is {now}, and only {other}={' or '.join(readers)} reads it"
        return found

    def validate(self) -> Config:
        """Check ranges. Raises `ConfigError` that names key, value and what was expected."""
        own = Config.of(self.model.name)
        for name in ("model", "views", "loss"):
            if type(getattr(self, name)) is not type(getattr(own, name)):
                raise ConfigError(
                    f"{name}: expected a {type(getattr(own, name)).__name__} with "
                    f"model.name={self.model.name}, got a {type(getattr(self, name)).__name__}"
                )
        for full, section, item in _leaves(self):
            value, check = getattr(section, item.name), item.metadata.get("check")
            if check is not None and value is not None and not check.holds(value):
                raise ConfigError(f"{full}={_plain(value)}: expected {check.expected}")
        if self.data.fold >= self.data.folds:
            raise ConfigError(
                f"data.fold={self.data.fold}: expected 0 to data.folds - 1 = {self.data.folds - 1}"
            )
        return self


def _leaves(config: Config) -> Iterator[tuple[str, Any, Field[Any]]]:
    """Dotted key, the section that holds it, and its field, of every value of a method's."""
    for full, section, item in _walk(config, ""):
        needs = item.metadata.get("needs")
        if needs is None or fields(getattr(config, needs)):
            yield full, section, item


def _walk(section: Any, prefix: str) -> Iterator[tuple[str, Any, Field[Any]]]:
    for item in fields(section):
        value = getattr(section, item.name)
        if is_dataclass(value):
            yield from _walk(value, f"{prefix}{item.name}.")
        else:
            yield prefix + item.name, section, item


def valid_keys(name: str | None = None) -> list[str]:
    """Every dotted key of the method `name`, or of all methods."""
    from magsd.methods import method, methods

    names = methods() if name is None else [name]
    return list(dict.fromkeys(full for each in names for full in _keys_of(method(each))))


@functools.cache
def _keys_of(chosen: Method) -> tuple[str, ...]:
    return tuple(full for full, *_ in _leaves(Config.of(chosen.name)))


def _read_by(full: str, name: str) -> str:
    """Why the method `name` does not read a key: which ones do."""
    from magsd.methods import methods

    readers = [other for other in methods() if full in valid_keys(other)]
    only = f"{' and '.join(readers)} read{'s' if len(readers) == 1 else ''} it"
    return f"model.name is {name}, and only {only}"


def resolve_key(key: str, name: str | None = None) -> str:
    """Full dotted name of `key`, which may lack leading sections where it stays unique.

    A key of the method `name` comes before those that only other methods have.
    """
    keys = valid_keys()
    for known in (keys if name is None else valid_keys(name), keys):
        if key in known:
            return key
        matches = [full for full in known if full.endswith("." + key)]
        if len(matches) == 1:
            return matches[0]
        if matches:
            raise ConfigError(f"key {key!r} is in several sections: write {' or '.join(matches)}")
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


class _Said(NamedTuple):
    """A value of a file, a pair, or what they are applied over.

    must: what says so chose the key for this very run: it is an error if nothing reads it.
    """

    key: str
    value: Any
    where: str
    must: bool = False
    is_text: bool = False


def load_config(
    file: str | Path | None = None,
    overrides: Iterable[str] = (),
    *,
    base: Config | None = None,
    shared: Iterable[str] = (),
) -> Config:
    """`base` (else the published recipe), then a YAML file, then `key=value` pairs.

    `file` is a path or the name of a packaged configuration. A pair `model=NAME` applies a packaged
    model, or the YAML file of that path, before the other pairs. Raises `ConfigError`, also for a
    key of a user's own file or pair that the resulting model, loss or optimizer does not read; such
    keys of packaged recipes, of a run's config.yaml and of `base` are left out, and so are those of
    `shared`: pairs for several models, which come before the other pairs.
    """
    before = {} if base is None else base.flat()
    said = [_Said(*pair, "the configuration") for pair in before.items()]
    if file is not None:
        packaged = packaged_configs()
        path = Path(file) if Path(file).is_file() else packaged.get(str(file), Path(file))
        said += _said_in(_existing(path, "configuration", packaged), str(file))
    pairs = [_pair(text) for text in overrides]
    for name, text in pairs:
        if name == "model":
            said += _said_by_model(text)
    said += [_Said(*_pair(text), _PAIRS, is_text=True) for text in shared]
    said += [_Said(*pair, _PAIRS, must=True, is_text=True) for pair in pairs if pair[0] != "model"]
    return _build(said)


def _build(said: list[_Said]) -> Config:
    """The configuration that values give which come one after the other."""
    from magsd.methods import methods

    chosen = _Said("model.name", ModelConfig().name, "")
    for each in said:
        chosen = each if each.key == chosen.key else chosen
    if chosen.value not in methods():
        known = " or ".join(methods())
        raise ConfigError(f"{chosen.where}: model.name={chosen.value!r}: expected {known}")
    config = Config.of(chosen.value)
    own = set(valid_keys(chosen.value))
    musts: dict[str, _Said] = {}
    for each in said:
        try:
            full = resolve_key(each.key, chosen.value)
        except ConfigError as error:
            raise error if each.where == _PAIRS else ConfigError(f"{each.where}: {error}") from None
        if full in own and full != chosen.key:
            _set(config, full, each)
        if each.must:
            musts[full] = each
    unread = config.unread()
    for full, each in musts.items():
        why = unread.get(full) or (full not in own and _read_by(full, chosen.value))
        if why:
            raise ConfigError(f"{each.where}: {full}={each.value} has no effect: {why}")
    defaults = Config.of(chosen.value)
    for full in unread:
        _put(config, full, _get(defaults, full))
    return config.validate()


def _said_in(path: Path, where: str) -> list[_Said]:
    """What a file says; it must be read where a user wrote it, no run nor this package."""
    of_run = is_of_run(path)
    must = not (path.is_relative_to(_PACKAGED) or of_run)
    pairs = _flatten(_read_yaml(path), where)
    if of_run:
        pairs = [*_BEFORE, *pairs]
    return [_Said(*pair, where, must) for pair in pairs]


def _said_by_model(text: str) -> list[_Said]:
    where, packaged = f"model={text}", packaged_models()
    if text in packaged and not Path(text).is_file():
        return [_Said(*pair, where) for pair in packaged[text].items()]
    return _said_in(_existing(Path(text), "model", packaged), where)


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
    return {path.stem: path for path in sorted(_PACKAGED.glob("*.yaml"))}


def packaged_models() -> dict[str, dict[str, Any]]:
    """Name -> dotted keys and values of every method's variants, for `model=NAME`."""
    from magsd.methods import method, methods

    return dict(
        sorted(
            (variant, {"model.name": name, **values})
            for name in methods()
            for variant, values in method(name).variants.items()
        )
    )


def dump_yaml(config: Config) -> str:
    """The configuration as YAML, after the mark by which a run's folder is known."""
    body = yaml.safe_dump(config.to_dict(), sort_keys=False, default_flow_style=False)
    return f"{RUN_MARK}: every value that this run used\n{body}"


def is_of_run(path: Path) -> bool:
    """True for the config.yaml that a run wrote."""
    try:
        with path.open(encoding="utf-8") as file:
            return file.readline().startswith(RUN_MARK)
    except (OSError, UnicodeDecodeError):
        return False


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


def _existing(path: Path, what: str, packaged: Iterable[str]) -> Path:
    if not path.is_file():
        raise ConfigError(f"no {what} file {path}; packaged ones: {', '.join(packaged)}")
    return path


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


@functools.cache
def _hints(section: type) -> dict[str, Any]:
    """Types of a section's settings; evaluating annotations takes milliseconds."""
    return get_type_hints(section)


def _set(config: Config, full: str, said: _Said) -> None:
    section, _, leaf = full.rpartition(".")
    section_type: type = type(_get(config, section))
    hint = _hints(section_type)[leaf]
    wrong = f"{said.where}: {full}={said.value!r}"
    try:
        value = coerce(said.value, hint, from_text=said.is_text)
    except (TypeError, ValueError, yaml.YAMLError):
        raise ConfigError(f"{wrong}: expected {describe(hint)}") from None
    try:
        _put(config, full, value)
    except ValueError as error:
        raise ConfigError(f"{wrong}: {error}") from None


def _put(config: Config, full: str, value: Any) -> None:
    """Give a section a value; a section may be frozen, so it is replaced."""
    section, _, leaf = full.rpartition(".")
    outer, _, name = section.rpartition(".")
    changed = replace(_get(config, section), **{leaf: value})
    setattr(_get(config, outer) if outer else config, name, changed)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
