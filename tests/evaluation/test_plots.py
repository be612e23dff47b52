"""Confusion matrix and training curves."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from magsd.errors import RunError
from magsd.evaluation import plot_confusion, plot_curves
from magsd.evaluation.plots import _panels, _read_metrics

HEADER = (
    "epoch,step,lr,train_loss,train_cross_entropy,train_distance,train_accuracy,"
    "validation_loss,validation_accuracy,validation_balanced_accuracy,seconds,images_per_second\n"
)
ROWS = (
    "1,10,0.001,1.2,1.0,0.2,0.4,1.1,0.5,0.45,0.9,80\n"
    "2,20,0.0001,0.8,0.7,0.1,0.6,0.9,0.7,0.65,0.9,82\n"
)


def test_confusion_picture(tmp_path):
    path = plot_confusion(tmp_path / "a" / "c.png", [[9, 1], [0, 0]], ["a", "b"], title="t")
    dark = cv2.imread(str(path)).astype(int)
    assert dark.shape[0] > 200
    blue = dark[..., 0] - dark[..., 2] > 60
    assert blue[: len(blue) // 2].sum() > blue[len(blue) // 2 :].sum()  # row a has the full cell
    with pytest.raises(ValueError, match="confusion"):
        plot_confusion(tmp_path / "c.png", [[1, 2]], ["a", "b"])


def test_curves_picture(tmp_path):
    csv = tmp_path / "metrics.csv"
    csv.write_text(HEADER + ROWS)
    picture = cv2.imread(str(plot_curves(tmp_path / "plots" / "curves.png", csv)))
    assert picture.shape[1] > 2 * picture.shape[0]  # three panels side by side


def test_columns_go_to_their_panels(tmp_path):
    csv = tmp_path / "metrics.csv"
    csv.write_text(HEADER + ROWS)
    assert _panels(_read_metrics(csv)) == {
        "loss": ["train_loss", "train_cross_entropy", "train_distance", "validation_loss"],
        "accuracy": ["train_accuracy", "validation_accuracy", "validation_balanced_accuracy"],
        "learning rate": ["lr"],
    }


def test_gaps_and_texts_are_skipped(tmp_path):
    csv = tmp_path / "metrics.csv"
    csv.write_text("epoch,train_loss,accuracy,note\n1,2.0,,x\n2,4.0,0.5,y\n3,1.0,nan,z\n")
    table = _read_metrics(csv)
    assert "note" not in table
    np.testing.assert_array_equal(table["accuracy"], [np.nan, 0.5, np.nan])
    assert _panels(table)["accuracy"] == ["accuracy"]
    plot_curves(tmp_path / "curves.png", csv)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no training metrics"),
        ("", "no column 'epoch'"),
        ("a,b\n1,2\n", "no column 'epoch'"),
        ("epoch,note\n1,x\n", "no curve"),
    ],
)
def test_bad_files(tmp_path, text, message):
    csv = tmp_path / "metrics.csv"
    if text is not None:
        csv.write_text(text)
    with pytest.raises(RunError, match=message):
        plot_curves(tmp_path / "curves.png", csv)
