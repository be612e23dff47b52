"""The files of a data set's folder, and why some of them are left out."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from magsd.data.formats import format_of
from magsd.data.images import IMAGE_SUFFIXES
from magsd.errors import DataError
from magsd.paths import file_identity

#: What systems and tools leave behind: never of interest.
_JUNK = frozenset({
    *("__macosx", ".ds_store", ".localized", ".trashes", ".fseventsd", ".spotlight-v100"),
    *("thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin", "system volume information"),
    *("@eadir", "lost+found", ".git", ".gitkeep", ".gitignore", ".gitattributes"),
    *(".ipynb_checkpoints", "__pycache__", "dicomdir"),
})  # fmt: skip
_SUFFIX = re.compile(r"\.[a-z][a-z0-9_~-]{0,9}")
_PACKED = frozenset({".gz", ".bz2", ".xz", ".zst", ".zip", ".z"})
_EXAMPLES = 3
DANGLING = "behind a dangling link"


class LeftOut:
    """Files and folders that are left out, by the reason, which follows a count in a sentence."""

    def __init__(self) -> None:
        self._paths: dict[str, list[Path]] = {}

    def add(self, path: Path, reason: str) -> None:
        """Leave `path` out because of `reason`, as in "3 of .txt" or "1 hidden"."""
        self._paths.setdefault(reason, []).append(path)

    def update(self, other: LeftOut) -> None:
        """Leave out what `other` does."""
        for reason, paths in other._paths.items():
            self._paths.setdefault(reason, []).extend(paths)

    def paths(self, reason: str) -> list[Path]:
        """What is left out for a reason."""
        return list(self._paths.get(reason, ()))

    def within(self, folder: Path) -> LeftOut:
        """What of it lies in a folder."""
        part = LeftOut()
        for reason, paths in self._paths.items():
            for path in paths:
                if path.is_relative_to(folder):
                    part.add(path, reason)
        return part

    def __len__(self) -> int:
        return sum(map(len, self._paths.values()))

    def text(self, root: Path) -> str:
        """Counts by reason, each with the first names from `root` on."""
        parts = []
        for reason, paths in sorted(self._paths.items()):
            names = [shown(path.relative_to(root)) for path in sorted(paths)[:_EXAMPLES]]
            more = ", ..." if len(paths) > _EXAMPLES else ""
            parts.append(f"{len(paths)} {reason} ({', '.join(names)}{more})")
        return ", ".join(parts)


def shown(path: Path | str) -> str:
    """A path as text that can be written anywhere."""
    return str(path).encode(errors="backslashreplace").decode()


def is_junk(name: str) -> bool:
    """Whether a name is that of a file or folder that a system or tool left behind."""
    return name.lower() in _JUNK or name.startswith("._")


def subfolders(folder: Path) -> list[Path]:
    """The folders in a folder, linked ones too, sorted; hidden ones and junk are left out.

    Raises DataError where the folder cannot be opened.
    """
    return [
        Path(entry.path)
        for entry in _entries(folder)
        if not entry.name.startswith(".") and _is_folder(entry)
    ]


def files_in(folder: Path, left_out: LeftOut) -> list[Path]:
    """The files in a folder, not in its subfolders, sorted; hidden ones and junk are left out.

    Raises DataError where the folder cannot be opened.
    """
    return [path for path, deeper in _look(folder, left_out) if not deeper]


def walk(folder: Path, left_out: LeftOut) -> list[Path]:
    """All files under a folder, sorted; what is hidden is left out, and junk without a word.

    Linked folders are followed, each folder once. Raises nothing: what cannot be opened is left
    out. A link that leads nowhere holds nothing.
    """
    if folder.is_symlink() and not os.path.exists(folder):
        return []
    files: list[Path] = []
    # A link to a folder above would lead to all that lies beside this one.
    above = {*folder.absolute().parents, *folder.resolve().parents}
    seen = {file_identity(path) for path in above} - {None}
    # Real folders come first, so that a link to one of them never hides it.
    waiting, links = [folder], list[Path]()
    while waiting or links:
        place = waiting.pop() if waiting else links.pop(0)
        identity = file_identity(place)
        if identity in seen:
            left_out.add(place, "linked twice")
            continue
        try:
            found = list(_look(place, left_out))
        except (OSError, DataError):
            left_out.add(place, "that cannot be opened")
            continue
        seen.add(identity)
        files += [path for path, deeper in found if not deeper]
        for path, deeper in found:
            if deeper:
                (links if path.is_symlink() else waiting).append(path)
    return sorted(files)


def _look(folder: Path, left_out: LeftOut) -> Iterator[tuple[Path, bool]]:
    """The entries of a folder that are files, and those that are folders: True."""
    for entry in _entries(folder):
        path = Path(entry.path)
        if entry.name.startswith("."):
            left_out.add(path, "hidden")
        elif shown(entry.name) != entry.name:
            left_out.add(path, "with a name that is no UTF-8")
        elif _is_folder(entry):
            yield path, True
        elif _is_file(entry):
            yield path, False
        elif entry.is_symlink():
            left_out.add(path, DANGLING)
        else:
            left_out.add(path, "neither file nor folder")


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            found = [entry for entry in entries if not is_junk(entry.name)]
    except OSError as error:
        raise DataError(f"{shown(folder)}: cannot be opened ({error.strerror})") from error
    return sorted(found, key=lambda entry: entry.name)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError:
        return False


def why_no_image(path: Path) -> str | None:
    """The reason to leave a file out as no image; None where it is one.

    By its suffix; without a known one by its content: DICOM under any name, the other formats
    where the name has no suffix, as in 1.2.840.113.
    """
    suffix = path.suffix.lower()
    if suffix in IMAGE_SUFFIXES:
        return None
    try:
        with path.open("rb") as file:
            head = file.read(132)
    except OSError:
        return "that cannot be opened"
    kind = format_of(head)
    if kind == "DICOM":
        return None
    if not _SUFFIX.fullmatch(suffix):
        return None if kind else "of no suffix"
    if suffix in _PACKED:
        suffix = "".join(path.suffixes[-2:]).lower()
    return f"of {suffix}"


def find_images(folder: Path) -> list[Path]:
    """The image files under `folder` by suffix, sorted; hidden ones and junk are left out."""
    return find_files(folder, IMAGE_SUFFIXES)


def find_files(folder: Path, suffixes: frozenset[str]) -> list[Path]:
    """The files under `folder` with one of the suffixes, sorted; hidden ones are left out."""
    return [path for path in walk(folder, LeftOut()) if path.suffix.lower() in suffixes]


def holder(folder: Path, *names: str, deep: int = 2) -> Path | None:
    """The folder that holds a file or folder of one of the names: `folder`, or one within it.

    deep: levels below `folder` that are looked at, the higher ones first.
    """
    level = [folder]
    for _ in range(deep + 1):
        for place in level:
            if any(
                os.path.exists(place / name) for name in names
            ):  # False, too, if it may not look
                return place
        level = [path for place in level for path in readable_subfolders(place)]
    return None


def readable_subfolders(folder: Path) -> list[Path]:
    """Those of `subfolders`; none where the folder cannot be opened."""
    try:
        return subfolders(folder)
    except DataError:
        return []
