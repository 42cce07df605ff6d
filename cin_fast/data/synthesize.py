"""Writes the drawn birds to disk, in the layouts that the readers of real sets understand."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from cin_fast.data import cub
from cin_fast.data.base import DataError
from cin_fast.data.synthetic import (
    MAX_CLASSES,
    TEST_PER_CLASS,
    TRAIN_PER_CLASS,
    draw_bird,
    species,
)

LAYOUTS = ("cub", "folder")
# Of JPEG: no visible artefacts on flat colours.
_QUALITY = 95
# Training takes no fewer.
MIN_CLASSES = 2


@dataclass(frozen=True)
class _Image:
    """One picture to write: where under each layout's root, and what."""

    label: int
    train: bool
    folder: str
    file: str
    key: str


def synthesize(
    output: Path,
    *,
    layout: str = "cub",
    classes: int,
    images_per_class: int,
    image_size: int,
    seed: int,
) -> int:
    """Draw a dataset into the new folder ``output``; returns how many images it holds.

    ``images_per_class`` counts training images; test images come on top, 25 for 60.

    Raises:
        DataError: if ``output`` is in use or the current folder, or a number is out of range.
    """
    for name, value, least in (("images per class", images_per_class, 1), ("seed", seed, 0)):
        if value < least:
            raise DataError(f"{name}: expected {least} or more, found {value}")
    if not 16 <= image_size <= 2048:
        raise DataError(f"image size: expected 16 to 2048, found {image_size}")
    if not MIN_CLASSES <= classes <= MAX_CLASSES:
        raise DataError(f"classes: expected {MIN_CLASSES} to {MAX_CLASSES}, found {classes}")
    if output.resolve() == Path.cwd():
        raise DataError(f"--output: {output} is the current folder: name a new one")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise DataError(f"{output} is in use: name a folder that is new or empty")
    images = list(_plan(classes, images_per_class, seed))
    # What a link names is made and renamed, not the link.
    output = output.resolve()
    output.parent.mkdir(parents=True, exist_ok=True)
    # Written beside it and renamed, so that a folder of that name is always whole.
    with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as scratch:
        # Within, as the outer folder is closed to other users.
        whole = Path(scratch, output.name)
        whole.mkdir()
        _draw(images, whole, layout, image_size)
        whole.replace(output)
    return len(images)


def _draw(images: list[_Image], root: Path, layout: str, image_size: int) -> None:
    kinds = species(1 + max(image.label for image in images))
    for image in tqdm(images, "drawing", unit="image", disable=None):
        if layout == "cub":
            folder = root / "images" / image.folder
        else:
            folder = root / ("train" if image.train else "test") / image.folder
        folder.mkdir(parents=True, exist_ok=True)
        drawn = draw_bird(kinds[image.label], image.key, image_size)
        drawn.save(folder / image.file, quality=_QUALITY)
    if layout == "cub":
        _write_index(root, images)


def _plan(classes: int, images_per_class: int, seed: int) -> Iterator[_Image]:
    """The same birds as the embedded set of that seed, for the same number of images."""
    test = max(1, round(images_per_class * TEST_PER_CLASS / TRAIN_PER_CLASS))
    for label, kind in enumerate(species(classes)):
        number = 0
        for train, count in ((True, images_per_class), (False, test)):
            for index in range(label * count, (label + 1) * count):
                number += 1
                key = f"{seed}/{'train' if train else 'test'}/{index}"
                folder, file = f"{label + 1:03d}.{kind.name}", f"{kind.name}_{number:04d}.jpg"
                yield _Image(label, train, folder, file, key)


def _write_index(root: Path, images: list[_Image]) -> None:
    folders = {image.label: image.folder for image in images}
    tables: dict[str, list[tuple[int, int | str]]] = {
        cub.CLASSES: [(label + 1, folder) for label, folder in folders.items()],
        cub.IMAGES: [(i, f"{image.folder}/{image.file}") for i, image in enumerate(images, 1)],
        cub.LABELS: [(i, image.label + 1) for i, image in enumerate(images, 1)],
        cub.SPLIT: [(i, int(image.train)) for i, image in enumerate(images, 1)],
    }
    for name, rows in tables.items():
        (root / name).write_text("".join(f"{number} {value}\n" for number, value in rows))
