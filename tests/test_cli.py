"""The commands, run in this process where nothing else is at stake."""

from __future__ import annotations

import json
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from typer.testing import CliRunner

from magsd import cli
from magsd.cli import training_config
from magsd.config import load_config
from magsd.data.cache import prepare_image
from magsd.data.images import read_image_file
from magsd.data.run_data import preprocessing_of
from magsd.data.run_sides import same_source
from magsd.errors import ConfigError, DataError, RunError
from magsd.reporting.predictions import read_predictions
from magsd.training.run_folder import RunFolder
from magsd.training.trainer import Interrupted
from magsd_kernels import info, native

backends = sys.modules["magsd_kernels.backends"]  # a function has its name in the package

Process = Callable[..., subprocess.CompletedProcess[str]]


def run(*arguments: str | Path) -> tuple[int, str]:
    """Exit code and output of the command; an error that `main` would print is raised."""
    result = CliRunner(env={"COLUMNS": "200"}).invoke(cli.app, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


@pytest.fixture(scope="module")
def pairs(small_pairs: list[str]) -> list[str]:
    return [*small_pairs, "epochs=1", "overlays=2"]


@pytest.fixture(scope="module")
def trained(pairs: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cli") / "run"
    code, output = run("train", "--out", out, *pairs, "--kernels", "reference")
    assert code == 0, output
    return out


@pytest.fixture
def process(run_python: Process) -> Process:
    return partial(run_python, "-m", "magsd")


@pytest.fixture
def warm_process(warm_python: Process) -> Process:
    return partial(warm_python, "-m", "magsd")


def test_help_is_quick_and_lists_commands(process: Process, run_python: Process) -> None:
    code = "import sys, magsd.cli; assert not {'torch', 'timm', 'cv2'} & set(sys.modules)"
    assert run_python("-c", code).returncode == 0
    done = process("--help")
    assert done.returncode == 0
    assert all(
        word in done.stdout
        for word in ("train", "evaluate", "predict", "localize", "crossval", "info")
    )


def test_processes_run_the_package_under_test(
    process: Process, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not a checkout in the current folder, which may lack the compiled kernels."""
    (tmp_path / "magsd").mkdir()
    (tmp_path / "magsd" / "__init__.py").write_text("raise SystemExit(7)")
    monkeypatch.chdir(tmp_path)
    assert process("--help").returncode == 0


def test_errors_are_one_message_and_exit_code_2(warm_process: Process, tmp_path: Path) -> None:
    done = warm_process("train", "--out", tmp_path / "run", "epoch=3")
    assert done.returncode == 2
    assert done.stderr.strip() == "magsd: unknown key 'epoch'; did you mean 'train.epochs'?"
    assert not (tmp_path / "run").exists()


def test_missing_extra_says_what_to_install(
    process: Process, pairs: list[str], tmp_path: Path
) -> None:
    """Stand-ins that fail to import, as on a machine with the base install alone."""
    (tmp_path / "timm.py").write_text("raise ModuleNotFoundError('no', name='timm')")
    done = process("train", "--out", tmp_path / "run", *pairs, PYTHONPATH=tmp_path)
    assert done.returncode == 2, done.stderr
    assert "pip install 'magsd[train]'" in done.stderr
    (tmp_path / "typer.py").write_text("raise ModuleNotFoundError('no', name='typer')")
    done = process("--help", PYTHONPATH=tmp_path)
    assert done.returncode != 0
    assert "pip install 'magsd[train]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_train_without_anything_uses_the_phantom() -> None:
    assert training_config([], None, None, None) == load_config("phantom")
    config = training_config(["epochs=3"], None, "phantom:n=60", "reference")
    assert (config.model.pretrained, config.train.epochs) == (False, 3)
    assert (config.data.source, config.train.kernels) == ("phantom:n=60", "reference")


def test_train_on_own_data_uses_the_published_recipe() -> None:
    for config in (
        training_config([], None, "folder:/x", None),
        training_config(["data.source=folder:/x"], None, None, None),
    ):
        assert (config.optim.name, config.train.epochs) == ("sgd", 150)
        assert (config.model.backbone, config.data.source) == ("resnet50", "folder:/x")


def test_resume_needs_out_and_excludes_overwrite() -> None:
    with pytest.raises(ConfigError, match="--out"):
        run("train", "--resume")
    with pytest.raises(ConfigError, match="exclude"):
        run("train", "--resume", "--overwrite", "--out", "x")


def test_the_resume_hint_can_be_pasted(
    pairs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import magsd.training.run

    def stop(*_: Any, **__: Any) -> None:
        raise Interrupted(signal.SIGTERM, tmp_path / "last.pt")

    monkeypatch.setattr(magsd.training.run, "train_run", stop)
    out = tmp_path / "it's my run"
    code, output = run("train", "--out", out, *pairs)
    assert code == 128 + signal.SIGTERM
    hint = output.partition("resume with: ")[2].strip()
    assert shlex.split(hint) == ["magsd", "train", "--resume", "--out", str(out)]


def test_an_interruption_says_of_what(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop() -> None:
        raise KeyboardInterrupt("images of folder:x were being prepared")

    monkeypatch.setattr(cli, "app", stop)
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 128 + signal.SIGINT
    assert capsys.readouterr().err == (
        "magsd: interrupted: images of folder:x were being prepared\n"
    )


def test_train_writes_a_run_and_a_table(trained: Path) -> None:
    for name in ("config.yaml", "split.csv", "metrics.csv", "checkpoints/best.pt"):
        assert (trained / name).is_file(), name
    code, output = run("train", "--resume", "--out", trained)
    assert code == 0
    for words in ("test accuracy", "validation accuracy", "attention inside masks", "images/s"):
        assert words in output, words
    assert "test side: 24 images; nothing was selected on these images" in output


ALL = "all operations, on cpu"
OTHERS = ", ".join(name for name in backends.OPERATIONS if name != "soft_distance")


@pytest.mark.parametrize(
    ("option", "variable", "missing", "line"),
    [
        ("reference", None, {}, f"reference (PyTorch) for {ALL}"),
        ("reference", "cpu", {}, f"reference (PyTorch) for {ALL}"),
        (None, "reference", {}, f"reference (PyTorch) for {ALL}"),
        ("cpu", None, {}, f"cpu (C++, {{}}) for {ALL}"),
        (None, None, {}, f"cpu (C++, {{}}) for {ALL}"),
        (
            None,
            None,
            {("cpu", "soft_distance"): "not written"},
            f"cpu (C++, {{}}) for {OTHERS}; "
            "reference (PyTorch) for soft_distance (cpu: not written), on cpu",
        ),
    ],
)
def test_train_says_what_runs_the_operations(
    option: str | None,
    variable: str | None,
    missing: dict[tuple[str, str], str],
    line: str,
    pairs: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One line, before the images are read: that fails here, which keeps the test short."""
    if "{}" in line:
        if backends.backends()["cpu"] != "available":
            pytest.skip(f"no cpu kernels: {backends.backends()['cpu']}")
        line = line.format(native.instruction_set())
    why_not = backends.why_not

    def why_not_here(backend: str, operation: str, *tensors: Any) -> str | None:
        return missing.get((backend, operation)) or why_not(backend, operation, *tensors)

    monkeypatch.setattr(backends, "why_not", why_not_here)
    monkeypatch.setattr(info, "why_not", why_not_here)
    monkeypatch.setattr(backends, "_resolved", {})
    if variable is not None:
        monkeypatch.setenv("MAGSD_BACKEND", variable)
    else:
        monkeypatch.delenv("MAGSD_BACKEND", raising=False)
    words = ["train", "--out", str(tmp_path / "run"), *pairs, "--data", "folder:/nowhere"]
    words += [] if option is None else ["--kernels", option]
    result = CliRunner(env={"COLUMNS": "200"}).invoke(cli.app, words)
    assert isinstance(result.exception, DataError)
    said = [text for text in result.output.splitlines() if text.startswith("kernels: ")]
    assert said == [f"kernels: {line}"]


@pytest.mark.parametrize(
    ("variable", "message"),
    [
        ("fast", "backend must be one of reference, cpu"),
        ("triton", "backend 'triton' cannot run here: "),
    ],
)
def test_a_backend_of_the_environment_that_cannot_run_is_one_message(
    variable: str, message: str, pairs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MAGSD_BACKEND", variable)
    monkeypatch.setitem(backends._DEVICES, "triton", ("xpu",))
    monkeypatch.setattr(backends, "_resolved", {})
    with pytest.raises(ConfigError, match=message):
        run("train", "--out", tmp_path / "run", *pairs)
    assert not (tmp_path / "run").exists()


def test_train_refuses_another_runs_folder(trained: Path, pairs: list[str]) -> None:
    with pytest.raises(RunError, match="holds another run"):
        run("train", "--out", trained, *pairs)


def test_evaluate_own_test_side(trained: Path, tmp_path: Path) -> None:
    file, table = tmp_path / "deep" / "report.json", tmp_path / "predictions.csv"
    code, output = run("evaluate", trained, "--json", file, "--predictions", table)
    assert code == 0
    assert "24 test images of the run's own source" in output
    report = json.loads(file.read_text())
    assert report["side"] == "test"
    assert report["classes"] == ["diffuse", "focal", "ground-glass", "normal"]
    tested = (trained / "split.csv").read_text().count(",test")
    assert report["raw"]["images"] == tested == 24
    for name in ("accuracy", "precision", "recall", "f1", "specificity", "false_positive_rate"):
        assert 0 <= report["raw"][name] <= 1
        assert 0 <= report["refined"][name] <= 1
    assert "auroc" in report["raw"]
    assert report["localization"]["overall"]["images"] > 0
    assert (trained / "plots" / "test" / "confusion.png").is_file()
    whole = json.loads((trained / "evaluation.json").read_text())
    assert (whole["raw"], whole["side"]) == (report["raw"], "test")
    assert whole["validation"]["raw"]["images"] == 12
    # The same rows as in the run's folder, where validation comes first.
    lines = (trained / "predictions.csv").read_text().splitlines()
    assert [lines[0], *lines[13:]] == table.read_text().splitlines()


def test_evaluate_other_data_takes_all_of_it(trained: Path, tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    source = "phantom:n=12,seed=9,size=32"
    code, output = run("evaluate", trained, "--data", source, "--json", file)
    assert code == 0
    report = json.loads(file.read_text())
    assert (report["raw"]["images"], report["side"]) == (12, "external")
    assert "trained on" not in output
    assert (trained / "plots" / "evaluation" / "confusion.png").is_file()


def test_evaluate_warns_of_training_images_under_another_name(trained: Path) -> None:
    _, output = run("evaluate", trained, "--data", "phantom:n=30,size=32")
    assert "19 of them have names that the run trained on or was selected on" in output


def test_same_source_sees_through_paths(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert same_source("csv:a.csv", f"csv:{tmp_path}/x/../a.csv")
    assert not same_source("csv:a.csv", "folder:a.csv")
    assert not same_source("csv:a.csv", "csv:b.csv")
    assert same_source("phantom:n=3", "phantom:n=3")


def test_evaluate_refuses_a_label_it_was_not_trained_on(trained: Path, tmp_path: Path) -> None:
    for label in ("normal", "fracture"):
        (tmp_path / label).mkdir()
        cv2.imwrite(str(tmp_path / label / "a.png"), np.zeros((40, 40), np.uint8))
    with pytest.raises(DataError, match=r"'fracture'.*ground-glass"):
        run("evaluate", trained, "--data", f"folder:{tmp_path}")


def test_localize(trained: Path, tmp_path: Path) -> None:
    code, output = run("localize", trained, "--out", tmp_path / "maps", "--overlays", "3")
    assert code == 0
    for words in ("24 test images of the run's own source", "IoU of best box", "pointing game"):
        assert words in output, words
    report = json.loads((tmp_path / "maps" / "localization.json").read_text())
    evaluation = json.loads((trained / "evaluation.json").read_text())["localization"]["overall"]
    means = report["overall"]["means"]
    assert report["overall"]["images"] == evaluation["images"]
    assert means["values"]["inside"] == pytest.approx(evaluation["inside"], rel=1e-4)
    assert means["uniform"]["inside"] == pytest.approx(evaluation["uniform"], rel=1e-4)
    assert (tmp_path / "maps" / "boxes.csv").read_text().count("phantom/0/") > 0
    assert len(list((tmp_path / "maps" / "overlays").glob("0*.png"))) == 3


def test_predict(trained: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images = []
    for name in ("a.png", "b.jpg"):
        images.append(tmp_path / name)
        cv2.imwrite(str(images[-1]), rng.integers(0, 255, (50, 60), dtype=np.uint8))
    file = tmp_path / "out.json"
    code, output = run("predict", trained, *images, "--overlay", tmp_path / "maps", "--json", file)
    assert code == 0, output
    found = json.loads(file.read_text())
    assert [row["image"] for row in found] == [str(path) for path in images]
    for row in found:
        assert sum(row["probabilities"].values()) == pytest.approx(1)
        assert row["label"] == max(row["probabilities"], key=row["probabilities"].get)
        assert Path(row["overlay"]).read_bytes().startswith(b"\x89PNG")


def test_predict_on_another_device(trained: Path, tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((40, 40), np.uint8))
    assert run("predict", trained, tmp_path / "a.png", "--device", "cpu")[0] == 0
    with pytest.raises(ConfigError, match=r"train\.device=nothing"):
        run("predict", trained, tmp_path / "a.png", "--device", "nothing")


def test_predict_names_images_it_cannot_read(trained: Path, tmp_path: Path) -> None:
    good = tmp_path / "good.png"
    cv2.imwrite(str(good), np.zeros((40, 40), np.uint8))
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no image")
    with pytest.raises(DataError, match=r"bad\.png.*--skip-bad"):
        run("predict", trained, good, bad)
    file = tmp_path / "out.json"
    code, output = run("predict", trained, good, bad, "--skip-bad", "--json", file)
    assert code == 0
    assert "bad.png" in output
    assert len(json.loads(file.read_text())) == 1


@pytest.mark.parametrize("command", ["evaluate", "predict"])
def test_folder_that_is_no_run(command: str, tmp_path: Path) -> None:
    extra = ["x.png"] if command == "predict" else []
    with pytest.raises(RunError, match="holds no run"):
        run(command, tmp_path, *extra)


@pytest.mark.parametrize("command", ["evaluate", "predict"])
def test_json_replaces_no_other_file(command: str, trained: Path, tmp_path: Path) -> None:
    image = tmp_path / "image.png"
    image.write_bytes(b"\x89PNG")
    with pytest.raises(RunError, match=r"image\.png: exists and was not written by"):
        run(command, trained, *([image] if command == "predict" else []), "--json", image)
    assert image.read_bytes() == b"\x89PNG"


def test_inspect(trained: Path, tmp_path: Path) -> None:
    """What was changed on the way, and the image as the network gets it."""
    deep = np.linspace(100, 4000, 48 * 64).reshape(48, 64).astype(np.uint16)
    cv2.imwrite(str(tmp_path / "a[1].png"), deep)
    (tmp_path / "bad.png").write_bytes(b"no image")
    out = tmp_path / "out"
    code, output = run("inspect", tmp_path / "a[1].png", "--run", trained, "--out", out)
    assert code == 0
    lines = [line.strip() for line in output.splitlines()]
    assert lines[0] == str(tmp_path / "a[1].png")
    assert lines[1] == "PNG, 64x48 pixels, 1 channel(s), uint16"
    assert "become 0 to 255" in lines[2]
    assert "resized to 32x32, whatever the proportions" in lines
    assert any(line.startswith("CLAHE") for line in lines)
    written = cv2.imread(str(out / "a[1].png"), cv2.IMREAD_UNCHANGED)
    config = RunFolder(trained).load_config()
    prepared = prepare_image(
        read_image_file(tmp_path / "a[1].png"), 32, 1, preprocessing_of(config).clahe
    )
    np.testing.assert_array_equal(written, prepared)
    code, output = run("inspect", tmp_path / "bad.png", tmp_path / "a[1].png")
    assert code == 1
    assert f"refused: {tmp_path / 'bad.png'}: not a PNG" in output
    assert "resized to 224x224" in output
    with pytest.raises(RunError, match="not written by this command"):
        run("inspect", tmp_path / "a[1].png", "--out", tmp_path)


def test_inspect_shows_a_picture_in_a_terminal(tmp_path: Path) -> None:
    from rich.console import Console

    from magsd.cli.inspection import preview

    image = np.zeros((64, 64), np.uint8)
    image[:, 32:] = 255
    console = Console(force_terminal=True, color_system="truecolor", width=80, file=StringIO())
    console.print(preview(image))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert len(lines) >= 32
    assert "0;0;0" in lines[0]
    assert "255;255;255" in lines[0]


def test_corrupt_checkpoint_is_said(warm_process: Process, trained: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(trained, copy)
    best = copy / "checkpoints" / "best.pt"
    best.write_bytes(best.read_bytes()[:-500])
    done = warm_process("evaluate", copy)
    assert done.returncode == 2
    assert "corrupt checkpoint" in done.stderr
    assert "Traceback" not in done.stderr


def test_info() -> None:
    code, output = run("info")
    assert code == 0
    for words in ("torch", "timm", "kernels reference", "available", "phantom"):
        assert words in output, words


def test_shards_that_training_reads(pairs: list[str], tmp_path: Path) -> None:
    pytest.importorskip("webdataset", reason="needs the shards extra")
    out = tmp_path / "shards"
    code, output = run(
        "shards", "--data", "phantom:n=24,size=32", "--out", out, "--shard-size", "5", "folds=2"
    )
    assert code == 0, output
    names = sorted(path.name for path in out.glob("*.tar"))
    sides = {"test": 3, "train": 2, "val": 2}
    assert names == [f"{side}-{n:06}.tar" for side, count in sides.items() for n in range(count)]
    code, output = run(
        "train",
        "--out",
        tmp_path / "run",
        *pairs,
        f"source=shards:{out}/train-{{000000..000001}}.tar",
        f"data.validation=shards:{out}/val-{{000000..000001}}.tar",
        f"data.test=shards:{out}/test-{{000000..000002}}.tar",
    )
    assert code == 0, output
    assert "6 training, 6 validation and 12 test images" in output
    code, output = run("evaluate", tmp_path / "run", "--predictions", tmp_path / "p.csv")
    assert code == 0, output
    table = read_predictions(tmp_path / "p.csv")
    assert (len(table), set(table.splits)) == (12, {"test"})
    assert all("test-00000" in key for key in table.keys)
    with pytest.raises(ConfigError, match="write shards of that source by a call of their own"):
        run("shards", "--data", "phantom:n=24", "--out", out, "data.test=phantom:n=9")
    with pytest.raises(DataError, match="hold no masks"):
        run("localize", tmp_path / "run", "--out", tmp_path / "boxes")
