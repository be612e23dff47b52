"""Where the class folders of `folder:DIR` lie: in DIR, or in the sides of a published split."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from magsd.data.record import SIDE_NAMES, Side
from magsd.data.sources.files import (
    DANGLING,
    LeftOut,
    files_in,
    readable_subfolders,
    shown,
    subfolders,
    why_no_image,
)
from magsd.data.sources.masks import is_image_folder, is_mask_folder
from magsd.errors import DataError

#: The highest number of folders, each alone in the one above, that an archive may lie in.
_DEEP = 4
_log = logging.getLogger(__name__)


def find_classes(
    folder: Path, classes: Sequence[str] | None, left_out: LeftOut
) -> list[tuple[Path, Side | None]]:
    """The class folders, and for each the side of a published split on which it stands.

    classes: those that are expected; a folder of such a name is one. Images beside class folders
    are left out. A link that leads nowhere is taken for a class folder, which then has no images.
    Raises DataError where the sides of a split lack train, or their classes.
    """
    found: list[tuple[Path, Side | None]] = []
    for root, side in _roots(_innermost(folder, classes or (), left_out), left_out):
        inside = subfolders(root)
        masks = [path for path in inside if is_mask_folder(path.name)]
        if masks and all(path in masks or is_image_folder(path.name) for path in inside):
            raise DataError(
                f"{root}: holds {', '.join(path.name for path in inside)}, but no class folders"
            )
        if taken := [path.name for path in masks if path.name not in (classes or ())]:
            _log.warning(
                "%s: the folder %s is taken for a class; put masks into the folder of each"
                " class", root, " and ".join(taken),
            )  # fmt: skip
        found += [(path, side) for path in (*_note_images(root, left_out), *inside)]
    for path, _ in found:
        _look_for_sides(path)
    return found


def _innermost(folder: Path, classes: Sequence[str], left_out: LeftOut) -> Path:
    """The folder, or the one within it that holds the classes, where that is alone there."""
    for _ in range(_DEEP):
        inner = _only_one(folder, classes)
        if inner is None:
            break
        _note_images(folder, left_out)
        _log.warning(
            "%s: holds only the folder %s: its subfolders are taken for the classes, %s",
            folder, inner.name, ", ".join(shown(path.name) for path in subfolders(inner)[:10]),
        )  # fmt: skip
        folder = inner
    return folder


def _only_one(folder: Path, classes: Sequence[str]) -> Path | None:
    """The folder in which the classes lie, where that is the only one that may be meant."""
    inside = subfolders(folder)
    if any(is_image_folder(path.name) for path in inside):
        inside = [path for path in inside if not is_mask_folder(path.name)]
    if len(inside) != 1 or inside[0].name in classes:
        return None
    (inner,) = inside
    deeper = readable_subfolders(inner)
    is_class = any(is_image_folder(path.name) and not readable_subfolders(path) for path in deeper)
    return None if not deeper or is_class or _images_in(inner) else inner


def _roots(folder: Path, left_out: LeftOut) -> list[tuple[Path, Side | None]]:
    """The folders that hold class folders: the sides of a split, or `folder` alone."""
    inside = subfolders(folder)
    sides = {path: side for path in inside if (side := _side(path.name))}
    others = [path for path in inside if path not in sides]
    sides = {_undoubled(path): side for path, side in sides.items()}
    found = set(sides.values())
    bare = [path for path in sides if not subfolders(path)]
    if found <= {"train"} or (others and ("train" not in found or len(bare) == len(sides))):
        return [(folder, None)]  # "train" among means of transport
    if "train" not in found:
        names = " and ".join(path.name for path in sides)
        raise DataError(
            f"{folder}: {names} look like sides of a split, but there is no train; to read one of"
            f" them alone, name it: folder:{next(iter(sides))}"
        )
    if untold := [path for path in bare if sides[path] == "train"]:
        raise DataError(f"{untold[0]}: a side of a split must hold one subfolder per class")
    _note_images(folder, left_out)
    if others or bare:
        _log.warning(
            "%s: a published split; folders beside it, or without classes, are left out: %s",
            folder, ", ".join(shown(path.name) for path in [*others, *bare]),
        )  # fmt: skip
    sides = {path: side for path, side in sides.items() if path not in bare}
    if set(sides.values()) == {"train"}:  # without other sides there is no split
        return [(path, None) for path in sides]
    return list(sides.items())


def _side(name: str) -> Side | None:
    """The side that a folder's name says: "Train", "test_set", "Training"."""
    plain = "".join(filter(str.isalnum, name.lower()))
    for ending in ("", "set", "data", "images"):
        if plain.endswith(ending) and (side := SIDE_NAMES.get(plain.removesuffix(ending))):
            return side
    return None


def _undoubled(folder: Path) -> Path:
    """The folder of the same name that is alone in a side of a split, as in train/train."""
    inside = subfolders(folder)
    same = len(inside) == 1 and _side(inside[0].name) == _side(folder.name)
    return inside[0] if same and not _images_in(folder) else folder


def _look_for_sides(folder: Path) -> None:
    """Raise DataError, or warn, where a class holds the sides of a split."""
    sides = [path for path in readable_subfolders(folder) if _side(path.name)]
    if len({_side(path.name) for path in sides}) < 2:
        return
    names = ", ".join(path.name for path in sides)
    deeper = (path for side in sides for path in readable_subfolders(side))
    if any(not is_image_folder(path.name) and not is_mask_folder(path.name) for path in deeper):
        raise DataError(
            f"{folder}: holds {names} with folders of their own, so it is a data set, not a class;"
            f" use folder:{folder}"
        )
    _log.warning(
        "%s: the sides %s within a class are no published split here: images are divided into"
        " folds", folder, names,
    )  # fmt: skip


def _note_images(folder: Path, left_out: LeftOut) -> list[Path]:
    """Leave out images that lie in no class; return links to a class that lead nowhere."""
    beside = LeftOut()
    for path in files_in(folder, beside):
        if why_no_image(path) is None:
            left_out.add(path, "beside the folders of the classes")
    left_out.update(beside)
    return [path for path in beside.paths(DANGLING) if not path.suffix]


def _images_in(folder: Path) -> list[Path]:
    return [path for path in files_in(folder, LeftOut()) if why_no_image(path) is None]
