"""What commands write: checked before long work, and never over files of others."""

from __future__ import annotations

import contextlib
import csv
import errno
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from magsd.errors import RunError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

#: Keyword and text in every PNG that is written, by which it is told from others' files.
MARK = ("Software", "magsd")
_TEMPORARY = ".part"


def check_file(path: Path, option: str, *, is_own: Callable[[Path], bool]) -> None:
    """Raise RunError where a file cannot be written, or would replace one that is not ours.

    option: what named the file, for the message. is_own: whether a command of ours wrote a file
    that is there.
    """
    _check_names(path, option)
    if path.is_dir():
        raise RunError(f"{option} {path}: is a folder; expected a file")
    if os.path.lexists(path):
        if not path.is_file():
            raise RunError(f"{option} {path}: not a regular file; choose another")
        if not is_own(path):
            raise RunError(
                f"{option} {path}: exists and was not written by this command; it is not"
                " overwritten"
            )
        if not os.access(path, os.W_OK):
            raise RunError(f"{option} {path}: no permission to write that file")
    check_folder(path.parent, option)


def _check_names(path: Path, option: str) -> None:
    """Raise RunError where a name is longer than files have."""
    try:
        path.stat()
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise RunError(f"{option} {str(path)[:50]}...: the name is too long") from error


def check_folder(
    folder: Path,
    option: str,
    *,
    writes: Iterable[str] = (),
    is_own: Callable[[Path], bool] = lambda folder: False,
) -> None:
    """Raise RunError where a folder cannot be made or written, or holds files of our names.

    writes: names that will be written. is_own: whether a command of ours wrote the folder, so that
    these may be replaced.
    """
    _check_names(folder, option)
    present = folder.absolute()
    while not os.path.lexists(present):
        present = present.parent
    if not present.is_dir():
        raise RunError(f"{option} {folder}: {present} is not a folder")
    if not os.access(present, os.W_OK | os.X_OK):
        raise RunError(f"{option} {folder}: no permission to write in {present}")
    foreign = [name for name in writes if os.path.lexists(folder / name)]
    if foreign and not is_own(folder):
        raise RunError(
            f"{option} {folder}: holds {', '.join(foreign)}, not written by this command; choose"
            " another folder"
        )


def has_json(path: Path, *keys: str) -> bool:
    """Whether a file is JSON: an object with these keys, or a list of such objects."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    items = content if isinstance(content, list) else [content]
    return bool(items) and all(
        isinstance(item, dict) and item.keys() >= set(keys) for item in items
    )


def has_columns(path: Path, *columns: str) -> bool:
    """Whether a file is a CSV whose first columns are these."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return next(csv.reader(file), [])[: len(columns)] == list(columns)
    except (OSError, ValueError, csv.Error):
        return False


def has_mark(path: Path) -> bool:
    """Whether a file is a PNG that says that this package wrote it."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.info.get(MARK[0]) == MARK[1]
    except (OSError, ValueError, SyntaxError):  # Pillow's, of what is no image, too
        return False


def save_png(path: Path, picture: NDArray[np.uint8]) -> None:
    """Write an image (H, W) or (H, W, 3) RGB as PNG with our mark, and the folders on its way."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    path.parent.mkdir(parents=True, exist_ok=True)
    mark = PngInfo()
    mark.add_text(*MARK)
    # A third of the time of the default level, for files that are a sixth larger.
    Image.fromarray(picture).save(path, "PNG", pnginfo=mark, compress_level=3)


def jsonable(value: Any) -> Any:
    """Dataclasses, arrays and containers as JSON types; a number that is not finite is None."""
    if is_dataclass(value) and not isinstance(value, type):
        return {each.name: jsonable(getattr(value, each.name)) for each in fields(value)}
    if isinstance(value, dict):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    if hasattr(value, "tolist"):  # numpy's arrays and numbers
        return jsonable(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (str, int, bool)) else str(value)


def write_text(path: Path, text: str) -> None:
    """Write a file and the folders on its way; RunError where the disk does not take it."""
    with disk_errors(path.parent, "free some space and run the command again"):
        write_atomically(path, lambda file: file.write(text.encode()))


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file so that `path` holds the old or the whole new content, even after a crash.

    The data goes to a neighbor, is forced to the disk, and takes the name in one step. A link stays
    one: the file that it leads to is replaced.
    """
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}{_TEMPORARY}")  # short: the name may be a long one
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    with contextlib.suppress(OSError):  # some file systems cannot sync a folder
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def remove_leftovers(folder: Path) -> None:
    """Delete what killed writers left behind."""
    for leftover in folder.glob(f"*{_TEMPORARY}"):
        leftover.unlink(missing_ok=True)


@contextlib.contextmanager
def disk_errors(folder: Path, advice: str) -> Iterator[None]:
    """Turn a failed write (full, read-only, no permission ...) into a RunError that says where.

    advice: what to do where the disk is full.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        if is_disk_full(error):
            raise RunError(f"the disk is full: {error}{_free_space(folder)}; {advice}") from error
        if isinstance(error, OSError) and error.errno in _UNWRITABLE and _is_within(error, folder):
            raise RunError(f"cannot write in {folder}: {error}") from error
        raise


_UNWRITABLE = {
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ENAMETOOLONG,
}


def _is_within(error: OSError, folder: Path) -> bool:
    """Whether what the error is about lies in a folder."""
    names = (error.filename, error.filename2)
    return any(
        Path(os.fsdecode(n)).absolute().is_relative_to(folder.absolute()) for n in names if n
    )


def is_disk_full(error: BaseException | None) -> bool:
    """True for ENOSPC and EDQUOT, also where torch's or TensorBoard's writer wrapped them."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        error = error.__cause__ or error.__context__
    return False


def _free_space(folder: Path) -> str:
    try:
        free = shutil.disk_usage(folder).free
    except OSError:
        return ""
    return f" ({free / 2**20:.1f} MiB free under {folder})"
