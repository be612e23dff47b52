"""From a configuration or a saved folder to a model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from huggingface_hub.constants import CONFIG_NAME, SAFETENSORS_SINGLE_FILE
from safetensors import SafetensorError

from magsd.errors import MagsdError
from magsd.methods import method
from magsd.models.classifier import Classifier
from magsd.models.config import ModelConfig, Preprocessing


def build_model(
    config: ModelConfig,
    num_classes: int,
    *,
    classes: Sequence[str] | None = None,
    preprocessing: Preprocessing | None = None,
) -> Classifier:
    """Model that `config` describes, in training mode.

    classes and preprocessing travel with the model when it is saved. Raises ConfigError for an
    unknown name, backbone or number of scales, MagsdError where pretrained weights cannot be had.
    """
    arguments = {item.name: getattr(config, item.name) for item in fields(config)}
    network = method(arguments.pop("name")).network
    arguments["backbone_args"] = dict(config.backbone_args)
    return network(
        num_classes=num_classes, classes=classes, preprocessing=preprocessing, **arguments
    )


def load_model(folder: str | Path) -> Classifier:
    """Model that `save_pretrained` wrote into a folder, of whichever kind, in evaluation mode."""
    folder = Path(folder)
    for name in (CONFIG_NAME, SAFETENSORS_SINGLE_FILE):
        if not (folder / name).is_file():
            raise MagsdError(f"no saved model in {folder}: {name} is missing")
    try:
        config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
        name = config["name"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise MagsdError(f"{folder / CONFIG_NAME} describes no magsd model: {error}") from error
    try:
        return method(name).network.from_pretrained(folder)
    except (SafetensorError, RuntimeError) as error:
        raise MagsdError(
            f"the weights in {folder} are damaged or do not fit its {CONFIG_NAME}: {error}"
        ) from error
