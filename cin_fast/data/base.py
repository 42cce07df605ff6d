"""What every dataset is to the rest: images with labels, names and classes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm


class DataError(ValueError):
    """Something is wrong with a dataset; names the file and the fix."""


@dataclass(frozen=True)
class Entry:
    """One image on disk and its class, from 0."""

    path: Path
    label: int


class ImageDataset(Dataset[tuple[Tensor, int]]):
    """Images on disk.

    Args:
        entries: the images, at least one of every class for training sets.
        classes: names, by label.
        transform: from a PIL image to what the network sees.
        skip_bad_images: decode every image now, and leave out those that cannot be read.

    Raises:
        DataError: naming the file and the fix.
    """

    def __init__(
        self,
        entries: Sequence[Entry],
        classes: Sequence[str],
        transform: Callable[[Image.Image], Tensor],
        *,
        skip_bad_images: bool = False,
    ) -> None:
        self.classes = tuple(classes)
        self.transform = transform
        kept, skipped = list(entries), []
        if skip_bad_images:
            kept, skipped = _readable(entries)
        self.entries = tuple(kept)
        self.skipped: tuple[str, ...] = tuple(skipped)
        self.labels = tuple(entry.label for entry in kept)

    def __len__(self) -> int:
        return len(self.entries)

    def name(self, index: int) -> str:
        """The file of an image."""
        return str(self.entries[index].path)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        entry = self.entries[index]
        return self.transform(read_image(entry.path)), entry.label


def read_image(path: Path) -> Image.Image:
    """Decode an image to RGB.

    Raises:
        DataError: naming the file, if it cannot be read whole.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(
            f"{path} cannot be read as an image ({error}); replace it, or leave such files out "
            "(--skip-bad-images)"
        ) from error


def _readable(entries: Sequence[Entry]) -> tuple[list[Entry], list[str]]:
    kept, skipped = [], []
    for entry in tqdm(entries, "checking images", unit="image", leave=False):
        try:
            read_image(entry.path)
            kept.append(entry)
        except DataError:
            skipped.append(str(entry.path))
    return kept, skipped
