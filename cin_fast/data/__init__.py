"""Datasets by name, their transforms, and the pair sampler. Knows no model."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from cin_fast.data.base import DataError, Entry, ImageDataset
from cin_fast.data.cub import read_cub
from cin_fast.data.folder import read_folder
from cin_fast.data.sampler import ClassBalancedPairSampler
from cin_fast.data.synthetic import SyntheticBirds
from cin_fast.data.transforms import image_transform, resized_side

__all__ = ["ClassBalancedPairSampler", "DataError", "ImageDataset", "build_dataset", "dataset_names"]

_READERS: dict[str, Callable[..., tuple[list[Entry], list[str]]]] = {
    "cub": read_cub,
    "folder": read_folder,
}
_USUAL_FOLDERS = {"cub": "CUB_200_2011", "folder": "."}
_HOW_TO_GET = {
    "cub": "CUB-200-2011 comes from the Caltech data archive (DOI 10.22002/D1.20098): unpack "
    "CUB_200_2011.tgz and give its folder",
    "folder": "give a folder with train/ and test/, each with a folder of images per class",
}


def dataset_names() -> tuple[str, ...]:
    """What ``--dataset`` takes."""
    return (*_READERS, "synthetic")


def build_dataset(
    name: str,
    root: Path | None,
    *,
    train: bool,
    image_size: int = 448,
    skip_bad_images: bool = False,
    seed: int = 0,
) -> ImageDataset:
    """One split of a dataset, ready for a loader.

    Args:
        name: one of :func:`dataset_names`.
        root: its folder; None looks in $CIN_FAST_DATA, then ./data. ``synthetic`` needs none.
        train: the training split with its random crops and flips, or the test split.
        image_size: side of the crops in pixels.
        skip_bad_images: leave out what cannot be read, instead of failing when it is met.
        seed: of the synthetic drawings.

    Raises:
        DataError: naming the file and the fix.
        ValueError: for an unknown name.
    """
    transform = image_transform(image_size, train=train)
    if name == "synthetic":
        return SyntheticBirds(transform, train=train, size=resized_side(image_size), seed=seed)
    if name not in _READERS:
        raise ValueError(f"dataset: expected one of {', '.join(dataset_names())}, found {name!r}")
    folder = _find(name, root)
    entries, classes = _READERS[name](folder, train=train)
    _check(entries, classes, folder, train)
    return ImageDataset(entries, classes, transform, skip_bad_images=skip_bad_images)


def _find(name: str, root: Path | None) -> Path:
    default = Path(os.environ.get("CIN_FAST_DATA", "data"))
    places = [root or default]
    places.append(places[0] / _USUAL_FOLDERS[name])
    marks = ("classes.txt", "images.txt") if name == "cub" else ("train", "test")
    for place in places:
        if any((place / mark).exists() for mark in marks):
            return place
    looked = " and ".join(dict.fromkeys(str(place) for place in places))
    raise DataError(f"no {name} data in {looked}: {_HOW_TO_GET[name]} (--data-root)")


def _check(entries: list[Entry], classes: list[str], root: Path, train: bool) -> None:
    split = "training" if train else "test"
    present = {entry.label for entry in entries}
    if not entries:
        raise DataError(f"{root} has no {split} image")
    empty = [name for label, name in enumerate(classes) if label not in present]
    if train and empty:
        raise DataError(f"{root}: class {empty[0]} has no training image ({len(empty)} such)")
    missing = [entry.path for entry in entries if not entry.path.is_file()]
    if missing:
        raise DataError(
            f"{missing[0]} is missing ({len(missing)} of {len(entries)} {split} images are): "
            "unpack the archive again"
        )
