"""A folder with train/ and test/, each with a folder per class."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from cin_fast.data.base import DataError, Entry, is_image_name, visible_files

_SPLITS = ("train", "test")
# What Windows leaves in every folder.
_NO_NEWS = ("thumbs.db", "desktop.ini")
_EXAMPLES = 3


def read_folder(root: Path, *, train: bool) -> tuple[list[Entry], list[str]]:
    """The images of one split and the names of all classes, in alphabetical order.

    Images may lie in folders within a class's folder; what begins with a dot is left out.

    Raises:
        DataError: naming the folder and the fix.
    """
    names = {split: _classes(root, split) for split in _SPLITS}
    for here, there in (("train", "test"), ("test", "train")):
        only = sorted(set(names[here]) - set(names[there]))
        if only:
            raise DataError(
                f"{root / here / only[0]} has no counterpart {root / there / only[0]}: both splits "
                f"need the same classes ({len(only)} of them differ)"
            )
    split = root / ("train" if train else "test")
    entries = []
    for label, name in enumerate(names["train"]):
        files = visible_files(split / name)
        images = [file for file in files if is_image_name(file)]
        if not images:
            others = _suffixes(_unread(files))
            but = f", but {others}" if others else ""
            raise DataError(
                f"{split / name} holds no image{but}: put some there (.jpg, .png, .webp, ...), or "
                "remove the class from both splits"
            )
        entries += [Entry(file, label) for file in images]
    return entries, names["train"]


def left_out(root: Path) -> str:
    """What of the class folders is no image by its name, in a line; empty if there is nothing.

    Raises:
        DataError: naming the folder and the fix.
    """
    folders = [root / split / name for split in _SPLITS for name in _classes(root, split)]
    unread = [file for folder in folders for file in _unread(visible_files(folder))]
    if not unread:
        return ""
    many = f"{len(unread):,} files by their names" if len(unread) > 1 else "1 file by its name"
    return f"{many}: {_suffixes(unread)}"


def _unread(files: list[Path]) -> list[Path]:
    return [file for file in files if not (is_image_name(file) or file.name.lower() in _NO_NEWS)]


def _suffixes(files: list[Path]) -> str:
    counts = Counter(file.suffix.lower() or "no suffix" for file in files).most_common()
    shown = [f"{count:,} {suffix}" for suffix, count in counts[:_EXAMPLES]]
    return ", ".join(shown) + ", ..." * (len(counts) > _EXAMPLES)


def _classes(root: Path, split: str) -> list[str]:
    folder = root / split
    if not folder.is_dir():
        raise DataError(
            f"{folder} is missing: {root} has to hold train/ and test/, each with a folder per "
            f"class; it holds {_listing(root)}"
        )
    classes = sorted(path.name for path in folder.iterdir() if path.is_dir() and _visible(path))
    if not classes:
        raise DataError(f"{folder} holds no folder: put one per class there, with its images")
    return classes


def _visible(path: Path) -> bool:
    return not path.name.startswith(".")


def _listing(root: Path) -> str:
    names = sorted(path.name + "/" * path.is_dir() for path in root.iterdir())
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") if names else "nothing"
