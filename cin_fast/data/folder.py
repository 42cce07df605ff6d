"""A folder with train/ and test/, each with a folder per class."""

from __future__ import annotations

from pathlib import Path

from torchvision.datasets.folder import IMG_EXTENSIONS

from cin_fast.data.base import DataError, Entry


def read_folder(root: Path, *, train: bool) -> tuple[list[Entry], list[str]]:
    """The images of one split and the names of all classes, in alphabetical order.

    Images may lie in folders within a class's folder; what begins with a dot is left out.

    Raises:
        DataError: naming the folder and the fix.
    """
    names = {split: _classes(root, split) for split in ("train", "test")}
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
        files = _images(split / name)
        if not files:
            raise DataError(
                f"{split / name} holds no image: put some there ({', '.join(IMG_EXTENSIONS)}), or "
                "remove the class from both splits"
            )
        entries += [Entry(file, label) for file in files]
    return entries, names["train"]


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


def _images(folder: Path) -> list[Path]:
    found = (path for path in folder.rglob("*") if path.suffix.lower() in IMG_EXTENSIONS)
    return sorted(path for path in found if _visible(path) and path.is_file())


def _visible(path: Path) -> bool:
    return not path.name.startswith(".")


def _listing(root: Path) -> str:
    names = sorted(path.name + "/" * path.is_dir() for path in root.iterdir())
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") if names else "nothing"
