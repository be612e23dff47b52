"""Images decoded, resized and equalized once, then mapped into memory."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import cv2
import numpy as np
import torch
from filelock import FileLock
from numpy.typing import NDArray

from magsd.data.images import to_gray
from magsd.data.record import Record
from magsd.data.sources.base import Source
from magsd.errors import DataError
from magsd.outputs import is_disk_full
from magsd.paths import expand

_FORMAT = 3  # part of the key: raise it when what is stored changes
#: What decodes images; another version may decode them otherwise, or decode more of them.
_DECODERS = ("pillow", "simplejpeg", "pydicom", "pylibjpeg", "pylibjpeg-openjpeg", "python-gdcm")
_NAMED_BAD = 10
_log = logging.getLogger(__name__)
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class ImageCache:
    """Images of one size, mapped from a file.

    images: (N, S, S) or (N, S, S, 3) RGB uint8. masks: (N, S, S) uint8 of 0 and 1, or None
    where no image has one. has_mask: (N,) bool. records: in the same order. bad: key and reason
    of the images that were left out. copies: the images on other devices, for loaders to share.
    """

    images: NDArray[np.uint8]
    masks: NDArray[np.uint8] | None
    has_mask: NDArray[np.bool_]
    records: tuple[Record, ...]
    bad: list[tuple[str, str]]
    path: Path | None = None
    copies: dict[torch.device, torch.Tensor] = field(
        default_factory=dict, repr=False, compare=False
    )

    def __len__(self) -> int:
        return len(self.records)

    @property
    def image_size(self) -> int:
        """Height and width S."""
        return int(self.images.shape[1])

    @property
    def channels(self) -> int:
        """1 (gray) or 3."""
        return 1 if self.images.ndim == 3 else int(self.images.shape[3])

    def mask(self, index: int) -> NDArray[np.uint8] | None:
        """A copy of an image's mask (S, S), nonzero inside, or None."""
        if self.masks is None or not self.has_mask[index]:
            return None
        return np.array(self.masks[index])


def prepare_image(
    image: NDArray[np.uint8],
    image_size: int,
    channels: int = 1,
    clahe: tuple[float, int] | None = None,
) -> NDArray[np.uint8]:
    """Resize to a square of `image_size`, then CLAHE (clip limit, tiles a side).

    image: (H, W) or (H, W, 3) RGB uint8. Returns (S, S), or (S, S, 3) for three channels.
    """
    if channels == 1:
        image = to_gray(image)
    image = _resize(image, image_size)
    if clahe is not None:
        image = _equalize(image, *clahe)
    if channels == 3 and image.ndim == 2:
        image = np.repeat(image[..., None], 3, axis=2)
    return image


def prepare_mask(mask: NDArray[np.bool_], image_size: int) -> NDArray[np.uint8]:
    """(S, S) uint8 of 0 and 1: 1 where the mask (H, W) covers at least half of the pixel."""
    shares = _resize(mask.astype(np.uint8) * 255, image_size)
    return (shares >= 128).astype(np.uint8)


def _resize(image: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    if image.shape[:2] == (size, size):
        return image
    shrinks = min(image.shape[:2]) >= size
    interpolation = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    # Opencv keeps the dtype, here and below; its types do not say so.
    return np.asarray(cv2.resize(image, (size, size), interpolation=interpolation), np.uint8)


def _equalize(image: NDArray[np.uint8], clip: float, tiles: int) -> NDArray[np.uint8]:
    equalizer = cv2.createCLAHE(clipLimit=float(clip), tileGridSize=(int(tiles), int(tiles)))
    if image.ndim == 2:
        return np.asarray(equalizer.apply(image), np.uint8)
    lab = cv2.cvtColor(image, cv2.COLOR_RGB2LAB)
    lab[..., 0] = equalizer.apply(np.ascontiguousarray(lab[..., 0]))
    return np.asarray(cv2.cvtColor(lab, cv2.COLOR_LAB2RGB), np.uint8)


def default_cache_dir() -> Path:
    """$MAGSD_CACHE, or ~/.cache/magsd."""
    return expand(os.environ.get("MAGSD_CACHE") or "~/.cache/magsd")


def load_cache(
    source: Source,
    *,
    image_size: int,
    channels: int = 1,
    clahe: tuple[float, int] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    skip_bad: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> ImageCache:
    """The source's images at one size, from the cache, which is filled where needed.

    clahe: clip limit and tiles a side; None leaves it out. cache_dir: default
    `default_cache_dir()`. skip_bad: leave images out that cannot be read, rather than raise.
    progress: called with images done and images in all while the cache is filled.

    Raises DataError naming the images that cannot be read, or the folder that is full. Several
    processes may ask for the same cache at once: one fills it, the others wait.
    """
    if image_size < 1:
        raise DataError(f"image_size must be at least 1, not {image_size}")
    if channels not in (1, 3):
        raise DataError(f"channels must be 1 or 3, not {channels}")
    settings = _Settings(image_size, channels, (float(clahe[0]), int(clahe[1])) if clahe else None)
    root = expand(cache_dir) if cache_dir is not None else default_cache_dir()
    folder = root / _cache_key(source, settings)
    with _disk_errors(root, _bytes_needed(source, settings)):
        if not _is_current(source, settings, folder):
            root.mkdir(parents=True, exist_ok=True)
            with FileLock(root / f"{folder.name}.lock"):
                if not _is_current(source, settings, folder):
                    _fill(source, settings, folder, progress)
        return _open(source, settings, folder, skip_bad)


@dataclass(frozen=True)
class _Settings:
    image_size: int
    channels: int
    clahe: tuple[float, int] | None

    @property
    def shape(self) -> tuple[int, ...]:
        size = (self.image_size, self.image_size)
        return size if self.channels == 1 else (*size, 3)


def _cache_key(source: Source, settings: _Settings) -> str:
    digest = hashlib.blake2b(digest_size=16)
    decoders = cv2.__version__, *map(_version, _DECODERS)
    digest.update(repr((_FORMAT, settings, decoders)).encode())
    with worker_pool() as pool:
        for record, content in zip(
            source.records, pool.map(source.fingerprint, source.records), strict=True
        ):
            digest.update(repr((record.key, record.mask_kind, content)).encode())
    return digest.hexdigest()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _bytes_needed(source: Source, settings: _Settings) -> int:
    count = len(source.records)
    masks = count * settings.image_size**2 if any(r.mask_kind for r in source.records) else 0
    return count * int(np.prod(settings.shape)) + masks


@contextmanager
def _disk_errors(root: Path, needed: int) -> Iterator[None]:
    try:
        yield
    except (OSError, NotImplementedError) as error:  # the latter is filelock's, without locks
        if is_disk_full(error):
            raise DataError(
                f"{root}: disk full; the image cache needs {needed:,} bytes there"
                " (free some, or set MAGSD_CACHE to another folder)"
            ) from error
        raise DataError(
            f"{root}: the image cache cannot be kept there ({error}); set MAGSD_CACHE to another"
            " folder"
        ) from error


def _fill(
    source: Source,
    settings: _Settings,
    folder: Path,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Write the cache next to its final path and rename it; the caller holds its lock."""
    temporary = folder.with_name(f"{folder.name}.part")
    for leftover in (temporary, folder):  # of a process that was killed, or damaged
        if leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover)
        else:
            leftover.unlink(missing_ok=True)
    temporary.mkdir()
    try:
        meta = _write_files(source, settings, temporary, progress)
        with (temporary / "meta.json").open("w", encoding="utf-8") as file:
            json.dump(meta, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, folder)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt(
                f"images of {source.spec} were being prepared; the next start prepares them again"
            ) from None
        raise


def _read(source: Source, record: Record) -> tuple[NDArray[np.uint8], NDArray[np.bool_] | None]:
    """The image and its mask, if it has one."""
    image = source.read_image(record)
    return image, source.read_mask(record) if record.mask_kind else None


def _write_files(
    source: Source,
    settings: _Settings,
    folder: Path,
    progress: Callable[[int, int], None] | None,
) -> dict[str, Any]:
    records = source.records
    count = len(records)
    with_masks = any(record.mask_kind for record in records)
    images = _allocate(folder / "images.bin", (count, *settings.shape))
    size = settings.image_size
    masks = _allocate(folder / "masks.bin", (count, size, size)) if with_masks else None

    def prepare(record: Record) -> tuple[NDArray[np.uint8], NDArray[np.uint8] | None] | str:
        try:
            image, mask = _read(source, record)
        except DataError as error:
            return str(error)
        image = prepare_image(image, size, settings.channels, settings.clahe)
        return image, None if mask is None else prepare_mask(mask, size)

    kept: list[int] = []
    has_mask: list[bool] = []
    bad: list[tuple[str, str]] = []
    with worker_pool() as pool:
        for index, result in enumerate(in_order(pool, prepare, records)):
            if isinstance(result, str):
                bad.append((records[index].key, result))
            else:
                row = len(kept)
                images[row] = result[0]
                if masks is not None and result[1] is not None:
                    masks[row] = result[1]
                kept.append(index)
                has_mask.append(result[1] is not None)
            if progress is not None:
                progress(index + 1, count)
    _shrink(folder / "images.bin", images, len(kept))
    if masks is not None:
        _shrink(folder / "masks.bin", masks, len(kept))
    return {"kept": kept, "has_mask": has_mask, "bad": bad, "masks": with_masks}


def _allocate(path: Path, shape: tuple[int, ...]) -> np.memmap[Any, np.dtype[np.uint8]]:
    """A zeroed file mapped for writing, its blocks reserved.

    Writing through a map into blocks that a full disk cannot give would end the process by
    SIGBUS; reserving them raises OSError instead.
    """
    size = int(np.prod(shape))
    with path.open("wb") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
        else:
            block = bytes(1 << 20)
            for start in range(0, size, len(block)):
                file.write(block[: min(len(block), size - start)])
    return np.memmap(path, np.uint8, "r+", shape=shape)


def _shrink(path: Path, array: np.memmap[Any, np.dtype[np.uint8]], rows: int) -> None:
    array.flush()
    os.truncate(path, rows * int(np.prod(array.shape[1:])))


def _is_current(source: Source, settings: _Settings, folder: Path) -> bool:
    """Whether the cache is complete, and none of the images that it lacks can be read by now."""
    meta = _read_meta(folder)
    if meta is None or not _is_complete(meta, settings, folder, len(source.records)):
        return False
    bad = {key for key, _ in meta["bad"]}
    for record in source.records if bad else ():
        if record.key in bad:
            with contextlib.suppress(DataError):
                _read(source, record)
                return False
    return True


def _read_meta(folder: Path) -> dict[str, Any] | None:
    """What the cache says of itself, or None where it is missing or damaged."""
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        return {
            "kept": [int(index) for index in meta["kept"]],
            "has_mask": [bool(has) for has in meta["has_mask"]],
            "bad": [(str(key), str(reason)) for key, reason in meta["bad"]],
            "masks": bool(meta["masks"]),
        }
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None


def _is_complete(meta: dict[str, Any], settings: _Settings, folder: Path, total: int) -> bool:
    """Whether all images are accounted for, with files of the right length."""
    kept = meta["kept"]
    rows = len(kept)
    rising = kept == sorted(set(kept)) and set(kept) <= set(range(total))
    if rows + len(meta["bad"]) != total or not rising:
        return False
    sizes = {"images.bin": rows * int(np.prod(settings.shape))}
    if meta["masks"]:
        sizes["masks.bin"] = rows * settings.image_size**2
    try:
        found = {name: (folder / name).stat().st_size for name in sizes}
    except OSError:
        return False
    return found == sizes and len(meta["has_mask"]) == rows


def _open(source: Source, settings: _Settings, folder: Path, skip_bad: bool) -> ImageCache:
    meta = _read_meta(folder)
    if meta is None:
        raise OSError(f"{folder} was removed while it was read")
    bad, kept = meta["bad"], meta["kept"]
    if bad and (not skip_bad or not kept):
        raise DataError(_describe_bad(bad, len(source.records)))
    size = settings.image_size
    images = np.memmap(folder / "images.bin", np.uint8, "r", shape=(len(kept), *settings.shape))
    has_mask = np.array(meta["has_mask"], bool)
    masks = None
    if has_mask.any():
        masks = np.memmap(folder / "masks.bin", np.uint8, "r", shape=(len(kept), size, size))
    records = tuple(source.records[index] for index in kept)
    promised = sum(record.mask_kind is not None for record in records)
    if promised > has_mask.sum():
        _log.warning(
            "%s: %d of %d annotated images have other proportions than their annotation"
            " (cropped since) and go without a mask",
            source.spec, promised - has_mask.sum(), promised,
        )  # fmt: skip
    return ImageCache(images, masks, has_mask, records, bad, folder)


def _describe_bad(bad: list[tuple[str, str]], total: int) -> str:
    lines = [f"{len(bad)} of {total} images cannot be read:"]
    lines += [f"  {key}: {reason}" for key, reason in bad[:_NAMED_BAD]]
    if len(bad) > _NAMED_BAD:
        lines.append(f"  and {len(bad) - _NAMED_BAD} more")
    if len(bad) < total:
        lines.append("Repair or remove them, or leave them out with data.skip_bad=true.")
    return "\n".join(lines)


@contextmanager
def worker_pool() -> Iterator[ThreadPoolExecutor]:
    """Threads (opencv and file reads free the interpreter) that an error stops at once."""
    pool = ThreadPoolExecutor(_workers())
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def in_order(
    pool: ThreadPoolExecutor, work: Callable[[Record], _Result], records: Sequence[Record]
) -> Iterator[_Result]:
    """Results in order; few are ahead of the one that is waited for, however slow the disk is."""
    running: deque[Future[_Result]] = deque()
    for record in records:
        running.append(pool.submit(work, record))
        if len(running) > 2 * _workers():
            yield running.popleft().result()
    while running:
        yield running.popleft().result()


def _workers() -> int:
    return min(32, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 4)
