"""evaluate: what it counts, refines, localizes, and writes."""

from __future__ import annotations

import dataclasses
import io
import json

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn

from magsd.errors import MagsdError
from magsd.evaluation import attention_inside, evaluate, refined_logits
from magsd.models import Classifier, ClassifierOutput
from magsd.runtime import Runtime
from magsd_kernels import attention_mixup


class Oracle(nn.Module):
    """Says which half of an image is brighter, and attends to a fixed place."""

    refine_weight = 0.4
    refined_view = Classifier.refined_view

    def __init__(self, saliency: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("map", saliency)

    def forward(self, images):
        left, right = images[..., :32].mean((1, 2, 3)), images[..., 32:].mean((1, 2, 3))
        difference = 30 * (left - right)
        logits = torch.stack([difference, torch.full_like(left, 1.5), -difference], dim=1)
        return ClassifierOutput(logits, None, images)

    def saliency(self, output):
        return self.map.expand(len(output.logits), -1, -1, -1)


def test_known_answers(cache, classes, make_loader):
    saliency = torch.zeros(1, 1, 8, 8)
    saliency[..., :4] = 1.0
    model = Oracle(saliency)
    report = evaluate(model, make_loader(), cache, classes=classes)
    assert report.raw.accuracy == 1.0
    assert report.raw.confusion == (4 * np.eye(3, dtype=int)).tolist()
    assert report.raw.images == 12
    overall = report.localization.overall
    assert overall.images == 8
    assert set(report.localization.per_class) == {"left", "right"}
    area = float((cache.masks[0] > 0).mean())
    assert overall.uniform == pytest.approx(area, rel=0.05)
    # The whole map lies in the left half: there it is twice as dense as a uniform map.
    assert report.localization.per_class["left"].gain == pytest.approx(2.0, rel=0.02)
    assert report.localization.per_class["right"].gain < 0.05
    assert report.images_per_second > 0
    assert model.training


def test_wrong_predictions_are_counted_at_their_place(cache, classes, make_loader):
    wrong = list(cache.records)
    wrong[0] = dataclasses.replace(wrong[0], label="right")
    cache = dataclasses.replace(cache, records=tuple(wrong))
    loader = make_loader(of=cache)
    report = evaluate(Oracle(torch.ones(1, 1, 2, 2)), loader, cache, classes=classes)
    assert report.raw.confusion == [[3, 0, 0], [0, 4, 0], [1, 0, 4]]


def test_refined_is_the_mean_over_raw_and_mixup(model, cache, classes, make_loader, monkeypatch):
    peak = torch.full((1, 1, 8, 8), 0.01)
    peak[..., 2, 5] = 1.0
    monkeypatch.setattr(model, "saliency", lambda output: peak.expand(len(output.logits), -1, 8, 8))
    report = evaluate(model, make_loader(batch_size=12), cache, classes=classes)
    batch = next(iter(make_loader(batch_size=12)))
    with torch.no_grad():
        output = model(batch.images)
        view = attention_mixup(
            batch.images, model.saliency(output), torch.full((12,), 0.5), padding=0.1, weight=0.4
        )
        expected = (output.logits + model(view).logits) / 2
    predictions = report.predictions
    torch.testing.assert_close(torch.from_numpy(predictions.refined_logits), expected)
    torch.testing.assert_close(torch.from_numpy(predictions.logits), output.logits)
    assert not np.allclose(predictions.refined_logits, predictions.logits, atol=1e-4)


def test_refinement_follows_the_model_saliency(cache, make_loader):
    """A map on one corner makes the view a crop of that corner."""
    saliency = torch.zeros(1, 1, 8, 8)
    saliency[..., 3:5, 0:3] = 1.0
    model = Oracle(saliency)
    batch = next(iter(make_loader([0])))
    output = model(batch.images)
    refined = refined_logits(model, batch.images, output, model.saliency(output))
    assert refined[0, 0] != output.logits[0, 0]


@pytest.mark.parametrize("batch_size", [1, 5, 12])
def test_batch_size_does_not_matter(model, cache, classes, make_loader, batch_size):
    whole = evaluate(model, make_loader(batch_size=12), cache, classes=classes)
    parts = evaluate(model, make_loader(batch_size=batch_size), cache, classes=classes)
    np.testing.assert_allclose(
        parts.predictions.logits, whole.predictions.logits, rtol=1e-4, atol=1e-4
    )
    assert parts.predictions.indices.tolist() == list(range(12))
    assert parts.localization.overall.images == 8
    assert parts.localization.overall.inside == pytest.approx(
        whole.localization.overall.inside, rel=1e-4
    )


def test_subset_in_any_order_reads_its_own_masks(model, cache, classes, make_loader):
    order = [8, 1, 0]
    report = evaluate(model, make_loader(order), cache, classes=classes)
    batch = next(iter(make_loader(order)))
    with torch.no_grad():
        saliency = model.saliency(model(batch.images))
    for place, name in ((0, "right"), (2, "left")):
        mask = torch.from_numpy(cache.masks[order[place]])[None]
        inside, _ = attention_inside(saliency[place : place + 1], mask)
        assert report.localization.per_class[name].inside == pytest.approx(inside.item(), rel=1e-4)


def test_without_masks_and_without_refinement(model, cache, classes, make_loader):
    bare = dataclasses.replace(cache, masks=None, has_mask=np.zeros(12, bool))
    for given in (None, bare):
        report = evaluate(model, make_loader(), given, classes=classes, refine=False)
        assert report.localization is None
        assert report.refined is None
        assert json.loads(report.to_json())["refined"] is None
    assert evaluate(model, make_loader([1, 4]), cache, classes=classes).localization is None


def test_mode_is_restored_also_after_an_error(model, cache, classes, make_loader):
    model.train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    evaluate(model, make_loader(), cache, classes=classes)
    assert model.training
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    with pytest.raises(MagsdError, match="no images"):
        evaluate(model, make_loader([]), cache, classes=classes)
    assert model.training


def test_bfloat16(model, cache, classes, make_loader):
    exact = evaluate(model, make_loader(), cache, classes=classes)
    bfloat16 = Runtime(precision="bfloat16")
    half = evaluate(model, make_loader(), cache, classes=classes, runtime=bfloat16)
    assert half.predictions.logits.dtype == np.float32
    np.testing.assert_allclose(half.predictions.logits, exact.predictions.logits, atol=0.1)
    assert not np.array_equal(half.predictions.logits, exact.predictions.logits)
    with pytest.raises(ValueError, match="float8"):
        Runtime(precision="float8")


def test_diverged_model_is_said_to_be_one(model, cache, classes, make_loader):
    with torch.no_grad():
        model.head.weight[0, 0] = float("nan")
    with pytest.raises(MagsdError, match="not finite for 12 of 12 images"):
        evaluate(model, make_loader(), cache, classes=classes)


def test_json(model, cache, classes, make_loader, tmp_path):
    report = evaluate(model, make_loader(range(6)), cache, classes=classes)
    text = report.to_json(tmp_path / "report.json")
    read = json.loads((tmp_path / "report.json").read_text())
    assert read == json.loads(text) == report.to_dict()
    assert read["raw"]["confusion"] == report.raw.confusion
    assert read["refined"]["per_class"]["left"]["recall"] == report.refined.per_class["left"].recall
    assert read["localization"]["overall"]["inside"] == report.localization.overall.inside
    # One class only: what is undefined is null.
    single = evaluate(model, make_loader([0, 3]), cache, classes=classes)
    assert json.loads(single.to_json())["raw"]["auroc"] is None


def test_tables_show_the_numbers(cache, classes, make_loader):
    report = evaluate(Oracle(torch.ones(1, 1, 4, 4)), make_loader(), cache, classes=classes)
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(report)
    text = console.export_text()
    for word in ("accuracy", "100.0%", "AUROC", "specificity", "Confusion", "left", "uniform map"):
        assert word in text
    assert "1.00" in text  # a uniform map draws as much attention as its area


def test_tables_of_an_undefined_number(model, cache, classes, make_loader):
    report = evaluate(model, make_loader([0, 3]), cache, classes=classes)
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(report)
    assert "nan" not in console.export_text()


def test_class_name_with_brackets_is_printed_as_it_is(cache, make_loader):
    model = Oracle(torch.ones(1, 1, 4, 4))
    report = evaluate(model, make_loader(), cache, classes=("[red]", "none", "right"))
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(report)
    assert console.export_text().count("[red]") == 4  # two rows and a column, and localization's
