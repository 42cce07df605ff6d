"""Datasets by name, their transforms, and the pair sampler. Knows no model."""

from __future__ import annotations

from pathlib import Path

from cin_fast.data.base import DataError, ImageDataset
from cin_fast.data.catalog import SOURCES, find
from cin_fast.data.sampler import ClassBalancedPairSampler
from cin_fast.data.synthetic import SyntheticBirds
from cin_fast.data.transforms import image_transform, resized_side

__all__ = [
    "ClassBalancedPairSampler",
    "DataError",
    "ImageDataset",
    "build_dataset",
    "dataset_names",
    "left_out",
]


def dataset_names() -> tuple[str, ...]:
    """What ``--dataset`` takes."""
    return (*SOURCES, "synthetic")


def build_dataset(
    name: str,
    root: str | Path | None,
    *,
    train: bool,
    image_size: int = 448,
    skip_bad_images: bool = False,
    seed: int = 0,
) -> ImageDataset:
    """One split of a dataset, ready for a loader.

    Args:
        name: one of :func:`dataset_names`.
        root: its folder, or the one that its archive was unpacked in; None looks in
            $CIN_FAST_DATA, then ./data. ``synthetic`` needs none.
        train: the training split with its random crops and flips, or the test split.
        image_size: side of the crops in pixels.
        skip_bad_images: decode every image now and leave out what cannot be read, instead of
            failing when it is met.
        seed: of the synthetic drawings.

    Raises:
        DataError: naming the file and the fix.
        ValueError: for an unknown name, or an ``image_size`` below 1.
    """
    if image_size < 1:
        raise ValueError(f"image_size: expected at least 1, found {image_size}")
    transform = image_transform(image_size, train=train)
    if name == "synthetic":
        return SyntheticBirds(transform, train=train, size=resized_side(image_size), seed=seed)
    if name not in SOURCES:
        raise ValueError(f"dataset: expected one of {', '.join(dataset_names())}, found {name!r}")
    folder = find(name, None if root is None else Path(root))
    entries, classes = SOURCES[name].read(folder, train=train)
    dataset = ImageDataset(entries, classes, transform, skip_bad_images=skip_bad_images)
    _check_classes(dataset, folder, train)
    return dataset


def left_out(name: str, root: str | Path | None) -> str:
    """What lies in a dataset's folder and is not read, in a line; empty if there is nothing.

    Raises:
        DataError: naming the folder and the fix.
    """
    if name not in SOURCES:
        return ""
    return SOURCES[name].left_out(find(name, None if root is None else Path(root)))


def _check_classes(dataset: ImageDataset, folder: Path, train: bool) -> None:
    split = "training" if train else "test"
    bad = f" that can be read ({len(dataset.skipped)} skipped)" if dataset.skipped else ""
    if not dataset.labels:
        raise DataError(f"{folder} has no {split} image{bad}: it needs both splits")
    if len(dataset.classes) < 2:
        raise DataError(f"{folder} has a single class, {dataset.classes[0]}: it takes at least two")
    present = set(dataset.labels)
    empty = [name for label, name in enumerate(dataset.classes) if label not in present]
    # A class without test images only goes unmeasured.
    if train and empty:
        raise DataError(
            f"{folder}: class {empty[0]} has no training image{bad}; {len(empty)} of "
            f"{len(dataset.classes)} classes have none: add some, or take the class out"
        )
