"""A folder with train/ and test/, each with a folder per class."""

from __future__ import annotations

from pathlib import Path

from torchvision.datasets.folder import IMG_EXTENSIONS

from cin_fast.data.base import DataError, Entry


def read_folder(root: Path, *, train: bool) -> tuple[list[Entry], list[str]]:
    """The images of one split and the names of all classes, in alphabetical order.

    Raises:
        DataError: naming the folder and the fix.
    """
    names = {split: _classes(root / split) for split in ("train", "test")}
    for here, there in (("train", "test"), ("test", "train")):
        only = sorted(set(names[here]) - set(names[there]))
        if only:
            raise DataError(f"{root / here / only[0]} has no counterpart in {root / there}")
    split = root / ("train" if train else "test")
    classes = names["train"]
    entries = []
    for label, name in enumerate(classes):
        files = sorted(
            p for p in (split / name).iterdir() if p.suffix.lower() in IMG_EXTENSIONS
        )
        if not files:
            raise DataError(f"{split / name} holds no image ({', '.join(IMG_EXTENSIONS)})")
        entries += [Entry(file, label) for file in files]
    return entries, classes


def _classes(split: Path) -> list[str]:
    if not split.is_dir():
        raise DataError(
            f"{split} is missing: a dataset folder holds train/ and test/, each with a folder "
            "per class"
        )
    classes = sorted(p.name for p in split.iterdir() if p.is_dir())
    if not classes:
        raise DataError(f"{split} holds no folder: one per class is expected")
    return classes
