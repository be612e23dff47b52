"""The image cache: content, keys, errors, and what a kill or a rival leaves."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from magsd.data import cache as cache_module
from magsd.data import load_cache, open_source
from magsd.data.cache import default_cache_dir, prepare_image, prepare_mask
from magsd.data.record import Record
from magsd.data.sources import PhantomSource, Source
from magsd.errors import DataError

PHANTOM = "phantom:n=12,size=48"


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder of two classes of three images each."""
    random = np.random.default_rng(0)
    for label in ("a", "b"):
        (tmp_path / "data" / label).mkdir(parents=True)
        for number in range(3):
            image = random.integers(0, 256, (40, 50)).astype(np.uint8)
            cv2.imwrite(str(tmp_path / "data" / label / f"{number}.png"), image)
    return tmp_path / "data"


def entries(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if not p.name.endswith(".lock"))


def test_content(tmp_path: Path) -> None:
    source = open_source(PHANTOM)
    cache = load_cache(source, image_size=32, clahe=(4.0, 4), cache_dir=tmp_path)
    assert cache.images.shape == (12, 32, 32)
    assert cache.images.dtype == np.uint8
    assert isinstance(cache.images, np.memmap)
    assert not cache.images.flags.writeable
    assert (cache.image_size, cache.channels, len(cache)) == (32, 1, 12)
    assert cache.records == source.records
    assert cache.bad == []
    assert cache.masks is not None
    for index, record in enumerate(source.records):
        expected = prepare_image(source.read_image(record), 32, 1, (4.0, 4))
        np.testing.assert_array_equal(cache.images[index], expected)
        mask = source.read_mask(record)
        assert cache.has_mask[index] == (mask is not None)
        expected = np.zeros((32, 32)) if mask is None else prepare_mask(mask, 32)
        np.testing.assert_array_equal(cache.masks[index], expected)


def test_prepare_image() -> None:
    gray = np.random.default_rng(0).integers(0, 256, (40, 60)).astype(np.uint8)
    resized = cv2.resize(gray, (32, 32), interpolation=cv2.INTER_AREA)
    np.testing.assert_array_equal(prepare_image(gray, 32), resized)
    equalized = cv2.createCLAHE(clipLimit=4.0, tileGridSize=(4, 4)).apply(resized)
    np.testing.assert_array_equal(prepare_image(gray, 32, 1, (4.0, 4)), equalized)
    repeated = prepare_image(gray, 32, 3, (4.0, 4))
    np.testing.assert_array_equal(repeated, np.repeat(equalized[..., None], 3, 2))
    color = np.dstack([gray, 255 - gray, gray])
    assert prepare_image(color, 32, 3, (4.0, 4)).shape == (32, 32, 3)
    np.testing.assert_array_equal(
        prepare_image(color, 32), prepare_image(cv2.cvtColor(color, cv2.COLOR_RGB2GRAY), 32)
    )
    assert prepare_image(gray, 90).shape == (90, 90)


def test_prepare_mask_keeps_the_share() -> None:
    mask = np.zeros((64, 64), bool)
    mask[:32, :16] = True
    small = prepare_mask(mask, 16)
    assert small.dtype == np.uint8
    assert small[:8, :4].all()
    assert small.sum() == 32


def test_second_time_reads_no_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load_cache(open_source(PHANTOM), image_size=32, cache_dir=tmp_path)
    monkeypatch.setattr(PhantomSource, "read_image", lambda *_: pytest.fail("decoded again"))
    again = load_cache(open_source(PHANTOM), image_size=32, cache_dir=tmp_path)
    np.testing.assert_array_equal(again.images, first.images)
    assert again.path == first.path


def test_settings_and_content_change_the_key(tmp_path: Path, files: Path) -> None:
    def path(**settings: object) -> Path | None:
        options = {"image_size": 32, "cache_dir": tmp_path / "c"} | settings
        return load_cache(open_source(f"folder:{files}"), **options).path  # type: ignore[arg-type]

    paths = [
        path(), path(image_size=16), path(channels=3), path(clahe=(4.0, 4)), path(clahe=(2.0, 4)),
    ]  # fmt: skip
    cv2.imwrite(str(files / "a" / "0.png"), np.zeros((40, 50), np.uint8))
    paths.append(path())
    (files / "a" / "1.png").unlink()
    paths.append(path())
    assert len(set(paths)) == len(paths)
    assert path() == paths[-1]


def test_no_masks(tmp_path: Path, files: Path) -> None:
    cache = load_cache(open_source(f"folder:{files}"), image_size=32, cache_dir=tmp_path / "c")
    assert cache.masks is None
    assert not cache.has_mask.any()


def test_progress(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    load_cache(
        open_source(PHANTOM), image_size=32, cache_dir=tmp_path,
        progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert seen == [(n, 12) for n in range(1, 13)]


class TestBadImages:
    @pytest.fixture
    def damaged(self, files: Path) -> Path:
        path = files / "a" / "1.png"
        path.write_bytes(path.read_bytes()[:200])
        (files / "b" / "0.png").write_bytes(b"")
        return files

    def test_named_and_counted(self, tmp_path: Path, damaged: Path) -> None:
        with pytest.raises(DataError) as caught:
            load_cache(open_source(f"folder:{damaged}"), image_size=32, cache_dir=tmp_path / "c")
        text = str(caught.value)
        assert "2 of 6 images cannot be read" in text
        assert "a/1.png" in text
        assert "b/0.png" in text
        assert "data.skip_bad=true" in text

    def test_skipped_when_asked(self, tmp_path: Path, damaged: Path) -> None:
        source = open_source(f"folder:{damaged}")
        for _ in range(2):  # filled, then found
            cache = load_cache(source, image_size=32, cache_dir=tmp_path / "c", skip_bad=True)
            kept = ["a/0.png", "a/2.png", "b/1.png", "b/2.png"]
            assert [r.key for r in cache.records] == kept
            assert [key for key, _ in cache.bad] == ["a/1.png", "b/0.png"]
            assert cache.images.shape == (4, 32, 32)
            expected = prepare_image(source.read_image(cache.records[2]), 32)
            np.testing.assert_array_equal(cache.images[2], expected)
        with pytest.raises(DataError, match="2 of 6"):
            load_cache(source, image_size=32, cache_dir=tmp_path / "c")

    def test_repaired_image_is_seen(self, tmp_path: Path, damaged: Path) -> None:
        load_cache(
            open_source(f"folder:{damaged}"), image_size=32, cache_dir=tmp_path / "c",
            skip_bad=True,
        )  # fmt: skip
        for name in ("a/1.png", "b/0.png"):
            cv2.imwrite(str(damaged / name), np.zeros((9, 9), np.uint8))
        source = open_source(f"folder:{damaged}")
        assert len(load_cache(source, image_size=32, cache_dir=tmp_path / "c")) == 6

    def test_what_can_be_read_by_now_is_tried_again(
        self, tmp_path: Path, files: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Files as they were: a decoder was lacking, say."""
        source = open_source(f"folder:{files}")
        read = source.read_image
        first = source.records[0]

        def lacking(record: Record) -> np.ndarray:
            if record == first:
                raise DataError("reading it needs a package")
            return read(record)

        options: dict[str, Any] = {"image_size": 32, "cache_dir": tmp_path / "c", "skip_bad": True}
        monkeypatch.setattr(source, "read_image", lacking)
        assert [key for key, _ in load_cache(source, **options).bad] == [first.key]
        assert [key for key, _ in load_cache(source, **options).bad] == [first.key]
        monkeypatch.setattr(source, "read_image", read)
        cache = load_cache(source, **options)
        assert (len(cache), cache.bad) == (len(source), [])

    def test_another_decoder_is_another_cache(
        self, tmp_path: Path, files: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        source = open_source(f"folder:{files}")
        before = load_cache(source, image_size=32, cache_dir=tmp_path)
        monkeypatch.setattr(cache_module, "version", lambda package: "99")
        assert load_cache(source, image_size=32, cache_dir=tmp_path).path != before.path

    def test_ten_are_named(self, tmp_path: Path) -> None:
        rows = ["file,label"] + [f"none{i:02d}.png,{'ab'[i % 2]}" for i in range(14)]
        (tmp_path / "t.csv").write_text("\n".join(rows))
        source = open_source(f"csv:{tmp_path / 't.csv'}")
        for skip_bad in (False, True):  # nothing is left to go on with
            with pytest.raises(DataError) as caught:
                load_cache(source, image_size=32, cache_dir=tmp_path / "c", skip_bad=skip_bad)
            text = str(caught.value)
            assert "14 of 14" in text
            assert "none09.png" in text
            assert "none10.png" not in text
            assert "and 4 more" in text
            assert "skip_bad" not in text


class TestDisk:
    def test_full_disk(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "posix_fallocate", full)
        with pytest.raises(DataError) as caught:
            load_cache(open_source(PHANTOM), image_size=32, cache_dir=tmp_path)
        text = str(caught.value)
        assert str(tmp_path) in text
        assert f"{2 * 12 * 32 * 32:,} bytes" in text
        assert entries(tmp_path) == []

    def test_unwritable_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*_: object, **__: object) -> None:
            raise PermissionError(errno.EACCES, "Permission denied")

        monkeypatch.setattr(Path, "mkdir", refuse)
        with pytest.raises(DataError, match="set MAGSD_CACHE"):
            load_cache(open_source(PHANTOM), image_size=32, cache_dir=tmp_path / "c")

    def test_default_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("MAGSD_CACHE", str(tmp_path / "mine"))
        assert default_cache_dir() == tmp_path / "mine"
        cache = load_cache(open_source(PHANTOM), image_size=32)
        assert cache.path is not None
        assert cache.path.parent == tmp_path / "mine"
        monkeypatch.delenv("MAGSD_CACHE")
        assert default_cache_dir() == Path.home() / ".cache" / "magsd"

    @pytest.mark.parametrize("damage", ["cut", "no images", "no meta", "bad meta"])
    def test_damaged_cache_is_filled_again(self, tmp_path: Path, damage: str) -> None:
        first = load_cache(open_source(PHANTOM), image_size=32, cache_dir=tmp_path)
        assert first.path is not None
        content = np.array(first.images)
        if damage == "cut":
            os.truncate(first.path / "images.bin", 100)
        elif damage == "no images":
            (first.path / "images.bin").unlink()
        elif damage == "no meta":
            (first.path / "meta.json").unlink()
        else:
            (first.path / "meta.json").write_text("{")
        again = load_cache(open_source(PHANTOM), image_size=32, cache_dir=tmp_path)
        np.testing.assert_array_equal(again.images, content)


class TestInterruption:
    def test_failure_leaves_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def stop(done: int, _: int) -> None:
            if done == 5:
                raise KeyboardInterrupt

        source = open_source(PHANTOM)
        with pytest.raises(KeyboardInterrupt):
            load_cache(source, image_size=32, cache_dir=tmp_path, progress=stop)
        assert entries(tmp_path) == []
        assert len(load_cache(source, image_size=32, cache_dir=tmp_path)) == 12

    def test_kill_leaves_no_half_cache(self, tmp_path: Path) -> None:
        """A process killed while it fills; the next one finds nothing and fills anew."""
        ready = tmp_path / "ready"
        code = f"""
import time, pathlib
from magsd.data import load_cache, open_source
def progress(done, total):
    if done == 6:
        pathlib.Path({str(ready)!r}).touch()
        time.sleep(60)
load_cache(open_source({PHANTOM!r}), image_size=32, cache_dir={str(tmp_path / "c")!r},
           progress=progress)
"""
        process = start(code)
        deadline = time.monotonic() + 60
        while not ready.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        assert ready.exists()
        process.kill()
        process.wait()
        left = entries(tmp_path / "c")
        assert left
        assert all(name.endswith(".part") for name in left)
        source = open_source(PHANTOM)
        cache = load_cache(source, image_size=32, cache_dir=tmp_path / "c")
        for index, record in enumerate(source.records):
            expected = prepare_image(source.read_image(record), 32)
            np.testing.assert_array_equal(cache.images[index], expected)
        assert entries(tmp_path / "c") == [cache.path.name if cache.path else ""]

    def test_two_processes_fill_once(self, tmp_path: Path) -> None:
        code = f"""
import json
from magsd.data import load_cache, open_source
filled = []
cache = load_cache(open_source("phantom:n=60,size=64"), image_size=64,
                   cache_dir={str(tmp_path)!r}, progress=lambda *_: filled.append(1))
print(json.dumps([len(filled), int(cache.images.sum(dtype="int64"))]))
"""
        processes = [start(code) for _ in range(2)]
        results = [json.loads(process.communicate(timeout=120)[0]) for process in processes]
        assert sorted(filled for filled, _ in results) == [0, 60]
        assert results[0][1] == results[1][1]


def start(code: str) -> subprocess.Popen[str]:
    root = Path(cache_module.__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root)}
    command = [sys.executable, "-c", code]
    return subprocess.Popen(command, env=environment, cwd=root, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("settings", [{"image_size": 0}, {"image_size": 32, "channels": 2}])
def test_bad_settings(tmp_path: Path, settings: dict[str, int]) -> None:
    with pytest.raises(DataError, match=next(reversed(settings))):
        load_cache(open_source(PHANTOM), cache_dir=tmp_path, **settings)  # type: ignore[arg-type]


def test_real_radiographs(tmp_path: Path, shared_dir: Path) -> None:
    spec = f"csv:{shared_dir / 'data' / 'cxr3' / 'labels.csv'}"
    source: Source = open_source(spec, limit=60)
    cache = load_cache(source, image_size=96, clahe=(4.0, 4), cache_dir=tmp_path)
    assert cache.images.shape == (60, 96, 96)
    assert cache.masks is not None
    assert {r.label for r, has in zip(cache.records, cache.has_mask, strict=True) if has} == {
        "covid-19"
    }
    shares = cache.masks[cache.has_mask].mean((1, 2))
    assert len(shares) >= 5
    assert (shares > 0.1).all()
    assert (shares < 0.7).all()
