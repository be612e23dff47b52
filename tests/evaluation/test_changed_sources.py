"""A run whose images have changed since, or that is measured on images with other names."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from typer.testing import CliRunner

from magsd import cli
from magsd.errors import ConfigError, DataError


def run(*arguments: str | Path) -> str:
    """Output of a command; its error is raised."""
    result = CliRunner(env={"COLUMNS": "200"}).invoke(cli.app, [str(a) for a in arguments])
    if result.exception is not None:
        raise result.exception
    return result.output


def write_images(folder: Path, *names: str) -> None:
    random = np.random.default_rng(len(names))
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(folder / name), random.integers(0, 256, (32, 32), np.uint8))


NAMES = [f"{label}/{n}.png" for label in "ab" for n in range(6)]


@pytest.fixture(scope="module")
def made(small_pairs: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images and a run that was trained on them."""
    root = tmp_path_factory.mktemp("changed")
    write_images(root / "images", *NAMES)
    pairs = [p for p in small_pairs if not p.startswith("data.source=")]
    run("train", "--data", f"folder:{root / 'images'}", "--out", root / "run", *pairs, "epochs=1")
    return root


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    """The same, to be changed; the configuration names the copy."""
    shutil.copytree(made, tmp_path / "copy")
    config = tmp_path / "copy" / "run" / "config.yaml"
    config.write_text(config.read_text().replace(str(made), str(tmp_path / "copy")))
    return tmp_path / "copy"


def tested(root: Path) -> list[str]:
    """Keys of the test images."""
    lines = (root / "run" / "split.csv").read_text().splitlines()[1:]
    return [line.split(",")[0] for line in lines if line.endswith("test")]


def measured(root: Path) -> Any:
    run("evaluate", root / "run", "--json", root / "report.json")
    return json.loads((root / "report.json").read_text())["raw"]


def test_an_image_that_was_added_is_left_out(root: Path, caplog) -> None:
    before = measured(root)
    write_images(root / "images", "a/new.png", "c/other.png")  # a class that is new, too
    assert measured(root) == before
    assert "2 images of the data are not listed, and left out, the first a/new.png" in caplog.text


@pytest.mark.parametrize("how", ["removed", "unreadable"])
def test_an_image_that_is_gone_is_counted(how: str, root: Path, caplog) -> None:
    first, *rest = tested(root)
    if how == "removed":
        (root / "images" / first).unlink()
    else:
        (root / "images" / first).write_bytes(b"no image")
    assert measured(root)["images"] == len(rest)
    assert f"1 listed images are not among the data, the first {first}" in caplog.text
    for key in rest:
        (root / "images" / key).unlink()
    with pytest.raises(DataError, match=r"none of the test images of .* is there"):
        measured(root)


def test_an_image_that_became_readable_is_left_out(
    made: Path, small_pairs: list[str], tmp_path: Path, caplog
) -> None:
    shutil.copytree(made / "images", tmp_path / "images")
    bad = tmp_path / "images" / "a" / "0.png"
    whole = bad.read_bytes()
    bad.write_bytes(b"no image")
    pairs = [p for p in small_pairs if not p.startswith("data.source=")]
    out = tmp_path / "run"
    command = ["--data", f"folder:{tmp_path / 'images'}", *pairs, "data.skip_bad=true"]
    run("train", "--out", out, *command, "epochs=1")
    before = measured(tmp_path)
    bad.write_bytes(whole)
    assert measured(tmp_path) == before
    assert "1 images of the data are not listed, and left out, the first a/0.png" in caplog.text
    run("train", "--resume", "--out", out, "epochs=2")
    assert "a/0.png" not in (out / "split.csv").read_text()


def test_a_run_does_not_resume_without_one_of_its_images(root: Path) -> None:
    (root / "images" / "a" / "0.png").unlink()
    with pytest.raises(DataError, match=r"1 listed images .*a/0\.png; .*put them back"):
        run("train", "--resume", "--out", root / "run", "epochs=2")


def test_test_images_that_became_unreadable_are_counted(root: Path) -> None:
    for key in tested(root):
        (root / "images" / key).write_bytes(b"no image")
    with pytest.raises(DataError, match=r"is there; \d+ others cannot be read"):
        measured(root)


@pytest.mark.parametrize("split", [b"x,y\n1,2\n", b"key,split\n\xff,train\n", b"key\na\n"])
def test_a_damaged_split_does_not_matter_to_other_images(root: Path, split: bytes) -> None:
    (root / "run" / "split.csv").write_bytes(split)
    shutil.copytree(root / "images", root / "others")
    assert "12 images of" in run("evaluate", root / "run", "--data", f"folder:{root / 'others'}")


def test_localize_of_changed_images(root: Path) -> None:
    first, *rest = tested(root)
    (root / "images" / first).unlink()
    write_images(root / "images", "c/other.png")
    assert f"{len(rest)} test images" in run(
        "localize", root / "run", "--out", root / "found", "--overlays", "0"
    )


@pytest.mark.parametrize("kind", ["folder", "csv", "v7", "cub"])
def test_a_relative_source_says_what_it_is_relative_to(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, root: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=rf"data/x: .* in the current folder, {tmp_path}"):
        run("evaluate", root / "run", "--data", f"{kind}:data/x")


class TestClasses:
    """Of images whose classes have other names."""

    @pytest.fixture
    def others(self, tmp_path: Path) -> str:
        names = ["Normal, healthy/0.png", "Normal, healthy/1.png", "covid/0.png", "other/0.png"]
        write_images(tmp_path / "others", *names)
        return f"folder:{tmp_path / 'others'}"

    @pytest.mark.parametrize("command", ["evaluate", "localize"])
    def test_both_lists_and_the_option_are_named(
        self, command: str, made: Path, others: str, tmp_path: Path
    ) -> None:
        extra = ["--out", tmp_path / "out"] if command == "localize" else []
        with pytest.raises(DataError) as caught:
            run(command, made / "run", "--data", others, *extra)
        text = str(caught.value)
        assert "among the classes a, b" in text
        assert "the labels are Normal, healthy, covid, other" in text
        assert "--classes 'THEIRS=OURS" in text

    def test_they_are_mapped(self, made: Path, others: str, tmp_path: Path) -> None:
        report = tmp_path / "r.json"
        mapping = '"Normal, healthy=a",covid=b,other='
        output = run(
            "evaluate", made / "run", "--data", others, "--classes", mapping, "--json", report
        )
        assert "3 images of" in output
        raw = json.loads(report.read_text())["raw"]
        assert [sum(row) for row in raw["confusion"]] == [2, 1]

    @pytest.mark.parametrize(
        ("mapping", "message"),
        [
            ("covid", "expected THEIRS=OURS"),
            ("covid=c", "ours of a, b"),
            ("covid=a,covid=b", "each of theirs once"),
            ("flu=a", "no label 'flu'; there are Normal, healthy, covid, other"),
            ("covid=a", "among the classes"),
        ],
    )
    def test_mappings_that_are_wrong(
        self, mapping: str, message: str, made: Path, others: str
    ) -> None:
        with pytest.raises((ConfigError, DataError), match=message):
            run("evaluate", made / "run", "--data", others, "--classes", mapping)

    def test_not_for_the_runs_own_images(self, made: Path) -> None:
        with pytest.raises(ConfigError, match="other sources"):
            run("evaluate", made / "run", "--classes", "a=b")
