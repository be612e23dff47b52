"""Tar shards: written, planned, streamed."""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from magsd.data import AugmentConfig, Source, Split, open_source
from magsd.data.cache import prepare_image
from magsd.data.shards import ShardLoader, open_shards, write_shards
from magsd.data.shards.plan import make_plan
from magsd.data.shards.reader import ShardReader
from magsd.errors import DataError

pytest.importorskip("webdataset", reason="needs the shards extra")

IMAGES, SHARD = 23, 5
OPEN_FILES = Path("/proc/self/fd")


@pytest.fixture(scope="module")
def source() -> Source:
    return open_source(f"phantom:n={IMAGES},size=32")


@pytest.fixture(scope="module")
def folder(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four shards of five images and one of three."""
    out = tmp_path_factory.mktemp("shards")
    write_shards(source, out, shard_size=SHARD)
    return out


def spec(folder: Path) -> str:
    return f"shards:{folder}/train-{{000000..000004}}.tar"


def loader(folder: Path, **changes: object) -> ShardLoader:
    options: dict[str, object] = {
        "image_size": 32, "clahe": (4.0, 4), "buffer": 7, "batch_size": 4, "shuffle": True,
        "seed": 3, "augment": AugmentConfig(), "device": "cpu",
    }  # fmt: skip
    return ShardLoader(open_shards(spec(folder)), **(options | changes))  # type: ignore[arg-type]


def members(folder: Path) -> list[dict[str, object]]:
    """Metadata of every image, in the index's order."""
    found = []
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar.getmembers():
                if member.name.endswith(".json"):
                    content = tar.extractfile(member)
                    assert content is not None
                    found.append(json.load(content))
    return found


class TestWriting:
    def test_every_image_once(self, folder: Path, source: Source) -> None:
        about = {str(m["key"]): (m["label"], m["patient"]) for m in members(folder)}
        assert about == {r.key: (r.label, r.patient) for r in source.records}
        index = json.loads((folder / "index.json").read_text())
        assert [entry["samples"] for entry in index["shards"].values()] == [5, 5, 5, 5, 3]
        counts = np.sum([entry["counts"] for entry in index["shards"].values()], axis=0)
        labels = Counter(r.label for r in source.records)
        assert counts.tolist() == [labels[name] for name in index["classes"]]

    def test_split_and_files_as_they_are(self, tmp_path: Path) -> None:
        for label in "ab":
            for i in range(3):
                path = tmp_path / "in" / label / f"{i}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                cv2.imwrite(str(path), np.full((8, 8), 40 * i, np.uint8))
        source = open_source(f"folder:{tmp_path / 'in'}")
        paths = write_shards(source, tmp_path / "out", split=Split([0, 1, 3, 4], [2, 5]))
        assert [path.name for path in paths] == ["train-000000.tar", "val-000000.tar"]
        with tarfile.open(paths[1]) as tar:
            content = {tar.extractfile(m).read() for m in tar if m.name.endswith("jpg")}  # type: ignore[union-attr]
        assert content == {(tmp_path / "in" / label / "2.jpg").read_bytes() for label in "ab"}
        with pytest.raises(DataError, match=r"holds train-000000\.tar already"):
            write_shards(source, tmp_path / "out")

    def test_bad_images(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        for label in "ab":
            (tmp_path / "in" / label).mkdir(parents=True)
            cv2.imwrite(str(tmp_path / "in" / label / "1.png"), np.zeros((8, 8), np.uint8))
        (tmp_path / "in" / "a" / "0.png").write_bytes(b"nothing")
        source = open_source(f"folder:{tmp_path / 'in'}")
        with pytest.raises(DataError, match=r"1 of 3 images cannot be read:\n  a/0\.png"):
            write_shards(source, tmp_path / "out")
        assert list((tmp_path / "out").iterdir()) == []
        write_shards(source, tmp_path / "out", skip_bad=True)
        assert len(members(tmp_path / "out")) == 2
        assert "1 of 3 images cannot be read and are left out, the first a/0.png" in caplog.text

    def test_files_of_other_suffixes_can_be_read_again(self, tmp_path: Path) -> None:
        names = [("0.BMP", "a"), ("1.tif", "b")]
        for name, _ in names:
            cv2.imwrite(str(tmp_path / name), np.arange(192, dtype=np.uint8).reshape(8, 8, 3))
        lines = ["file,label", *(f"{name},{label}" for name, label in names)]
        (tmp_path / "t.csv").write_text("\n".join(lines))
        source = open_source(f"csv:{tmp_path / 't.csv'}")
        path = write_shards(source, tmp_path / "out")[0]
        index = open_shards(f"shards:{path}")
        read = ShardReader(index.shards[0], 2, index.classes, 8, 3, None).take([0, 1])
        expected = np.arange(192, dtype=np.uint8).reshape(8, 8, 3)[..., ::-1]
        for pixels, _ in read:
            np.testing.assert_array_equal(pixels, expected)


class TestPlan:
    @settings(max_examples=40, deadline=None)
    @given(
        samples=st.lists(st.integers(1, 9), min_size=1, max_size=20),
        ranks=st.integers(1, 4),
        buffer=st.integers(1, 12),
        shuffle=st.booleans(),
    )
    def test_ranks_share_out_every_image(
        self, samples: list[int], ranks: int, buffer: int, shuffle: bool
    ) -> None:
        total = sum(samples)
        bounds = [total * rank // ranks for rank in range(ranks + 1)]
        seen: Counter[tuple[int, int]] = Counter()
        for rank in range(ranks):
            plan = make_plan(
                samples, bounds[rank], bounds[rank + 1],
                seed=0, epoch=1, rank=rank, buffer=buffer, shuffle=shuffle,
            )  # fmt: skip
            whole = [place for block in plan.blocks(0) for place in block.tolist()]
            skip = len(whole) // 2
            rest = [place for block in plan.blocks(skip) for place in block.tolist()]
            assert rest == whole[skip:]
            shards = [plan.pieces[piece][0] for piece in plan.piece[whole]]
            seen.update(zip(shards, plan.sample[whole].tolist(), strict=True))
            # A block holds what arrives together: no image waits for more than a buffer.
            assert all(abs(place - i) < buffer for i, place in enumerate(whole))
        everything = {(s, i) for s, count in enumerate(samples) for i in range(count)}
        assert seen == dict.fromkeys(everything, 1)


class TestLoader:
    def test_an_epoch_is_every_image_with_its_label(self, folder: Path, source: Source) -> None:
        batches = list(loader(folder, augment=None))
        assert [len(batch.indices) for batch in batches] == [4] * 5 + [3]
        about = members(folder)
        records = {record.key: record for record in source.records}
        for batch in batches:
            assert batch.images.shape[1:] == (1, 32, 32)
            for image, label, number in zip(
                batch.images, batch.labels.tolist(), batch.indices, strict=True
            ):
                record = records[str(about[number]["key"])]
                assert source.classes[label] == record.label
                pixels = prepare_image(source.read_image(record), 32, 1, (4.0, 4)) / 255
                expected = (pixels - pixels.mean()) / pixels.std()
                np.testing.assert_allclose(image[0], expected, atol=1e-4)
        numbers = [number for batch in batches for number in batch.indices]
        assert sorted(numbers) == list(range(IMAGES))
        assert loader(folder).describe([7]) == [f"{folder}/train-000001.tar image 2"]

    def test_epochs_differ_and_repeat(self, folder: Path) -> None:
        orders = [
            [b.indices for b in loader(folder, seed=seed).epoch(epoch)]
            for seed, epoch in ((3, 0), (3, 1), (4, 0), (3, 1))
        ]
        assert orders[1] == orders[3]
        assert len({str(order) for order in orders}) == 3
        plain = [b.indices for b in loader(folder, shuffle=False).epoch(0)]
        assert plain == [b.indices for b in loader(folder, shuffle=False).epoch(1)]

    @pytest.mark.parametrize("start", [1, 3, 6])
    def test_resumed_epoch_sees_the_same_batches(self, folder: Path, start: int) -> None:
        whole = list(loader(folder).epoch(2))
        rest = list(loader(folder).epoch(2, start_step=start))
        assert len(rest) == 6 - start
        for a, b in zip(whole[start:], rest, strict=True):
            assert a.indices == b.indices
            assert torch.equal(a.images, b.images)
            assert torch.equal(a.labels, b.labels)

    def test_resume_opens_only_what_is_left(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        decoded: list[object] = []
        decode = ShardReader._decode
        monkeypatch.setattr(
            ShardReader, "_decode", lambda self, s: decoded.append(s) or decode(self, s)
        )
        list(loader(folder).epoch(0, start_step=5))
        assert len(decoded) == 3

    @pytest.mark.parametrize("drop_last", [False, True])
    def test_two_ranks_have_disjoint_halves(self, folder: Path, drop_last: bool) -> None:
        parts = [
            list(loader(folder, rank=r, ranks=2, drop_last=drop_last).epoch(1)) for r in (0, 1)
        ]
        assert len(parts[0]) == len(parts[1]) == len(loader(folder, drop_last=drop_last))
        for a, b in zip(*parts, strict=True):
            assert (a.part.first, b.part.first) == (0, len(a.indices))
            assert a.part.total == b.part.total == len(a.indices) + len(b.indices)
        numbers = [[n for batch in part for n in batch.indices] for part in parts]
        assert not set(numbers[0]) & set(numbers[1])
        assert len(set(numbers[0] + numbers[1])) == (20 if drop_last else IMAGES)

    def test_leaving_early_leaves_no_thread(self, folder: Path) -> None:
        batches = loader(folder, buffer=1).epoch(0)
        next(batches)
        batches.close()  # type: ignore[attr-defined]
        assert len(list(loader(folder).epoch(0))) == 6

    @pytest.mark.skipif(not OPEN_FILES.is_dir(), reason="no /proc to count open files in")
    def test_an_error_leaves_no_shard_open(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(self: ShardReader, sample: object) -> None:
            raise DataError("bad image")

        monkeypatch.setattr(ShardReader, "_decode", fail)
        with pytest.raises(DataError) as caught:
            list(loader(folder).epoch(0))
        # The error holds the frames it came through, and what they hold.
        assert caught.value.__traceback__ is not None
        names = [str(file.readlink()) for file in OPEN_FILES.iterdir() if file.is_symlink()]
        assert not [name for name in names if name.startswith(str(folder))]

    def test_no_more_is_held_than_two_buffers(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        decoded: list[object] = []
        decode = ShardReader._decode
        monkeypatch.setattr(
            ShardReader, "_decode", lambda self, s: decoded.append(s) or decode(self, s)
        )
        emitted = 0
        for batch in loader(folder, buffer=3, batch_size=2).epoch(0):
            emitted += len(batch.indices)
            # Both blocks and the batch.
            assert len(decoded) <= emitted + 2 * 3

    def test_class_counts(self, folder: Path, source: Source) -> None:
        labels = Counter(record.label for record in source.records)
        assert loader(folder).class_counts() == [labels[name] for name in source.classes]


class TestForeignShards:
    """Shards that another program wrote."""

    def make(self, folder: Path, files: dict[str, bytes], samples: int = 1) -> str:
        folder.mkdir(exist_ok=True)
        with tarfile.open(folder / "x.tar", "w") as tar:
            for name, data in files.items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
        index = {"classes": ["a", "b"], "shards": {"x.tar": {"samples": samples}}}
        (folder / "index.json").write_text(json.dumps(index))
        return f"shards:{folder}/x.tar"

    PNG = cv2.imencode(".png", np.arange(64, dtype=np.uint8).reshape(8, 8))[1].tobytes()

    def read(self, spec: str) -> list[int]:
        stream = ShardLoader(
            open_shards(spec), image_size=8, clahe=None, buffer=2, batch_size=2, shuffle=False,
            seed=0, augment=None, device="cpu",
        )  # fmt: skip
        return [label for batch in stream for label in batch.labels.tolist()]

    def test_labels(self, tmp_path: Path) -> None:
        files = {
            "k1.png": self.PNG, "k1.cls": b"1", "k2.PNG": self.PNG, "k2.json": b'{"label": "a"}',
            "k3.seg.png": self.PNG, "k3.json": b'{"label": 1}',
        }  # fmt: skip
        assert self.read(self.make(tmp_path, files, 3)) == [1, 0, 1]

    def test_masks_beside_an_image_are_not_taken_for_it(self, tmp_path: Path) -> None:
        black = cv2.imencode(".png", np.zeros((8, 8), np.uint8))[1].tobytes()
        files = {"k.mask.png": black, "k.png": self.PNG, "k.cls": b"1"}
        index = open_shards(self.make(tmp_path, files))
        ((pixels, _),) = ShardReader(index.shards[0], 1, index.classes, 8, 1, None).take([0])
        assert pixels.max() == 63

    def test_refusals(self, tmp_path: Path) -> None:
        good = {"k.png": self.PNG, "k.cls": b"1"}
        cases = {
            r"x\.tar: ended after 1 images, its index says 2": (good, 2),
            r"x\.tar, k: label 2; there are 2 classes": (good | {"k.cls": b"2"}, 1),
            r"x\.tar, k: no label in \.cls or \.json": ({"k.png": self.PNG}, 1),
            r"x\.tar, k: no image; it has cls": ({"k.cls": b"1"}, 1),
            r"x\.tar, k\.png: truncated PNG": (good | {"k.png": self.PNG[:40]}, 1),
        }
        for message, (files, samples) in cases.items():
            pattern = self.make(tmp_path, files, samples)
            with pytest.raises(DataError, match=message):
                self.read(pattern)
        (tmp_path / "x.tar").write_bytes(b"no tar" * 200)
        with pytest.raises(DataError, match=r"x\.tar: cannot be read as a tar"):
            self.read(pattern)
        (tmp_path / "x.tar").unlink()
        with pytest.raises(DataError, match=r"x\.tar: cannot be read as a tar"):
            self.read(pattern)

    def test_index(self, tmp_path: Path) -> None:
        pattern = self.make(tmp_path, {})
        with pytest.raises(DataError, match=r"its classes are a, b; expected b, a"):
            open_shards(pattern, classes=("b", "a"))
        with pytest.raises(DataError, match=r"y\.tar is not in the index; it has 1 shards"):
            open_shards(f"shards:{tmp_path}/{{x,y}}.tar")
        with pytest.raises(DataError, match="commands"):
            open_shards("shards:pipe:cat x.tar")
        (tmp_path / "index.json").write_text('{"classes": ["a"], "shards": {"x.tar": {}}}')
        with pytest.raises(DataError, match="not an index of shards"):
            open_shards(pattern)
        (tmp_path / "index.json").write_text("{")
        with pytest.raises(DataError, match="cannot be read, or is no JSON"):
            open_shards(pattern)
        (tmp_path / "index.json").unlink()
        with pytest.raises(DataError, match="shards need their index next to them"):
            open_shards(pattern)
