"""Outputs are checked before long work, and no file of others is replaced."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from typer.testing import CliRunner

from magsd import cli, outputs
from magsd.data import load_cache, open_source
from magsd.errors import DataError, MagsdError, RunError
from magsd.outputs import write_text

Commands = dict[str, list[str]]


def run(*arguments: str | Path) -> str:
    """Output of a command; its error is raised."""
    result = CliRunner(env={"COLUMNS": "200"}).invoke(cli.app, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def trained(small_pairs: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("outputs") / "run"
    run("train", "--out", out, *small_pairs, "epochs=1")
    return out


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "x.png"
    cv2.imwrite(str(path), np.random.default_rng(0).integers(0, 256, (40, 40), np.uint8))
    return path


@pytest.fixture
def commands(trained: Path, image: Path, small_pairs: list[str]) -> Commands:
    """Every option that names an output, by a command that lacks its value."""
    data = ["--data", "phantom:n=8,size=32,seed=5"]
    return {
        "train --out": ["train", *small_pairs, "epochs=1", "--out"],
        "evaluate --json": ["evaluate", str(trained), *data, "--json"],
        "evaluate --predictions": ["evaluate", str(trained), *data, "--predictions"],
        "evaluate --plots": ["evaluate", str(trained), *data, "--plots"],
        "predict --json": ["predict", str(trained), str(image), "--json"],
        "predict --overlay": ["predict", str(trained), str(image), "--overlay"],
        "localize --out": ["localize", str(trained), *data, "--out"],
        "crossval --out": ["crossval", *small_pairs, "--model", "plain", "--out"],
        "shards --out": ["shards", *data, "folds=2", "--out"],
        "audit --json": ["audit", data[1], "--json"],
        "audit --out": ["audit", data[1], "--out"],
        "report --out": ["report", str(trained), "--out"],
    }


OPTIONS = [
    "train --out",
    "evaluate --json",
    "evaluate --predictions",
    "evaluate --plots",
    "predict --json",
    "predict --overlay",
    "localize --out",
    "crossval --out",
    "shards --out",
    "audit --json",
    "audit --out",
    "report --out",
]


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever takes long fails the test: images, models."""
    import magsd.data.prepare
    import magsd.data.run_data
    import magsd.data.run_sides
    import magsd.training.run

    def work(*_: Any, **__: Any) -> None:
        raise AssertionError("work began before the output was checked")

    for module, name in (
        (magsd.data.prepare, "open_source"),
        (magsd.data.run_data, "open_source"),
        (magsd.data.run_sides, "open_source"),
        (magsd.data, "open_source"),
        (magsd.training.run, "build_model"),
        (magsd.training.run, "load_checkpoint"),
    ):
        monkeypatch.setattr(module, name, work)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.usefixtures("no_work")
def test_a_file_in_the_way_is_an_error_before_any_work(
    option: str, commands: Commands, tmp_path: Path
) -> None:
    """A folder's name that a file has, and a folder below a file."""
    (tmp_path / "notes.txt").write_text("somebody's")
    for place in (tmp_path / "notes.txt", tmp_path / "notes.txt" / "deeper"):
        with pytest.raises(MagsdError, match=r"notes\.txt"):
            run(*commands[option], place)
    assert (tmp_path / "notes.txt").read_text() == "somebody's"


@pytest.mark.parametrize("option", [name for name in OPTIONS if name.endswith("--json")])
@pytest.mark.usefixtures("no_work")
def test_a_folder_in_the_way_of_a_file(option: str, commands: Commands, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is a folder"):
        run(*commands[option], tmp_path)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.usefixtures("no_work")
def test_a_name_that_is_too_long(option: str, commands: Commands, tmp_path: Path) -> None:
    with pytest.raises(MagsdError, match="the name is too long"):
        run(*commands[option], tmp_path / ("x" * 300))


@pytest.mark.parametrize("name", ["/dev/null", "dangling", "pipe"])
@pytest.mark.usefixtures("no_work")
def test_what_is_no_file_is_not_replaced(name: str, commands: Commands, tmp_path: Path) -> None:
    (tmp_path / "dangling").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe")
    for option in ("evaluate --json", "evaluate --predictions", "predict --json"):
        with pytest.raises(RunError, match=f"{name}: not a regular file"):
            run(*commands[option], tmp_path / name)


@pytest.mark.usefixtures("no_work")
def test_json_in_place_of_an_overlay(commands: Commands, tmp_path: Path) -> None:
    with pytest.raises(MagsdError, match="an overlay is written there"):
        run(*commands["predict --json"], tmp_path / "o" / "x.png", "--overlay", tmp_path / "o")


@pytest.mark.parametrize("place", [".", "run", "a/run"])
@pytest.mark.usefixtures("no_work")
def test_a_run_within_its_images(place: str, tmp_path: Path, small_pairs: list[str]) -> None:
    """Its pictures would be a class, or images of one, when the folder is read again."""
    (tmp_path / "a").mkdir()
    (tmp_path / "link").symlink_to(tmp_path)
    source = f"data.source=folder:{tmp_path}/link"
    for command in (["train"], ["crossval", "--model", "magsd"]):
        with pytest.raises(RunError, match="its pictures would be taken for images"):
            run(*command, *small_pairs, source, "--out", tmp_path / place)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "link"]


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.usefixtures("no_work")
def test_no_permission_is_an_error_before_any_work(
    option: str, commands: Commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a read-only file system: the kernel's answer is stood in for, for root."""
    closed = tmp_path / "closed"
    closed.mkdir()
    access = os.access

    def refuse(path: Any, mode: int) -> bool:
        return not (mode & os.W_OK and Path(path) == closed) and access(path, mode)

    monkeypatch.setattr(os, "access", refuse)
    with pytest.raises(MagsdError, match=r"no permission to write in .*closed"):
        run(*commands[option], closed / "out")
    assert not list(closed.iterdir())


@pytest.mark.parametrize(
    ("option", "name"),
    [
        ("evaluate --plots", "confusion.png"),
        ("localize --out", "boxes.csv"),
        ("localize --out", "overlays"),
        ("crossval --out", "results.csv"),
        ("crossval --out", "scores.png"),
        ("train --out", "metrics.csv"),
        ("train --out", "plots"),
    ],
)
@pytest.mark.usefixtures("no_work")
def test_folders_with_files_of_others_are_refused(
    option: str, name: str, commands: Commands, tmp_path: Path
) -> None:
    folder = tmp_path / "theirs"
    folder.mkdir()
    (folder / name).write_text("somebody's")
    with pytest.raises(RunError, match=name):
        run(*commands[option], folder)
    assert (folder / name).read_text() == "somebody's"


@pytest.mark.parametrize("option", ["evaluate --json", "predict --json"])
@pytest.mark.parametrize(
    "content", ["{}", '{"name": "package"}', '[{"x": 1}]', "3", "not json", "[]", "[" * 10**5]
)
def test_json_of_others_is_refused(
    option: str, content: str, commands: Commands, tmp_path: Path
) -> None:
    path = tmp_path / "package.json"
    path.write_text(content)
    with pytest.raises(RunError, match="was not written by this command"):
        run(*commands[option], path)
    assert path.read_text() == content


def test_own_outputs_are_replaced(commands: Commands, tmp_path: Path) -> None:
    for option in ("evaluate --json", "predict --json", "predict --overlay", "localize --out"):
        place = tmp_path / option.replace(" ", "") / "out"
        for _ in range(2):
            run(*commands[option], place)
    for _ in range(2):
        run(*commands["evaluate --plots"], tmp_path / "plots")


def test_an_input_that_is_an_overlay_is_not_replaced(
    trained: Path, image: Path, tmp_path: Path
) -> None:
    run("predict", trained, image, "--overlay", tmp_path / "o")
    drawn = tmp_path / "o" / "x.png"
    before = drawn.read_bytes()
    with pytest.raises(RunError, match=r"x\.png"):
        run("predict", trained, drawn, "--overlay", tmp_path / "o")
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "o")
    with pytest.raises(RunError, match=r"x\.png"):
        run("predict", trained, drawn, "--overlay", link)
    assert drawn.read_bytes() == before


def test_nothing_readable_is_an_error(trained: Path, tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"no image")
    out = tmp_path / "out.json"
    with pytest.raises(DataError, match="none of the 2 images"):
        run("predict", trained, tmp_path / "a.png", tmp_path / "b.png", "--skip-bad", "--json", out)
    assert not out.exists()


def test_json_is_written_before_plots(
    commands: Commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import magsd.training.report

    def fail(*_: Any) -> None:
        raise RuntimeError("no font")

    monkeypatch.setattr(magsd.training.report, "draw_confusion", fail)
    with pytest.raises(RuntimeError, match="no font"):
        run(*commands["evaluate --json"], tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text())["raw"]


def test_numbers_that_are_none_are_an_error_not_json(
    commands: Commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from magsd.evaluation import predict

    monkeypatch.setattr(predict, "probabilities_of", lambda logits: logits * np.nan)
    with pytest.raises(RunError, match=r"x\.png.*not finite"):
        run(*commands["predict --json"], tmp_path / "out.json")
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENAMETOOLONG, errno.ENOTDIR])
def test_a_write_that_fails_later_names_the_folder(code: int, tmp_path: Path) -> None:
    with (
        pytest.raises(RunError, match=f"cannot write in {tmp_path}"),
        outputs.disk_errors(tmp_path, ""),
    ):
        raise OSError(code, os.strerror(code), str(tmp_path / "a"))
    with (
        pytest.raises(OSError, match="elsewhere"),  # of an input, say
        outputs.disk_errors(tmp_path, ""),
    ):
        raise OSError(code, os.strerror(code), "/elsewhere")


class TestCache:
    PHANTOM = "phantom:n=8,size=32"

    def fill(self, folder: Path, **options: Any) -> Any:
        return load_cache(open_source(self.PHANTOM), image_size=32, cache_dir=folder, **options)

    @pytest.mark.parametrize("below", [False, True])
    def test_a_file_in_its_place(self, below: bool, tmp_path: Path) -> None:
        place = tmp_path / "cache"
        place.write_text("somebody's")
        with pytest.raises(DataError, match=r"cache.*MAGSD_CACHE"):
            self.fill(place / "deeper" if below else place)
        assert place.read_text() == "somebody's"

    def test_a_home_in_its_name(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.chdir(tmp_path)
        self.fill(Path("~/cache"))
        assert [path.name for path in tmp_path.iterdir()] == ["cache"]

    @pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOTSUP, errno.EIO])
    def test_a_folder_that_takes_no_files(
        self, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*_: object) -> None:
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(os, "posix_fallocate", refuse)
        with pytest.raises(DataError, match="set MAGSD_CACHE to another folder"):
            self.fill(tmp_path)

    @pytest.mark.parametrize(
        "change",
        [
            lambda meta: [],
            lambda meta: None,
            lambda meta: {**meta, "kept": [*meta["kept"][:-1], 99]},
            lambda meta: {**meta, "kept": "12345678"},
            lambda meta: {**meta, "kept": [0, *meta["kept"][:-1]]},
            lambda meta: {**meta, "kept": [float("inf")]},
            lambda meta: {**meta, "bad": [["a"]]},
            lambda meta: {**meta, "has_mask": []},
            lambda meta: {key: value for key, value in meta.items() if key != "bad"},
        ],
    )
    def test_damage_is_rebuilt(self, change: Callable[[Any], Any], tmp_path: Path) -> None:
        first = self.fill(tmp_path)
        content = np.array(first.images)
        path = first.path / "meta.json"
        path.write_text(json.dumps(change(json.loads(path.read_text()))))
        again = self.fill(tmp_path)
        np.testing.assert_array_equal(again.images, content)

    @pytest.mark.parametrize("text", ["", "[" * 10**5, "\udcff"])
    def test_damaged_text_is_rebuilt(self, text: str, tmp_path: Path) -> None:
        first = self.fill(tmp_path)
        (first.path / "meta.json").write_bytes(os.fsencode(text))
        assert len(self.fill(tmp_path)) == 8

    def test_a_file_in_place_of_a_cache_is_rebuilt(self, tmp_path: Path) -> None:
        import shutil

        first = self.fill(tmp_path)
        shutil.rmtree(first.path)
        first.path.write_text("")
        assert len(self.fill(tmp_path)) == 8

    def test_a_link_in_place_of_a_cache_is_rebuilt(self, tmp_path: Path) -> None:
        import shutil

        first = self.fill(tmp_path / "cache")
        shutil.rmtree(first.path)
        (tmp_path / "other").mkdir()
        first.path.symlink_to(tmp_path / "other")
        assert len(self.fill(tmp_path / "cache")) == 8
        assert (tmp_path / "other").is_dir()

    def test_ctrl_c_says_what_was_interrupted(self, tmp_path: Path) -> None:
        def stop(done: int, _: int) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt, match=r"phantom:n=8.*prepared"):
            self.fill(tmp_path, progress=stop)

    def test_the_command_says_so_too(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        """Typer, too, looks for Ctrl-C."""
        import magsd.data.run_data

        def stop(*_: Any, **__: Any) -> None:
            raise KeyboardInterrupt("images were being prepared")

        monkeypatch.setattr(magsd.data.run_data, "load_cache", stop)
        monkeypatch.setattr(
            "sys.argv", ["magsd", "train", "--data", self.PHANTOM, "--out", str(tmp_path / "run")]
        )
        with pytest.raises(SystemExit) as caught:
            cli.main()
        assert caught.value.code == 130
        assert "magsd: interrupted: images were being prepared\n" in capsys.readouterr().err

    def test_few_results_wait_for_a_slow_disk(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """However far the threads could run ahead."""
        from magsd.data import cache

        monkeypatch.setattr(cache, "_workers", lambda: 2)
        source = open_source("phantom:n=60,size=32")
        read, ahead, done = source.read_image, [], [0]

        def counted(record: Any) -> Any:
            ahead.append(source.records.index(record) - done[0])
            return read(record)

        def slow(count: int, _: int) -> None:
            import time

            done[0] = count
            time.sleep(0.01)

        monkeypatch.setattr(source, "read_image", counted)
        load_cache(source, image_size=32, cache_dir=tmp_path, progress=slow)
        assert len(ahead) == 60
        assert max(ahead) <= 6


def test_a_link_stays_one_and_a_long_name_is_no_hindrance(tmp_path: Path) -> None:
    """What is written takes its name in one step; see test_training_checkpoint for kills."""
    target = tmp_path / "deep" / ("x" * 250 + ".json")
    write_text(target, "old")
    link = tmp_path / "link.json"
    link.symlink_to(target)
    write_text(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"
    assert [each.name for each in target.parent.iterdir()] == [target.name]
