"""Means of several models and of mirrored images, against sums by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from magsd.data import z_score
from magsd.data.cache import prepare_image
from magsd.data.images import read_image_file
from magsd.errors import MagsdError, RunError
from magsd.evaluation import (
    Ensemble,
    Member,
    attention_inside,
    evaluate,
    evaluate_ensemble,
    predict_ensemble,
    predict_images,
    refined_logits,
)
from magsd.evaluation.ensemble import log_mean_probability, mean_saliency, run_model
from magsd.evaluation.predict import Prediction, with_findings
from magsd.models import ModelConfig, Preprocessing, build_model
from magsd.reporting.operating import OperatingPoint, Threshold
from magsd.reporting.rules import Rule

CLASSES = ("left", "none", "right")


def member(seed: int, size: int = 64, channels: int = 1, name: str = "magsd") -> Member:
    torch.manual_seed(seed)
    config = ModelConfig(name=name, backbone="test_resnet", in_channels=channels, pretrained=False)
    model = build_model(config, 3).eval()
    return Member(model, CLASSES, Preprocessing(size, None), name=f"run{seed}")


@pytest.fixture
def files(cache, tmp_path: Path) -> list[Path]:
    paths = []
    for i, image in enumerate(cache.images[:5]):
        paths.append(tmp_path / f"image{i}.png")
        cv2.imwrite(str(paths[-1]), image)
    return paths


def values(predictions: list[Prediction]) -> np.ndarray:
    return np.array([list(each.probabilities.values()) for each in predictions])


def alone(one: Member, files: list[Path], **how) -> np.ndarray:
    found = predict_images(
        one.model, files, classes=one.classes, preprocessing=one.preprocessing, **how
    )
    return values(found)


def test_one_model_is_what_it_is_without_any_of_this(files, cache, classes, make_loader) -> None:
    """Bit for bit what its network says of the prepared images."""
    one = member(0)
    images = [prepare_image(read_image_file(file), 64, 1, None) for file in files]
    pixels = z_score(torch.from_numpy(np.stack(images))[:, None].to(torch.float32).div_(255))
    with torch.no_grad():
        output = one.model(pixels)
        refined = refined_logits(one.model, pixels, output, one.model.saliency(output))
    for refine, logits in ((True, refined), (False, output.logits)):
        expected = logits.double().softmax(1).numpy()
        assert np.array_equal(alone(one, files, refine=refine), expected)
        assert np.array_equal(
            values(predict_ensemble(Ensemble([one]), files, refine=refine)), expected
        )
    loader = make_loader(range(5))
    reports = [
        evaluate(one.model, loader, cache, classes=classes),
        evaluate_ensemble(Ensemble([one]), {one.form: loader}, cache),
    ]
    for report in reports:
        assert np.array_equal(report.predictions.logits, output.logits.numpy())
        assert np.array_equal(report.predictions.refined_logits, refined.numpy())
    assert reports[0].localization == reports[1].localization


@pytest.mark.parametrize("refine", [True, False])
def test_mean_of_models_with_images_of_their_own(refine: bool, files: list[Path]) -> None:
    members = [member(0), member(1, size=48), member(2, channels=3, name="plain")]
    found = predict_ensemble(Ensemble(members), files, refine=refine, batch_size=2)
    expected = np.mean(
        [alone(each, files, refine=refine, batch_size=2) for each in members], axis=0
    )
    np.testing.assert_allclose(values(found), expected, rtol=1e-5)
    assert [each.label for each in found] == [CLASSES[k] for k in expected.argmax(axis=1)]
    assert [each.path for each in found] == files


def test_every_file_is_read_once(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from magsd.evaluation import predict

    read: list[Path] = []
    monkeypatch.setattr(
        predict, "read_image_file", lambda file: (read.append(file), read_image_file(file))[1]
    )
    predict_ensemble(Ensemble([member(0), member(1, size=48), member(2)]), files)
    assert read == files


def test_classes_in_another_order_are_matched_by_name(files: list[Path]) -> None:
    one, other = member(0), replace(member(1), classes=("right", "left", "none"))
    both = Ensemble([one, other])
    assert both.classes == CLASSES
    found = predict_ensemble(both, files)
    theirs = alone(other, files)[:, [1, 2, 0]]
    np.testing.assert_allclose(values(found), (alone(one, files) + theirs) / 2, rtol=1e-5)


@pytest.mark.parametrize("names", [("left", "none", "up"), ("left", "none")])
def test_other_classes_are_refused(names: tuple[str, ...]) -> None:
    other = replace(member(1), classes=names)
    with pytest.raises(RunError, match=f"run1 has the classes {', '.join(names)}, run0 has left, "):
        Ensemble([member(0), other])


def test_evaluation_of_a_mean(cache, make_loader) -> None:
    """Probabilities, refined ones and the share of the mean map inside masks, as by hand."""
    members = [member(0), member(1)]
    both = Ensemble(members)
    report = evaluate_ensemble(both, {both.forms[0]: make_loader()}, cache)
    parts = [
        evaluate(each.model, make_loader(), cache, classes=CLASSES).predictions for each in members
    ]
    for kind in ("logits", "refined_logits"):
        expected = np.mean([softmax(getattr(part, kind)) for part in parts], axis=0)
        np.testing.assert_allclose(np.exp(getattr(report.predictions, kind)), expected, rtol=1e-5)
    [batch] = make_loader(batch_size=12)
    with torch.no_grad():
        maps = [each.model.saliency(each.model(batch.images)) for each in members]
    mean = sum(each / each.mean((1, 2, 3), keepdim=True) for each in maps)
    rows = np.flatnonzero(cache.has_mask)
    shares, _ = attention_inside(mean[rows], torch.from_numpy(cache.masks[rows]))
    assert report.localization.overall.inside == pytest.approx(shares.mean().item(), rel=1e-4)
    assert not any(module.training for each in members for module in each.model.modules())


def softmax(logits: np.ndarray) -> np.ndarray:
    return torch.from_numpy(logits).double().softmax(1).numpy()


def test_flip_is_the_mean_with_the_mirror(files: list[Path], tmp_path: Path) -> None:
    one = member(0)
    mirrors = []
    for file in files:
        mirrors.append(tmp_path / f"mirror_{file.name}")
        cv2.imwrite(str(mirrors[-1]), cv2.imread(str(file), cv2.IMREAD_UNCHANGED)[:, ::-1])
    expected = (alone(one, files) + alone(one, mirrors)) / 2
    found = alone(one, files, tta="flip")
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    np.testing.assert_allclose(alone(one, mirrors, tta="flip"), found, rtol=1e-5)
    assert not np.allclose(found, alone(one, files), rtol=1e-4)


@pytest.mark.parametrize("name", ["magsd", "plain"])
def test_maps_of_mirrors_are_mirrored_back(name: str, make_loader) -> None:
    model = member(0, name=name).model
    [batch] = make_loader(range(4))
    with torch.no_grad():
        straight = run_model(model, batch.images, tta="flip")
        mirrored = run_model(model, batch.images.flip(-1), tta="flip")
        plain = run_model(model, batch.images)
    torch.testing.assert_close(straight.saliency, mirrored.saliency.flip(-1))
    assert not torch.allclose(straight.saliency, straight.saliency.flip(-1), rtol=1e-2)
    assert straight.saliency.shape == plain.saliency.shape
    torch.testing.assert_close(straight.logits.exp().sum(1), torch.ones(4))


def test_evaluation_with_flips_is_that_of_prediction(
    cache, classes, make_loader, files: list[Path]
) -> None:
    one = member(0)
    report = evaluate(one.model, make_loader(range(5)), cache, classes=classes, tta="flip")
    found = alone(one, files, tta="flip", batch_size=5)
    np.testing.assert_allclose(softmax(report.predictions.refined_logits), found, rtol=1e-5)
    both = Ensemble([one, member(1)])
    means = predict_ensemble(both, files, tta="flip")
    expected = (found + alone(member(1), files, tta="flip")) / 2
    np.testing.assert_allclose(values(means), expected, rtol=1e-5)


def test_mean_of_probabilities_of_extreme_logits() -> None:
    sure = torch.tensor([[1e4, 0.0, -1e4]])
    other = torch.tensor([[0.0, 1e4, -1e4]], dtype=torch.bfloat16)
    found = log_mean_probability([sure, other])
    assert found.dtype == torch.float32
    assert found.isfinite().all()
    torch.testing.assert_close(found.exp(), torch.tensor([[0.5, 0.5, 0.0]]))


def test_maps_weigh_alike_whatever_their_scale_and_size() -> None:
    strong, weak = torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2)
    strong[..., 0, :] = 1000.0
    weak[..., 1, :] = 1e-3
    torch.testing.assert_close(mean_saliency([strong, weak]), torch.ones(1, 1, 2, 2))
    large = mean_saliency([torch.ones(1, 1, 4, 4), weak])
    assert large.shape == (1, 1, 4, 4)
    torch.testing.assert_close(large.mean(), torch.tensor(1.0))
    assert large[0, 0, -1].tolist() == [1.5] * 4  # half of a map's mean, and of twice its mean
    nothing = mean_saliency([torch.zeros(1, 1, 2, 2), strong])
    torch.testing.assert_close(nothing, strong / strong.mean() / 2)


def test_a_diverged_member_is_said(cache, make_loader, files: list[Path]) -> None:
    broken = member(1)
    with torch.no_grad():
        broken.model.head.weight[0, 0] = float("nan")
    both = Ensemble([member(0), broken])
    with pytest.raises(RunError, match=r"image0\.png: the model's logits are not finite"):
        predict_ensemble(both, files)
    with pytest.raises(MagsdError, match="not finite for 12 of 12"):
        evaluate_ensemble(both, {both.forms[0]: make_loader()}, cache)


def test_overlays_of_an_ensemble(files: list[Path], tmp_path: Path) -> None:
    both = Ensemble([member(0), member(1, size=48)])
    found = predict_ensemble(both, files[:2], overlay_dir=tmp_path / "maps")
    assert [each.overlay for each in found] == [
        tmp_path / "maps" / f"image{i}.png" for i in range(2)
    ]
    assert all(cv2.imread(str(each.overlay)) is not None for each in found)


@pytest.fixture
def point() -> Callable[..., OperatingPoint]:
    def make(temperature: float, **thresholds: float | None) -> OperatingPoint:
        found = {name: Threshold(value, None, None) for name, value in thresholds.items()}
        return OperatingPoint(temperature, Rule("youden"), found, images=9, patients=9)

    return make


def test_findings_of_an_operating_point(point) -> None:
    shares = {"left": 0.64, "none": 0.32, "right": 0.04}
    prediction = Prediction(Path("x.png"), "left", shares)
    [found] = with_findings([prediction], point(2.0, left=0.6, none=0.3, right=0.1))
    # At temperature 2 they are as their roots: 0.8, 0.566 and 0.2.
    roots = np.sqrt([0.64, 0.32, 0.04])
    assert found.calibrated == pytest.approx(dict(zip(shares, roots / roots.sum(), strict=True)))
    assert found.findings == ("none", "right")
    assert (found.label, found.probabilities) == ("left", shares)
    [found] = with_findings([prediction], point(1.0, left=None, none=0.3, right=None))
    assert found.findings == ("left", "none")


def test_findings_where_a_probability_is_zero(point) -> None:
    prediction = Prediction(Path("x.png"), "left", {"left": 1.0, "none": 0.0, "right": 0.0})
    [found] = with_findings([prediction], point(3.0, left=0.5, none=0.5, right=0.5))
    assert found.findings == ("left",)
    assert sum(found.calibrated.values()) == pytest.approx(1)
