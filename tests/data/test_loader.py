"""Batches."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from magsd.data import AugmentConfig, BatchLoader, ImageCache, load_cache, open_source
from magsd.data.random import step_generator, step_seed
from magsd.errors import DataError


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> ImageCache:
    source = open_source("phantom:n=24,size=32")
    return load_cache(source, image_size=32, cache_dir=tmp_path_factory.mktemp("cache"))


CLASSES = ("diffuse", "focal", "ground-glass", "normal")


def loader(cache: ImageCache, **changes: object) -> BatchLoader:
    options: dict[str, object] = {
        "indices": range(3, 22), "classes": CLASSES, "batch_size": 4, "shuffle": True, "seed": 7,
        "augment": AugmentConfig(), "device": "cpu",
    }  # fmt: skip
    return BatchLoader(cache, **(options | changes))  # type: ignore[arg-type]


def test_batches(cache: ImageCache) -> None:
    batches = list(loader(cache))
    assert len(batches) == len(loader(cache)) == 5
    assert sorted(i for batch in batches for i in batch.indices) == list(range(3, 22))
    for batch in batches:
        assert batch.images.shape == (len(batch.indices), 1, 32, 32)
        assert batch.images.dtype == torch.float32
        assert batch.images.is_contiguous()
        assert batch.labels.dtype == torch.int64
        expected = [CLASSES.index(cache.records[i].label) for i in batch.indices]
        assert batch.labels.tolist() == expected
        torch.testing.assert_close(
            batch.images.mean((1, 2, 3)), torch.zeros(len(expected)), atol=1e-4, rtol=0
        )
    assert len(batches[-1].indices) == 3


def test_without_augmentation_and_order(cache: ImageCache) -> None:
    plain = loader(cache, shuffle=False, augment=None)
    batch = next(iter(plain))
    assert batch.indices == [3, 4, 5, 6]
    image = cache.images[3].astype(np.float64)
    expected = (image - image.mean()) / image.std()
    np.testing.assert_allclose(batch.images[0, 0].numpy(), expected, atol=1e-4)
    off = loader(cache, shuffle=False, augment=AugmentConfig(enabled=False))
    assert torch.equal(next(iter(off)).images, batch.images)
    with_augmentation = next(iter(loader(cache, shuffle=False)))
    assert not torch.equal(with_augmentation.images, batch.images)


def test_drop_last(cache: ImageCache) -> None:
    short = loader(cache, drop_last=True)
    assert len(short) == 4
    assert [len(batch.indices) for batch in short] == [4] * 4


def test_every_epoch_differs_and_repeats(cache: ImageCache) -> None:
    epochs = [list(loader(cache).epoch(e)) for e in (0, 1)]
    assert [b.indices for b in epochs[0]] != [b.indices for b in epochs[1]]
    again = list(loader(cache).epoch(1))
    for a, b in zip(epochs[1], again, strict=True):
        assert a.indices == b.indices
        assert torch.equal(a.images, b.images)
    other_seed = list(loader(cache, seed=8).epoch(1))
    assert [b.indices for b in other_seed] != [b.indices for b in again]


@pytest.mark.parametrize("start", [1, 3, 5])
def test_resumed_epoch_sees_the_same_batches(cache: ImageCache, start: int) -> None:
    torch.manual_seed(0)
    whole = list(loader(cache).epoch(2))
    torch.manual_seed(99)  # the global generator plays no part
    rest = list(loader(cache).epoch(2, start_step=start))
    assert len(rest) == 5 - start
    for a, b in zip(whole[start:], rest, strict=True):
        assert a.indices == b.indices
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)


def test_three_channels(cache: ImageCache, tmp_path: Path) -> None:
    batch = next(iter(loader(cache, channels=3)))
    assert batch.images.shape == (4, 3, 32, 32)
    assert torch.equal(batch.images[:, 0], batch.images[:, 2])
    assert torch.equal(batch.images[:, :1], next(iter(loader(cache))).images)
    stored = load_cache(
        open_source("phantom:n=24,size=32"), image_size=32, channels=3, cache_dir=tmp_path
    )
    same = next(iter(loader(stored)))
    assert same.indices == batch.indices
    torch.testing.assert_close(same.images, batch.images, atol=1e-3, rtol=0)
    with pytest.raises(DataError, match="1 channels cannot be made of 3"):
        loader(stored, channels=1)


def test_unknown_label(cache: ImageCache) -> None:
    with pytest.raises(DataError, match=r"label 'normal' of phantom/0/\d+ is not among"):
        loader(cache, classes=("diffuse", "focal", "ground-glass"))


def test_batch_size(cache: ImageCache) -> None:
    with pytest.raises(DataError, match="batch_size"):
        loader(cache, batch_size=0)


def test_writing_to_a_batch_leaves_the_cache(cache: ImageCache) -> None:
    before = np.array(cache.images)
    for batch in loader(cache, augment=None):
        batch.images.zero_()
    np.testing.assert_array_equal(cache.images, before)


def test_step_generator_separates_its_arguments() -> None:
    base = (0, 1, 2, "views")
    seeds = {step_seed(*base)}
    for place, value in enumerate((1, 2, 3, "augment")):
        changed = (*base[:place], value, *base[place + 1 :])
        seeds.add(step_seed(*changed))  # type: ignore[arg-type]
    seeds.add(step_seed(1, 0, 2, "views"))
    assert len(seeds) == 6
    assert all(0 <= seed < 2**63 for seed in seeds)
    draws = [torch.rand(3, generator=step_generator(*base)) for _ in range(2)]
    assert torch.equal(*draws)


def test_step_seed_is_stable_across_versions() -> None:
    """A run begun with one version must resume with the next."""
    assert step_seed(0, 0, 0, "augment") == 6350129905373383039


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_device(cache: ImageCache) -> None:
    on_gpu = loader(cache, device="cuda")
    batch = next(iter(on_gpu))
    assert batch.images.device.type == batch.labels.device.type == "cuda"
    torch.cuda.set_sync_debug_mode("error")
    try:
        list(on_gpu)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    plain = next(iter(loader(cache, augment=None)))
    moved = next(iter(loader(cache, augment=None, device="cuda")))
    torch.testing.assert_close(moved.images.cpu(), plain.images, atol=1e-4, rtol=0)


def test_config_is_a_plain_dataclass() -> None:
    config = AugmentConfig(rotation=10.0)
    assert dataclasses.replace(config, probability=0.2).rotation == 10.0
    assert dataclasses.asdict(config)["crop_scale"] == (0.6, 1.0)
