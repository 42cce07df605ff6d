"""Stanford Cars as it was published: two folders of images, and a devkit of .mat files.

The same folder is what torchvision.datasets.StanfordCars reads, with the same labels; here a file
that is missing or wrong is named, labels are checked, and the folder may have any name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from cin_fast.data.base import DataError, Entry
from cin_fast.data.official import Official

OFFICIAL = Official("Stanford Cars", classes=196, train=8144, test=8041)
META = "cars_meta.mat"
TRAIN_LABELS = "cars_train_annos.mat"
# Published apart from the devkit, whose own cars_test_annos.mat holds no classes.
TEST_LABELS = "cars_test_annos_withlabels.mat"


def read_cars(root: Path, *, train: bool) -> tuple[list[Entry], list[str]]:
    """The images of one split and the names of all classes.

    Raises:
        DataError: naming the file and the fix.
    """
    classes = [str(name) for name in _column(root / "devkit" / META, "class_names")]
    index = root / "devkit" / TRAIN_LABELS if train else _test_labels(root)
    images = _image_folder(root, "cars_train" if train else "cars_test")
    entries, seen = [], set()
    for number, row in enumerate(_column(index, "annotations"), 1):
        try:
            name, label = str(row["fname"]), int(row["class"])
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise DataError(f"{index}: annotation {number} has no fname and class") from error
        if not 1 <= label <= len(classes):
            raise DataError(
                f"{index}: {name} has class {label}, expected 1 to {len(classes)} as in {META}"
            )
        if name in seen or Path(name).name != name:
            reason = "stands there twice" if name in seen else f"lies outside {images}"
            raise DataError(f"{index}: {name} {reason}; get the file again")
        seen.add(name)
        entries.append(Entry(images / name, label - 1))
    if len(classes) == OFFICIAL.classes:
        OFFICIAL.check(index, len(entries), train=train)
    return entries, classes


def _test_labels(root: Path) -> Path:
    places = (root / TEST_LABELS, root / "devkit" / TEST_LABELS)
    return next((place for place in places if place.exists()), places[0])


def _image_folder(root: Path, name: str) -> Path:
    """``name`` itself, or ``name`` within: a copy on the web is packed so."""
    nested = root / name / name
    return nested if nested.is_dir() else root / name


def _column(file: Path, name: str) -> Any:
    """A variable of a .mat file, as an array of one dimension."""
    from scipy.io import loadmat

    if not file.is_file():
        raise DataError(f"{file} is missing: `cin-fast-data download cars` says how to get it")
    try:
        return np.atleast_1d(loadmat(str(file), squeeze_me=True)[name])
    # A broken file makes the parser raise whatever it stumbles over.
    except Exception as error:
        raise DataError(
            f"{file} cannot be read as Stanford Cars' ({type(error).__name__}: {error}): "
            "`cin-fast-data download cars` says how to get it again"
        ) from error
