"""Names that users choose are printed and drawn as they are: brackets, colons, dollars, length."""

from __future__ import annotations

import csv
import io
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from magsd import cli
from magsd.console import say
from magsd.evaluation import OverlayItem, contact_sheet, plot_confusion
from magsd.evaluation.overlay import save_items
from magsd.evaluation.plots import one_line, set_name

# To rich: an end without a beginning, a style, an emoji. To Matplotlib: a formula.
CLASSES = ("[/]", "[red]x", ":dog:", "$a$_1")
FILE = "scan[copy].png"
Command = Callable[..., str]


@pytest.fixture(scope="module")
def command() -> Command:
    """Output of the command, of which no line is folded; its errors are raised."""

    def call(*arguments: str | Path) -> str:
        words = [str(argument) for argument in arguments]
        result = CliRunner(env={"COLUMNS": "600"}).invoke(cli.app, words)
        if result.exception is not None:
            raise result.exception
        return result.output

    return call


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four images of each class, one of them `FILE`, with masks, under a folder "x[/b]"."""
    folder = tmp_path_factory.mktemp("named") / "x[" / "b]"
    folder.mkdir(parents=True)
    mask = np.zeros((32, 32), np.uint8)
    mask[8:16, 8:16] = 255
    cv2.imwrite(str(folder / "mask.png"), mask)
    rows = []
    for k in range(16):
        name = FILE if k == 0 else f":x:{k}.png"
        noise = np.random.default_rng(k).integers(0, 256, (32, 32)).astype(np.uint8)
        cv2.imwrite(str(folder / name), noise)
        rows.append([name, CLASSES[k % 4], "mask.png"])
    with open(folder / "labels[a].csv", "w", newline="") as file:
        csv.writer(file).writerows([["file", "label", "mask"], *rows])
    return folder / "labels[a].csv"


@pytest.fixture(scope="module")
def pairs(small_pairs: list[str], table: Path) -> list[str]:
    own = ("data.source", "epochs", "attention_maps")
    kept = [pair for pair in small_pairs if not pair.startswith(own)]
    return [*kept, f"data.source=csv:{table}", "epochs=1"]


def test_every_command(command: Command, table: Path, pairs: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run[" / ":cat:]"  # a closing tag for rich
    images = [table.parent / FILE, table.parent / ":x:1.png"]
    output = command("train", "--out", run, *pairs, "overlays=2")
    for name in (*CLASSES, table, run / "plots", run / "checkpoints" / "best.pt"):
        assert str(name) in output, name

    other = table.with_name("other[b].csv")
    other.write_bytes(table.read_bytes())
    output = command("evaluate", run, "--data", f"csv:{other}")
    for name in (*CLASSES, f"16 images of csv:{other}", f"of {run}:", "e.g. :x:"):
        assert str(name) in output, name

    output = command("predict", run, *images, "--overlay", tmp_path / "o[/x]", "--skip-bad", table)
    overlays = [tmp_path / "o[/x]" / f"{image.stem}.png" for image in images]
    for name in (*CLASSES, *images, *overlays, f"{table}: "):
        assert str(name) in output, name
    assert all(path.is_file() for path in overlays)

    output = command("localize", run, "--out", tmp_path / "maps[/]", "--data", f"csv:{table}")
    for name in (*CLASSES, tmp_path / "maps[/]"):
        assert str(name) in output, name

    recipe = tmp_path / "[i]m:dog:$.yaml"
    recipe.write_text("model:\n  name: plain\n")
    output = command(
        *("crossval", "--out", tmp_path / "[/]", "--model", recipe, "--model", "plain"),
        *("--folds", "0", *pairs),
    )
    for name in ("[i]m:dog:$, seed 0, fold 0", "against [i]m:dog:$ over", "[/]"):
        assert name in output, name
    shards = command("shards", "--data", f"csv:{table}", "--out", tmp_path / "s[/]", "folds=2")
    assert f"shards in {tmp_path / 's[/]'}" in shards


def test_lines_are_printed_as_they_are() -> None:
    file = io.StringIO()
    text = "[/] [red]x[/red] :dog: " + 200 * "long "
    say(Console(file=file, width=40), text, first="note:")
    assert file.getvalue() == f"note: {text}\n"


def test_names_in_pictures() -> None:
    assert set_name("$a$ and $b_1") == r"\$a\$ and \$b_1"
    assert one_line("two\nlines\udcff") == "two\ufffdlines\ufffd"
    assert one_line("pneumonia") == "pneumonia"
    short = one_line("Chevrolet Silverado 1500 Hybrid Crew Cab 2012")
    assert len(short) == 32
    assert short.startswith("Chevrolet S")
    assert short.endswith("Cab 2012")


@pytest.mark.parametrize(
    "names",
    [
        ["$a$", r"\frac{$x", "$_$"],
        ["n" * 200, "W" * 200, "k" * 200],
        ["肺炎", "正常", "肿瘤" * 100],
        ["العربية", "שלום", "ไทย"],
        ["two\nlines", "\udcff", "\x1b[1m"],
    ],
    ids=["formulas", "long", "Chinese", "right to left", "unprintable"],
)
def test_pictures_of_odd_names(names: list[str], tmp_path: Path) -> None:
    """Neither warnings nor a figure that grows with a name."""
    item = OverlayItem(
        np.full((64, 64), 100, np.uint8), np.eye(4), names[0], 0.5, names[1], name=names[2]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot = plot_confusion(tmp_path / "c.png", np.eye(3, dtype=int), names, title=names[0])
        sheet = contact_sheet(tmp_path / "s.png", [item], title=names[0])
        save_items(tmp_path / "items", [item])
    for path in (plot, sheet):
        assert max(cv2.imread(str(path)).shape) < 2000


def test_no_line_is_printed_past_say() -> None:
    """Rich would read the names in it as its markup."""
    package = Path(cli.__file__).parents[1]
    for path in package.rglob("*.py"):
        assert not re.search(r"onsole\.print\(\s*f[\"']", path.read_text()), path


def test_output_that_a_pipe_cannot_encode(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    monkeypatch.setattr(cli, "app", lambda: print("肺炎", "\udcff", flush=True))
    cli.main()
    assert raw.getvalue().split() == [rb"\u80ba\u708e", rb"\udcff"]
