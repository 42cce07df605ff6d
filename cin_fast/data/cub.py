"""CUB-200-2011's own layout: four index files and images/; any dataset laid out like it."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from cin_fast.data.base import DataError, Entry
from cin_fast.data.official import Official
from cin_fast.data.text import read_lines

CLASSES, IMAGES, LABELS, SPLIT = (
    "classes.txt", "images.txt", "image_class_labels.txt", "train_test_split.txt",
)  # fmt: skip
INDEX_FILES = (CLASSES, IMAGES, LABELS, SPLIT)
OFFICIAL = Official("CUB-200-2011", classes=200, train=5994, test=5794)
# Other sets in this layout may have 200 classes, too.
_OFFICIAL_FIRST = "001.Black_footed_Albatross"


def read_cub(root: Path, *, train: bool) -> tuple[list[Entry], list[str]]:
    """The images of one split and the names of all classes.

    The number of classes comes from classes.txt; for the real CUB-200-2011 the official split
    counts are checked.

    Raises:
        DataError: naming the file, the line where there is one, and the fix.
    """
    for name in (*INDEX_FILES, "images"):
        if not (root / name).exists():
            raise DataError(
                f"{root / name} is missing: the folder of a dataset in CUB's layout holds "
                f"{', '.join(INDEX_FILES)} and images/"
            )
    classes = _table(root / CLASSES)
    paths = _table(root / IMAGES)
    labels = _table(root / LABELS)
    splits = _table(root / SPLIT)
    _check_same_images(root, paths, labels, LABELS)
    _check_same_images(root, paths, splits, SPLIT)
    for name, table in ((CLASSES, classes), (IMAGES, paths)):
        _check_unique(root / name, table)
    numbers = {number: index for index, number in enumerate(classes)}
    entries = []
    for image, relative in paths.items():
        label, split = labels[image], splits[image]
        if label not in numbers:
            raise DataError(
                f"{root / LABELS}: image {image} has class {label}, which {CLASSES} does not "
                f"list (it lists {len(classes)})"
            )
        if split not in ("0", "1"):
            raise DataError(f"{root / SPLIT}: image {image} has {split!r}, expected 0 or 1")
        if PurePosixPath(relative).is_absolute() or ".." in PurePosixPath(relative).parts:
            raise DataError(f"{root / IMAGES}: {relative} lies outside images/")
        if (split == "1") == train:
            entries.append(Entry(root / "images" / relative, numbers[label]))
    names = list(classes.values())
    if is_official(names):
        OFFICIAL.check(root / SPLIT, len(entries), train=train)
    return entries, names


def is_official(classes: list[str]) -> bool:
    """Whether these are the classes of CUB-200-2011 itself."""
    return len(classes) == OFFICIAL.classes and classes[0] == _OFFICIAL_FIRST


def _table(path: Path) -> dict[str, str]:
    table: dict[str, str] = {}
    for number, line in read_lines(path):
        # Spreadsheets write tabs; names may hold spaces.
        columns = line.split(None, 1)
        if len(columns) < 2:
            raise DataError(
                f"{path}, line {number}: expected two columns with a space between, found {line!r}"
            )
        key, value = columns
        if key in table:
            raise DataError(f"{path}, line {number}: {key} stands there twice; remove one")
        table[key] = value
    return table


def _check_same_images(root: Path, paths: dict[str, str], table: dict[str, str], name: str) -> None:
    for image, relative in paths.items():
        if image not in table:
            raise DataError(f"{root / name}: no line for image {image} ({relative}) of {IMAGES}")
    for image in table:
        if image not in paths:
            raise DataError(f"{root / name}: image {image} is not listed in {root / IMAGES}")


def _check_unique(path: Path, table: dict[str, str]) -> None:
    seen: dict[str, str] = {}
    for key, value in table.items():
        if value in seen:
            raise DataError(f"{path}: {value} stands there as {seen[value]} and as {key}")
        seen[value] = key
