"""Every packaged model trains, evaluates and predicts by the one path."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cv2
import pytest

from magsd.config import Config, packaged_models
from magsd.data import open_source
from magsd.evaluation import evaluate, predict_images
from magsd.training.checkpoint import load_checkpoint
from magsd.training.run import load_run, train_run

# Models with a backbone of their own are large, and need images for their strides.
BASELINES = {"resnet18": 32, "resnet50": 32, "vgg16": 32, "densenet121": 32, "inception_v3": 80}


@pytest.mark.parametrize("name", sorted(packaged_models()))
def test_trains_evaluates_and_predicts(
    name: str, small_config: Callable[..., Config], tmp_path: Path, console
) -> None:
    size = BASELINES.get(name, 32)
    # The small run names its backbone, which would win over the baseline's.
    own = [f"backbone={name}", "backbone_args={}"] if name in BASELINES else []
    config = small_config(
        f"model={name}",
        *own,
        f"image_size={size}",
        f"source=phantom:n=8,size={size}",
        "data.test=none",  # two patients of a class are too few for three sides
        "epochs=1",
    )
    trained = train_run(config, tmp_path / "run", console=console)
    loaded = load_run(trained.folder.root)
    images = trained.data.side_loader(loaded.config, "validation")
    report = evaluate(loaded.model, *images, classes=loaded.classes)
    assert report.raw.images == report.refined.images == 4
    source = open_source(config.data.source)
    file = tmp_path / "image.png"
    cv2.imwrite(str(file), source.read_image(source.records[0]))
    [prediction] = predict_images(
        loaded.model, [file], classes=loaded.classes, overlay_dir=tmp_path / "overlays"
    )
    assert sum(prediction.probabilities.values()) == pytest.approx(1, abs=1e-5)
    assert prediction.overlay.is_file()
    if name == "wsdan":
        centers = load_checkpoint(trained.folder.last)["model"]["centers"]
        assert float(centers.abs().sum()) > 0
