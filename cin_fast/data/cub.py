"""CUB-200-2011's own layout: four index files and images/; any dataset laid out like it."""

from __future__ import annotations

from pathlib import Path

from cin_fast.data.base import DataError, Entry

INDEX_FILES = ("classes.txt", "images.txt", "image_class_labels.txt", "train_test_split.txt")
OFFICIAL_CLASSES = 200
OFFICIAL_COUNTS = {True: 5994, False: 5794}


def read_cub(root: Path, *, train: bool) -> tuple[list[Entry], list[str]]:
    """The images of one split and the names of all classes.

    The number of classes comes from classes.txt; with the 200 of the real CUB-200-2011, the
    official split counts are checked.

    Raises:
        DataError: naming the file, the line where there is one, and the fix.
    """
    for name in INDEX_FILES:
        if not (root / name).is_file():
            raise DataError(
                f"{root / name} is missing: the folder of a CUB-like dataset holds "
                f"{', '.join(INDEX_FILES)} and images/"
            )
    classes = _table(root / "classes.txt")
    paths = _table(root / "images.txt")
    labels = _table(root / "image_class_labels.txt")
    splits = _table(root / "train_test_split.txt")
    numbers = {number: index for index, number in enumerate(classes)}
    entries = []
    for image, relative in paths.items():
        for table, name in ((labels, INDEX_FILES[2]), (splits, INDEX_FILES[3])):
            if image not in table:
                raise DataError(f"{root / name}: no line for image {image} ({relative})")
        if labels[image] not in numbers:
            raise DataError(
                f"{root / INDEX_FILES[2]}: image {image} has class {labels[image]}, which "
                f"classes.txt does not list (it has {len(classes)})"
            )
        if splits[image] not in ("0", "1"):
            raise DataError(
                f"{root / INDEX_FILES[3]}: image {image} has {splits[image]!r}, expected 0 or 1"
            )
        if (splits[image] == "1") == train:
            entries.append(Entry(root / "images" / relative, numbers[labels[image]]))
    _check_official(root, len(classes), len(entries), train)
    return entries, list(classes.values())


def _table(path: Path) -> dict[str, str]:
    table: dict[str, str] = {}
    for line_number, line in enumerate(path.read_text().splitlines(), 1):
        if not line.strip():
            continue
        key, _, value = line.strip().partition(" ")
        if not value:
            raise DataError(f"{path}, line {line_number}: expected two columns, found {line!r}")
        if key in table:
            raise DataError(f"{path}, line {line_number}: {key} stands there twice")
        table[key] = value.strip()
    if not table:
        raise DataError(f"{path} is empty")
    return table


def _check_official(root: Path, classes: int, images: int, train: bool) -> None:
    expected = OFFICIAL_COUNTS[train]
    if classes == OFFICIAL_CLASSES and root.name == "CUB_200_2011" and images != expected:
        raise DataError(
            f"{root} has {images} {'training' if train else 'test'} images, CUB-200-2011 has "
            f"{expected}: unpack the archive again"
        )
