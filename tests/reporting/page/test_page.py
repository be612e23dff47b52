"""`magsd report`: the page, the model card, JSON and CSV of predictions files."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, roc_auc_score

from magsd.errors import ConfigError, DataError, RunError
from magsd.reporting.bootstrap import Resampling
from magsd.reporting.page.charts import shorten
from magsd.reporting.page.curves import class_curves
from magsd.reporting.page.words import number
from magsd.reporting.predictions import PredictionTable, read_predictions, write_predictions

Made = Callable[..., Path]
Report = Callable[..., str]
# Attributes by which a page loads something from elsewhere.
LOADS = ("src", "srcset", "data", "poster", "background", "action", "xlink:href")


class Page(HTMLParser):
    """Text, tags, and what would be loaded."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text, self.tags, self.loads, self.ids = "", [], [], set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        given = dict(attrs)
        self.ids.add(given.get("id"))
        self.loads += [value for name, value in attrs if name in LOADS]
        if tag in ("link", "use", "image"):
            self.loads += [value for name, value in attrs if name.endswith("href")]
        self.loads += re.findall(r"url\(([^)]*)\)", given.get("style") or "")

    def handle_data(self, data):
        self.text += data


def page_of(folder: Path) -> Page:
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def rows(folder: Path, table: str) -> list[dict[str, str]]:
    with (folder / "tables" / f"{table}.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_numbers_are_those_of_scikit_learn_on_the_test_rows(folder: Path):
    table = read_predictions(folder.parent / "first.csv").side("test")
    found = {(r["model"], r["logits"], r["measure"]): r for r in rows(folder, "metrics")}
    for kind in ("raw", "refined"):
        scores = table.of(kind)
        accuracy = found["first", kind, "accuracy"]
        assert float(accuracy["value"]) == pytest.approx(
            accuracy_score(table.labels, scores.argmax(axis=1))
        )
        assert float(accuracy["low"]) < float(accuracy["value"]) < float(accuracy["high"])
        auroc = roc_auc_score(table.labels, scores, multi_class="ovr", average="macro")
        assert float(found["first", kind, "auroc"]["value"]) == pytest.approx(auroc)
    content = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    value = content["models"][0]["estimates"]["refined"]["overall"]["accuracy"]["value"]
    assert f"accuracy {value:.3f}" in page_of(folder).text
    assert content["side"] == "test"


def test_page_loads_nothing_and_needs_no_script(folder: Path):
    page = page_of(folder)
    loaded = [each for each in page.loads if not each.startswith(("data:", "#"))]
    assert not loaded
    assert "script" not in page.tags
    assert "link" not in page.tags
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"@import|url\(\s*['\"]?(?!#)", text)
    # What clips and marks are drawn with is on the page itself.
    used = re.findall(r"url\(#([^)]*)\)", text) + re.findall(r'xlink:href="#([^"]*)"', text)
    assert used
    assert set(used) <= page.ids


def test_page_holds_every_section_and_chart(folder: Path):
    page = page_of(folder)
    sections = {"data", "results", "curves", "operating", "calibration", "subgroups", "patients"}
    sections |= {"comparison", "pictures", "audit", "limits"}
    assert sections <= page.ids
    # ROC, precision-recall and decision curves and reliability of three classes, that of the
    # predicted class and the subgroup's: for either model.
    assert page.tags.count("svg") == 2 * (4 * 3 + 2)
    assert "first: refined minus raw predictions" in page.text
    assert "first minus second" in page.text


def test_same_predictions_give_the_same_files(folder: Path, report: Report, tmp_path: Path):
    root = folder.parent
    report(root / "first.csv", root / "second.csv", "--out", tmp_path / "again")
    for path in folder.rglob("*"):
        if path.is_file():
            again = tmp_path / "again" / path.relative_to(folder)
            assert again.read_bytes() == path.read_bytes(), path.name


def test_models_are_compared_over_the_same_images(folder: Path):
    found = rows(folder, "comparison")
    metrics = {
        (r["model"], r["logits"]): r for r in rows(folder, "metrics") if r["measure"] == "f1"
    }
    one = next(r for r in found if (r["second"], r["class"], r["measure"]) == ("second", "", "f1"))
    expected = float(metrics["first", "refined"]["value"]) - float(
        metrics["second", "raw"]["value"]
    )
    assert float(one["difference"]) == pytest.approx(expected)
    assert {r["test"] for r in found} == {"bootstrap", "DeLong"}
    assert {r["first"] for r in found} == {"first", "first (refined)"}
    errors = [r for r in found if r["measure"] == "ece"]
    assert len(errors) == 2
    for row in errors:
        assert row["difference"]
        assert row["low"] == row["high"] == row["p"] == ""
    assert "The difference of calibration errors has no interval and no p" in page_of(folder).text


def test_thresholds_are_fitted_on_validation_rows_alone(made: Made, report: Report, tmp_path: Path):
    file = made(tmp_path / "a.csv", patients=30)
    lines = file.read_text(encoding="utf-8").splitlines()
    label, split = (lines[0].split(",").index(name) for name in ("label", "split"))
    cells = [line.split(",") for line in lines[1:]]
    for row in cells:
        if row[split] == "test":
            row[label] = "pneumonia"
    other = tmp_path / "b.csv"
    other.write_text("\n".join([lines[0], *map(",".join, cells)]) + "\n", encoding="utf-8")
    points = []
    for path in (file, other):
        report(path, "--out", tmp_path / path.stem, "--rule", "sensitivity=0.9")
        content = json.loads((tmp_path / path.stem / "report.json").read_text(encoding="utf-8"))
        points.append(content["models"][0]["point"])
    assert points[0] == points[1]
    assert points[0]["rule"] == {"name": "sensitivity", "value": 0.9}


def test_validation_rows_alone_are_marked(made: Made, report: Report, tmp_path: Path):
    report(made(tmp_path / "a.csv", patients=30, splits=["validation"]), "--out", tmp_path / "out")
    text = page_of(tmp_path / "out").text
    assert text.count("Selected on these images") == 2
    assert "Selected on these images" in (tmp_path / "out" / "README.md").read_text("utf-8")


def test_files_of_others_need_label_and_probabilities_only(
    made: Made, report: Report, tmp_path: Path
):
    file = made(tmp_path / "theirs.csv", ("yes", "no"), patients=30, bare=True)
    report(file, "--out", tmp_path / "out")
    text = page_of(tmp_path / "out").text
    assert "theirs: no validation rows" in text
    assert "The file names no patients" in text
    assert "The file does not say what was trained on" in text
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    for each in (text, card.replace("\\", "")):
        assert "The file does not say whether the model was trained or tuned on them." in each
        assert "theirs: the file has no column split. If the model was trained" in each
        assert "test images" not in each
        assert "nothing was chosen" not in each
    assert "split:" not in card
    assert not rows(tmp_path / "out", "operating_points")
    # One reliability plot is drawn, and the caption promises no more.
    assert "equal numbers of images, of the predicted class. On" in text
    assert "percentiles of 100 resamples of" in text
    assert text.count("§ Reversed percentiles, not BCa") == 1


def test_images_without_a_named_patient_are_said(made: Made, report: Report, tmp_path: Path):
    file = made(tmp_path / "a.csv", patients=30, splits=["test"])
    text = file.read_text(encoding="utf-8")
    some, none = tmp_path / "some.csv", tmp_path / "none.csv"
    some.write_text(re.sub(r",p1\d?,", ",nan,", text), encoding="utf-8")
    none.write_text(re.sub(r",p\d+,", ",,", text), encoding="utf-8")
    report(some, "--out", tmp_path / "out")
    found = page_of(tmp_path / "out").text
    assert "60 test images of 41 patients" in found
    assert "22 images of 60 are without a named patient; each counts as one of its own." in found
    report(none, "--out", tmp_path / "out")
    found = page_of(tmp_path / "out").text
    assert "The file names no patients" in found
    assert "on 60 test images, on which" in found


def test_the_card_names_no_folders(report: Report, tmp_path: Path):
    file = tmp_path / "a.csv"
    header = "label,split,logit_a,logit_b,probability_a,probability_b\n"
    file.write_text(header + "a,test,0,0,0.6,0.4\nb,test,0,1,0.3,0.7\n" * 3, encoding="utf-8")
    report(file, "--out", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8").replace("\\", "")
    assert "a.csv: columns probability_* differ by up to" in card
    assert str(tmp_path) not in card


def test_names_are_shown_as_text(made: Made, report: Report, tmp_path: Path):
    classes = ('<b>&"</b>', "$x_1$ *y* | {{ 7 * 7 }}", "<script>alert(1)</script>")
    file = made(tmp_path / "a.csv", classes, patients=30)
    report(file, "--out", tmp_path / "out", "--name", "<i>model</i>")
    page = page_of(tmp_path / "out")
    assert not {"b", "i", "script"} & set(page.tags)
    for name in (*classes, "<i>model</i>"):
        assert name in page.text
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "\\<script\\>" in card
    assert "<script>" not in card.partition("\n---\n")[2]


def test_fifteen_classes(made: Made, report: Report, tmp_path: Path):
    classes = [f"finding with a long name, number {k}" for k in range(20)]
    for count in (15, 20):
        file = made(tmp_path / f"{count}.csv", classes[:count], patients=120)
        report(file, "--out", tmp_path / str(count))
        page = page_of(tmp_path / str(count))
        assert page.tags.count("svg") == 4 * 15 + 2
        assert len({row["class"] for row in rows(tmp_path / str(count), "per_class")}) == count
        assert ("(15 of 20 classes, of the lowest AUROC)" in page.text) == (count == 20)


def test_a_class_without_images_is_undefined_and_said(made: Made, report: Report, tmp_path: Path):
    file = made(tmp_path / "a.csv", patients=30)
    lines = file.read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if ",test," not in line or not line.startswith("covid")]
    file.write_text("\n".join(kept) + "\n", encoding="utf-8")
    report(file, "--out", tmp_path / "out")
    text = page_of(tmp_path / "out").text
    assert "No image is of class covid-19" in text
    assert "NaN" not in (tmp_path / "out" / "report.json").read_text(encoding="utf-8")
    assert not re.search(r"\bnan\b", text)
    found = {(r["class"], r["measure"]): r["value"] for r in rows(tmp_path / "out", "per_class")}
    assert found["covid-19", "auroc"] == ""


def test_three_images(made: Made, report: Report, tmp_path: Path):
    file = tmp_path / "a.csv"
    text = "label,probability_a,probability_b\na,0.9,0.1\nb,0.2,0.8\na,0.4,0.6\n"
    file.write_text(text, encoding="utf-8")
    report(file, "--out", tmp_path / "out")
    assert "There are 3 images in all" in page_of(tmp_path / "out").text


def test_subgroups(made: Made, report: Report, tmp_path: Path):
    file = made(tmp_path / "a.csv", patients=40)
    report(file, "--out", tmp_path / "out")
    found = rows(tmp_path / "out", "subgroups")
    assert {(r["column"], r["group"]) for r in found} == {("view", "AP"), ("view", "PA")}
    # The columns of the first file count; the second need not have them.
    lines = [line.split(",") for line in file.read_text(encoding="utf-8").splitlines()]
    place = lines[0].index("view")
    lines = [",".join(line[:place] + line[place + 1 :]) for line in lines]
    (tmp_path / "b.csv").write_text("\n".join(lines), encoding="utf-8")
    report(file, tmp_path / "b.csv", "--out", tmp_path / "out", "--subgroup", "view")
    groups = [r["group"] for r in rows(tmp_path / "out", "subgroups") if r["model"] == "b"]
    assert set(groups) == {"AP", "PA"}
    # The first six columns are taken; the page names the others.
    text = file.read_text(encoding="utf-8").splitlines()
    more = [",".join(f"c{k}" for k in range(7)), *[",".join("xy"[i % 2] * 7) for i in range(80)]]
    lines = [f"{line},{cells}" for line, cells in zip(text, more, strict=True)]
    (tmp_path / "c.csv").write_text("\n".join(lines), encoding="utf-8")
    report(tmp_path / "c.csv", "--out", tmp_path / "out")
    assert len({r["column"] for r in rows(tmp_path / "out", "subgroups")}) == 6
    assert "Not shown: c5, c6." in page_of(tmp_path / "out").text
    with pytest.raises(DataError, match="sex"):
        report(file, "--out", tmp_path / "out", "--subgroup", "sex")
    with pytest.raises(DataError, match=r"--subgroup view=x: expected numbers"):
        report(file, "--out", tmp_path / "out", "--subgroup", "view=x")


def test_models_of_the_same_predictions_have_the_same_accuracy(
    made: Made, report: Report, tmp_path: Path
):
    file = made(tmp_path / "a.csv", patients=30)
    report(file, file, "--name", "x", "--name", "y", "--out", tmp_path / "out")
    text = page_of(tmp_path / "out").text
    assert "x and y have the same accuracy." in text
    assert "()" not in text
    assert "which of them is better" not in text
    # Nothing says where others' images come from.
    assert "Whether the images are of one or of several hospitals is not known" in text


def test_numbers_that_round_to_zero_have_no_sign():
    texts = ["0.000", "0.000", "\u22120.001", "0.500"]
    assert [number(value) for value in (-0.0001, -0.0, -0.0006, 0.5)] == texts


def test_the_band_of_precision_does_not_fall_where_a_resample_lacks_the_highest_score():
    labels = np.arange(40) % 2
    scores = np.where(labels == 1, 0.6, 0.2) + np.arange(40) / 200
    table = PredictionTable(
        "a", ("x", "y"), *(np.arange(40).astype(np.str_) for _ in range(2)),
        np.full(40, "test"), labels, np.stack([1 - scores, scores], axis=1),
    )  # fmt: skip
    found = class_curves(table, "raw", 1, Resampling(50))
    for values in (found.precision_recall.y, found.precision_recall.low):
        assert values.tolist() == [1.0] * len(values)


def test_names_are_shortened_by_their_width():
    assert shorten("finding with a name of 34 letters.") == "finding with a name of 34 letters."
    assert shorten("a" * 35) == "a" * 16 + "…" + "a" * 17
    for wide in ("W" * 34, "肺炎" * 17):
        head, tail = shorten(wide).split("…")
        assert wide.startswith(head)
        assert wide.endswith(tail)
        assert 14 < len(head + tail) < 20
    accents = "é" * 34
    assert shorten(accents) == accents


def test_patients_are_measured_once(folder: Path):
    table = read_predictions(folder.parent / "second.csv").side("test")
    found = [r for r in rows(folder, "patients") if r["model"] == "second"]
    assert {int(r["patients"]) for r in found} == {table.num_patients}
    names = np.unique(table.patients)
    mean = np.stack([table.probabilities[table.patients == n].mean(axis=0) for n in names])
    labels = [table.labels[table.patients == n][0] for n in names]
    accuracy = next(r for r in found if r["measure"] == "accuracy")
    assert float(accuracy["value"]) == pytest.approx((mean.argmax(axis=1) == labels).mean())


def test_the_highest_of_a_patient_s_probabilities_are_divided_by_their_sum(
    made: Made, report: Report, tmp_path: Path
):
    report(made(tmp_path / "a.csv", patients=30), "--out", tmp_path / "out", "--aggregate", "max")
    text = page_of(tmp_path / "out").text
    assert "over its test images, divided by their sum over the classes" in text


def test_what_is_resampled_and_by_which_seed(made: Made, report: Report, tmp_path: Path):
    file = made(tmp_path / "a.csv", patients=30)
    accuracy = {}
    for name, options in {
        "": (),
        "again": (),
        "image": ("--by", "image"),
        "1": ("--seed", "1"),
    }.items():
        report(file, "--out", tmp_path / f"out{name}", *options)
        found = next(
            r for r in rows(tmp_path / f"out{name}", "metrics") if r["measure"] == "accuracy"
        )
        accuracy[name] = [float(found[limit]) for limit in ("value", "low", "high")]
    assert accuracy["again"] == accuracy[""]
    assert accuracy["1"][0] == accuracy["image"][0] == accuracy[""][0]
    assert accuracy["1"] != accuracy[""] != accuracy["image"]
    assert "resamples of images" in page_of(tmp_path / "outimage").text


def test_results_by_study(made: Made, report: Report, tmp_path: Path):
    """A unit other than the patient: a column of the file."""
    table = read_predictions(made(tmp_path / "a.csv", patients=30))
    studies = np.where(np.arange(len(table)) % 5, table.patients, table.keys)
    write_predictions(tmp_path / "a.csv", replace(table, extra={"study": studies}))
    report(tmp_path / "a.csv", "--out", tmp_path / "out", "--aggregate-by", "study")
    assert "One prediction for each study" in page_of(tmp_path / "out").text
    (count,) = {row["patients"] for row in rows(tmp_path / "out", "patients")}
    assert int(count) == len(np.unique(studies[table.splits == "test"])) > 0
    with pytest.raises(DataError, match="no column 'stay'"):
        report(tmp_path / "a.csv", "--out", tmp_path / "out", "--aggregate-by", "stay")


def test_model_card_is_read_by_the_hub_s_own_library(folder: Path):
    from huggingface_hub import ModelCard

    card = ModelCard.load(folder / "README.md", ignore_metadata_errors=False)
    results = {each.metric_type: each.metric_value for each in card.data.eval_results}
    found = {(r["model"], r["logits"], r["measure"]): r for r in rows(folder, "metrics")}
    expected = float(found["first", "refined", "accuracy"]["value"])
    assert results["accuracy"] == pytest.approx(expected, abs=1e-4)
    headings = re.findall(r"^## (.*)$", card.text, flags=re.MULTILINE)
    assert headings == ["Intended use", "Model", "Data", "Metrics", "Limits"]


def test_models_with_another_order_of_the_classes_are_compared(
    made: Made, report: Report, tmp_path: Path
):
    file = made(tmp_path / "ours.csv", patients=30)
    with file.open(newline="", encoding="utf-8") as lines:
        cells = list(csv.DictReader(lines))
    turned = [dict(reversed(row.items())) for row in cells]
    with (tmp_path / "theirs.csv").open("w", newline="", encoding="utf-8") as lines:
        writer = csv.DictWriter(lines, turned[0])
        writer.writeheader()
        writer.writerows(turned)
    report(file, tmp_path / "theirs.csv", "--out", tmp_path / "out")
    found = rows(tmp_path / "out", "operating_points")
    names = ("class", "threshold", "true_positives", "false_positives", "measure", "value")
    both = [
        [tuple(row[name] for name in names) for row in found if row["model"] == model]
        for model in ("ours", "theirs")
    ]
    assert len(both[0]) == 12
    for one, other in zip(*both, strict=True):
        assert one[0] == other[0]
        assert float(one[1]) == pytest.approx(float(other[1]))
        assert one[2:] == other[2:]


def test_audit_is_shown(made: Made, report: Report, tmp_path: Path):
    row = {"name": "size", "group": "size", "auroc": 0.93, "deviation": 0.02, "permuted": 0.51}
    image = {"key": "a.png", "label": "x", "patient": "1", "side": "train"}
    across = {f"across_{word}": word == "sides" for word in ("sides", "classes", "patients")}
    audit = {
        "source": "csv:labels.csv",
        "images": 90,
        "findings": [{"level": "warning", "text": "told from the <size> alone"}],
        "pairs": [{"kind": "exact", "first": image, "second": image | {"key": "b.png"}, **across}],
        "shortcuts": {"rows": [row | {"verdict": "warning"}]},
    }
    file, out = made(tmp_path / "a.csv", patients=30), tmp_path / "out"
    (tmp_path / "audit.json").write_text(json.dumps(audit), encoding="utf-8")
    report(file, "--out", out, "--audit", tmp_path / "audit.json")
    text = page_of(out).text
    assert "told from the <size> alone" in text
    assert "Brightness and markers may partly be the disease itself." in text
    assert "a.png and b.png" in text
    assert "0.93" in text
    assert "was not audited" not in text
    del audit["shortcuts"]["rows"][0]["auroc"]
    (tmp_path / "audit.json").write_text(json.dumps(audit), encoding="utf-8")
    with pytest.raises(DataError, match=r"audit\.json is damaged"):
        report(file, "--out", out, "--audit", tmp_path / "audit.json")


def test_bad_files_are_named_before_anything_is_written(made: Made, report: Report, tmp_path: Path):
    file, out = made(tmp_path / "a.csv", patients=30), tmp_path / "out"
    missing = made(tmp_path / "other.csv", ("covid-19", "no-finding"), patients=30)
    with pytest.raises(DataError, match="pneumonia"):
        report(file, missing, "--out", out)
    bad = tmp_path / "bad.csv"
    bad.write_text("label,probability_a,probability_b\na,0.9,0.3\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"bad\.csv, line 2.*sum to 1\.2"):
        report(bad, "--out", out)
    train = made(tmp_path / "train.csv", patients=30, splits=["train"])
    with pytest.raises(DataError, match="no row of split test, external, validation"):
        report(train, "--out", out)
    with pytest.raises(RunError, match=r"nowhere: no such file"):
        report(tmp_path / "nowhere", "--out", out)
    with pytest.raises(ConfigError, match=r"--name is given 1 times for 2"):
        report(file, missing, "--name", "x", "--out", out)
    with pytest.raises(ConfigError, match="sensitivity=x"):
        report(file, "--rule", "sensitivity=x", "--out", out)
    assert not out.exists()


def test_no_file_of_others_is_replaced(made: Made, report: Report, tmp_path: Path):
    file, out = made(tmp_path / "a.csv", patients=30), tmp_path / "out"
    out.mkdir()
    (out / "README.md").write_text("mine", encoding="utf-8")
    with pytest.raises(RunError, match=r"holds README\.md, not written by this command"):
        report(file, "--out", out)
    assert (out / "README.md").read_text(encoding="utf-8") == "mine"
    (out / "README.md").unlink()
    report(file, "--out", out)
    report(file, "--out", out)
