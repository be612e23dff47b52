"""Predictions for files, and overlays of cached examples."""

from __future__ import annotations

import tracemalloc

import cv2
import numpy as np
import pytest
import torch

from magsd.data import BatchLoader
from magsd.errors import DataError, RunError
from magsd.evaluation import evaluate, predict_images, write_overlays
from magsd.models import MAGSD, ModelConfig, Preprocessing, build_model, load_model


@pytest.fixture
def files(cache, tmp_path):
    """The cache's images as PNG files."""
    paths = []
    for i, image in enumerate(cache.images):
        path = tmp_path / "in" / f"image{i:02d}.png"
        path.parent.mkdir(exist_ok=True)
        cv2.imwrite(str(path), image)
        paths.append(path)
    return paths


@pytest.mark.parametrize("refine", [False, True])
def test_same_as_evaluation(model, cache, classes, make_loader, files, refine):
    report = evaluate(model, make_loader(), cache, classes=classes)
    logits = report.predictions.refined_logits if refine else report.predictions.logits
    expected = torch.from_numpy(logits).softmax(1).numpy()
    predictions = predict_images(model, files, refine=refine, batch_size=5)
    assert [p.path for p in predictions] == files
    for prediction, row in zip(predictions, expected, strict=True):
        assert list(prediction.probabilities) == list(classes)
        np.testing.assert_allclose(list(prediction.probabilities.values()), row, atol=1e-5)
        assert prediction.label == classes[row.argmax()]
        assert sum(prediction.probabilities.values()) == pytest.approx(1)
        assert prediction.overlay is None


def test_saved_model_predicts_alone(model, files, tmp_path):
    model.save_pretrained(tmp_path / "saved")
    assert predict_images(load_model(tmp_path / "saved"), files) == predict_images(model, files)


def test_overlays_keep_the_proportions_of_the_file(model, tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        picture = np.random.default_rng(0).integers(0, 256, (80, 120)).astype(np.uint8)
        cv2.imwrite(str(tmp_path / folder / "x.png"), picture)
    paths = [tmp_path / "a" / "x.png", tmp_path / "b" / "x.png"]
    predictions = predict_images(model, paths, overlay_dir=tmp_path / "out")
    assert [p.overlay.name for p in predictions] == ["x.png", "x_2.png"]
    for prediction in predictions:
        height, width = cv2.imread(str(prediction.overlay)).shape[:2]
        assert width / height == pytest.approx(1.5, rel=0.01)


def test_missing_files_are_named_and_counted(model, files, tmp_path):
    gone = [tmp_path / f"gone{i}.png" for i in range(12)]
    with pytest.raises(DataError, match=r"12 of 24 images not found.*gone0\.png.*and 2 more"):
        predict_images(model, [*files, *gone])


def test_truncated_file_stops_or_is_reported(model, files):
    files[3].write_bytes(files[3].read_bytes()[:200])
    with pytest.raises(DataError, match=r"image03\.png"):
        predict_images(model, files)
    bad = []
    predictions = predict_images(
        model, [*files, files[0].with_name("gone.png")], on_bad=lambda p, why: bad.append((p, why))
    )
    assert [p.path for p in predictions] == files[:3] + files[4:]
    assert [p.name for p, _ in bad] == ["image03.png", "gone.png"]
    assert all(why for _, why in bad)


def test_three_channel_model(files):
    model = MAGSD("resnet18", 3, in_channels=3, attention_maps=2).eval()
    predictions = predict_images(
        model, files[:2], classes=("a", "b", "c"), preprocessing=Preprocessing(64, (4.0, 4))
    )
    assert len(predictions) == 2


def test_model_without_names(files):
    model = MAGSD("resnet18", 3, attention_maps=2)
    with pytest.raises(RunError, match="class names"):
        predict_images(model, files)
    with pytest.raises(RunError, match="preprocessing"):
        predict_images(model, files, classes=("a", "b", "c"))
    with pytest.raises(RunError, match="3 classes"):
        predict_images(model, files, classes=("a", "b"), preprocessing=Preprocessing(64, None))


def test_a_radiograph_is_not_replaced(model, cache, tmp_path):
    """Nor any other file; overlays of before are."""
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("x.png", "y.jpg"):
        cv2.imwrite(str(folder / name), cache.images[0])
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(RunError, match=r"x\.png: exists and was not written"):
        predict_images(model, [folder / "x.png"], overlay_dir=folder)
    (folder / "y.png").write_bytes(b"somebody's")
    with pytest.raises(RunError, match=r"y\.png: exists and was not written"):
        predict_images(model, [folder / "y.jpg"], overlay_dir=folder)
    assert all((folder / name).read_bytes() == data for name, data in before.items())
    for _ in range(2):
        [prediction] = predict_images(model, [folder / "y.jpg"], overlay_dir=tmp_path / "out")
        assert prediction.overlay.is_file()


def test_written_overlays_take_the_classes_in_turn(model, cache, classes, tmp_path):
    model.train()
    sheet = write_overlays(
        model, cache, [11, 0, 3, 6, 9, 1], tmp_path / "o", classes=classes, limit=5, title="t"
    )
    assert model.training
    assert sheet.name == "contact_sheet.png"
    assert cv2.imread(str(sheet)) is not None
    names = sorted(p.name for p in sheet.parent.glob("*.png"))
    assert names == [
        "000_left.png",
        "001_none.png",
        "002_right.png",
        "003_left.png",
        "004_left.png",
        "contact_sheet.png",
    ]
    with pytest.raises(ValueError, match="at least one"):
        write_overlays(model, cache, [], tmp_path / "o", classes=classes)


@pytest.mark.parametrize("draws", [False, True])
def test_one_decoded_file_at_a_time(tmp_path, draws):
    """A batch of large images is held at the sizes of the input and of the drawing."""
    path = tmp_path / "large.png"
    cv2.imwrite(str(path), np.zeros((2500, 2500, 3), np.uint8) + np.uint8([1, 2, 3]))
    torch.manual_seed(0)
    config = ModelConfig(name="plain", backbone="test_resnet", pretrained=False)
    model = build_model(config, 2, classes="ab", preprocessing=Preprocessing(64, None)).eval()
    overlays = tmp_path / "maps" if draws else None
    predict_images(model, [path], overlay_dir=overlays)  # modules are imported by now
    tracemalloc.start()
    try:
        predict_images(model, [path] * 16, overlay_dir=overlays)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    pixels, drawn = 2500 * 2500 * 3, 672 * 672 * 3
    # Decoding copies an image a few times; 16 of them would be 300 MB.
    assert peak < 4 * pixels + 16 * drawn + 30e6


@pytest.mark.parametrize("shape", [(1, 5000), (5000, 1), (70, 5000)])
def test_strips_are_drawn_in_bounded_memory(model, tmp_path, shape):
    image = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    cv2.imwrite(str(tmp_path / "strip.png"), image)
    (prediction,) = predict_images(model, [tmp_path / "strip.png"], overlay_dir=tmp_path / "o")
    drawn = cv2.imread(str(prediction.overlay)).shape[:2]
    assert max(drawn) == 4 * 672
    assert min(drawn) == max(round(min(shape) * max(drawn) / 5000), 32)
    assert drawn.index(max(drawn)) == shape.index(5000)


def test_loader_and_prediction_prepare_alike(cache, classes, files):
    """The input that prediction makes of a file is the one that training makes of it."""
    from magsd.evaluation.predict import _as_input, _read

    loader = BatchLoader(
        cache,
        [0, 1],
        classes,
        batch_size=2,
        shuffle=False,
        seed=0,
        augment=None,
        device="cpu",
        channels=3,
    )
    form = (Preprocessing(64, None), 3)
    read = [_read(file, [form], draws=False)[0][form] for file in files[:2]]
    prepared = _as_input(read)
    torch.testing.assert_close(prepared, next(iter(loader)).images)


def test_names_of_overlays_fit_the_file_system(model, tmp_path):
    files = [tmp_path / "a" / f"{'x' * 251}.png", tmp_path / "b" / f"{'x' * 251}.png"]
    for file in files:
        file.parent.mkdir()
        cv2.imwrite(str(file), np.zeros((40, 40), np.uint8))
    found = predict_images(
        model, files, classes=("a", "b", "c"), preprocessing=Preprocessing(64, None),
        overlay_dir=tmp_path / "out",
    )  # fmt: skip
    assert [p.overlay.name for p in found] == [f"{'x' * 240}.png", f"{'x' * 240}_2.png"]
    assert all(p.overlay.is_file() for p in found)
