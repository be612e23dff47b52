"""Feature maps of a timm backbone, and its pretrained weights."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, cast

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import FeatureInfo, adapt_input_conv
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from magsd.errors import ConfigError, MagsdError
from magsd_kernels import norm_groups
from magsd_kernels._norms import current_groups

#: Attributes of layers that draw. Dense layers call dropout as a function, by `drop_rate`.
_RATES = ("p", "prob", "drop", "drop_prob", "drop_rate")


class Backbone(nn.Module):
    """`scales` feature maps of a timm model, fine to coarse, up to `level`, -1 being its last.

    In training with `recompute` set, activations are not kept for the backward but computed again
    there, one pass at a time; of a batch of several groups (`magsd_kernels.norm_groups`) one group.

    name: a timm model that supports `features_only`. pretrained: False, True (timm's weights, which
    may be downloaded), or the path of a safetensors file with timm's parameter names; the stem is
    adapted to `in_channels`. channels, reductions: of each map, its number of channels and the
    image's size over its own.
    """

    def __init__(
        self,
        name: str,
        *,
        in_channels: int = 1,
        scales: int = 2,
        level: int = -1,
        pretrained: bool | str = False,
        backbone_args: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if in_channels < 1:
            raise ConfigError(f"in_channels: expected at least 1, got {in_channels}")
        if scales < 1:
            raise ConfigError(f"scales: expected at least 1, got {scales}")
        if level >= 0:
            raise ConfigError(f"level: expected -1 for the last map or less, got {level}")
        arguments = dict(backbone_args or {}) | {
            "in_chans": in_channels,
            "out_indices": tuple(range(level - scales + 1, level + 1)),
        }
        self.net = _create(name, arguments)
        if pretrained is True:
            # Only now, so that a wrong request is refused before any download.
            self.net = _create_pretrained(name, arguments)
        elif pretrained:
            load_backbone_weights(self.net, pretrained, name=name, in_channels=in_channels)
        _drop_later_stages(self.net)
        self.recompute = False
        self.in_channels = in_channels
        info = cast(FeatureInfo, self.net.feature_info)  # whichever of timm's extractors it is
        self.channels: list[int] = list(info.channels())
        self.reductions: list[int] = list(info.reduction())
        self._channels_last = str(getattr(self.net, "output_fmt", "NCHW")).endswith("NHWC")

    def forward(self, images: Tensor) -> list[Tensor]:
        """Maps (B, channels[i], h_i, w_i) of images (B, in_channels, H, W)."""
        if self.recompute and self.training and torch.is_grad_enabled():
            maps = self._recomputed(images)
        else:
            maps = self.net(images)
        return [m.permute(0, 3, 1, 2) for m in maps] if self._channels_last else list(maps)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """`torch.compile` the network; what computes activations again calls it as it is."""
        self.net.compile(*args, **kwargs)

    @property
    def draws(self) -> bool:
        """Whether a pass draws; to keep the state of a generator is costly, and waits for a GPU."""
        return draws(self.net)

    def _recomputed(self, images: Tensor) -> list[Tensor]:
        """Maps whose activations are computed again in the backward, outside of all groups."""
        groups = images.chunk(current_groups())
        with norm_groups(1):
            maps = [
                checkpoint(
                    self.net,
                    group,
                    use_reentrant=False,
                    context_fn=self._recomputation,
                    preserve_rng_state=self.draws,
                )
                for group in groups
            ]
        return maps[0] if len(maps) == 1 else [torch.cat(same) for same in zip(*maps, strict=True)]

    def _recomputation(self) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        return contextlib.nullcontext(), _statistics_kept(self.net)


def draws(model: nn.Module) -> bool:
    """Whether a pass in training draws random numbers.

    Told by the rates that dropout and stochastic depth have in torch and in timm.
    """
    rates = (getattr(module, name, 0) for module in model.modules() for name in _RATES)
    return any(isinstance(rate, float) and rate > 0 for rate in rates)


@contextlib.contextmanager
def _statistics_kept(net: nn.Module) -> Iterator[None]:
    """Within the context batch norms normalize as in training, and their statistics stay."""
    norms = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count


def _create(name: str, arguments: dict[str, Any]) -> nn.Module:
    """Build timm's feature extractor with random weights, its refusals turned into ConfigError."""
    if not timm.is_model(name):
        near = difflib.get_close_matches(name.partition(".")[0], timm.list_models(), n=3)
        hint = f"; near names: {', '.join(near)}" if near else ""
        raise ConfigError(f"timm has no backbone {name!r}{hint}")
    try:
        return timm.create_model(name, features_only=True, pretrained=False, **arguments)
    except (AssertionError, IndexError, ValueError, RuntimeError, TypeError) as error:
        raise ConfigError(
            f"backbone {name!r} cannot give its last {-arguments['out_indices'][0]} feature map(s) "
            f"with {arguments}: {error}"
        ) from error


def _create_pretrained(name: str, arguments: dict[str, Any]) -> nn.Module:
    """The same with timm's weights, from its cache or the network."""
    try:
        return timm.create_model(name, features_only=True, pretrained=True, **arguments)
    except Exception as error:  # each download library has its own family of errors
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise MagsdError(
            f"the pretrained weights of {name!r} could not be fetched ({reason}). Start from "
            "random weights with model.pretrained=false, or give a safetensors file with timm's "
            "parameter names: model.pretrained=/path/to/weights.safetensors"
        ) from error


def _drop_later_stages(net: nn.Module) -> None:
    """Remove, in place, the stages after the last map that is taken.

    timm keeps them in its EfficientNet and MobileNet families: they would run for nothing, and
    their parameters would get no gradient, which several processes that train together refuse.
    """
    families = (
        timm.models.efficientnet.EfficientNetFeatures,
        timm.models.mobilenetv3.MobileNetV3Features,
    )
    if isinstance(net, families) and net.feature_hooks is None:  # else maps come from within stages
        net.blocks = net.blocks[: max(info["stage"] for info in net.feature_info.get_dicts())]


def load_backbone_weights(
    net: nn.Module, path: str | Path, *, name: str, in_channels: int = 1
) -> None:
    """Copy a timm-named safetensors file into a `features_only` net, in place.

    Entries without a place in the net (classifier, later layers) are left out; a parameter of the
    net that the file lacks is an error. The stem is adapted to `in_channels` as timm does: one
    channel takes the sum over the input channels. Raises MagsdError.
    """
    path = Path(path).expanduser()
    try:
        entries = {_plain(key): value for key, value in load_file(path).items()}
    except FileNotFoundError as error:
        raise MagsdError(f"weights file not found: {path}") from error
    except (SafetensorError, OSError) as error:
        raise MagsdError(f"weights file {path} is not readable as safetensors: {error}") from error
    state = net.state_dict()
    # Files may leave out batch norm's step counter, which plays no part with a fixed momentum.
    missing = [
        k for k in state if _plain(k) not in entries and not k.endswith("num_batches_tracked")
    ]
    if missing:
        raise MagsdError(
            f"weights file {path} does not fit backbone {name!r}: {len(missing)} of {len(state)} "
            f"parameters are missing, e.g. {', '.join(missing[:3])}"
        )
    stems = _stem_weights(name)
    for key, value in state.items():
        loaded = entries.get(_plain(key), value)
        if _plain(key) in stems and loaded.shape != value.shape and loaded.ndim == 4:
            loaded = adapt_input_conv(in_channels, loaded)
        if loaded.shape != value.shape:
            raise MagsdError(
                f"weights file {path} does not fit backbone {name!r}: {key} has shape "
                f"{tuple(loaded.shape)}, expected {tuple(value.shape)}"
            )
        state[key] = loaded
    net.load_state_dict(state)


def _stem_weights(name: str) -> set[str]:
    """Keys of the convolutions that see the image."""
    config = timm.get_pretrained_cfg(name)
    first = config.first_conv if config is not None else None
    convolutions = (first,) if isinstance(first, str) else tuple(first or ())
    return {_plain(f"{conv}.weight") for conv in convolutions}


def _plain(key: str) -> str:
    """A parameter's name as both the whole model and its feature extractor spell it.

    timm's extractor flattens 'features.0.weight' to 'features_0.weight', and its getter prefixes
    'model.'.
    """
    return key.removeprefix("model.").replace(".", "_")
