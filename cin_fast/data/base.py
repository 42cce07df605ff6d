"""What every dataset is to the rest: images with labels, names and classes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

# Reading waits for the disk, and Pillow decodes outside the interpreter's lock.
_READERS = 8
_FIX = "replace it, or leave such files out with --skip-bad-images"
# What Pillow opens by itself, less what holds no photographs (icons, textures, films, documents).
IMAGE_SUFFIXES = frozenset(
    {
        ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".gif", ".webp", ".avif",
        ".avifs", ".tif", ".tiff", ".bmp", ".dib", ".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx",
        ".ppm", ".pgm", ".pbm", ".pnm", ".pfm", ".tga", ".pcx", ".psd", ".qoi", ".sgi",
    }
)  # fmt: skip
_Found = TypeVar("_Found")


class DataError(ValueError):
    """Something is wrong with a dataset; names the file and the fix."""


@dataclass(frozen=True)
class Entry:
    """One image on disk and its class, from 0."""

    path: Path
    label: int


@dataclass(frozen=True)
class BadImage:
    """An image that cannot be used, and why."""

    path: Path
    reason: str


class ImageDataset(Dataset[tuple[Tensor, int]]):
    """Images on disk.

    Args:
        entries: the images. Every file has to exist and to begin as an image does; what lies
            behind its header is found out when it is decoded.
        classes: names, by label.
        transform: from a PIL image to what the network sees.
        skip_bad_images: decode every image now and leave out those that cannot be read;
            ``skipped`` names them.

    Raises:
        DataError: naming the file and the fix; also from indexing.
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
        bad = bad_images([entry.path for entry in entries], whole=skip_bad_images)
        if bad and not skip_bad_images:
            raise DataError(f"{explain(bad[0])} ({len(bad)} of {len(entries)} images are bad)")
        bad_paths = {image.path for image in bad}
        self.skipped: tuple[str, ...] = tuple(str(image.path) for image in bad)
        self.entries = tuple(entry for entry in entries if entry.path not in bad_paths)
        self.labels = tuple(entry.label for entry in self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def name(self, index: int) -> str:
        """The file of an image."""
        return str(self.entries[index].path)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        entry = self.entries[index]
        try:
            return self.transform(read_image(entry.path)), entry.label
        except DataError as error:
            raise DataError(f"{error}; {_FIX}") from error


def read_image(path: Path) -> Image.Image:
    """Decode an image to RGB, turned as its camera says.

    Raises:
        DataError: naming the file, if it cannot be read whole.
    """
    try:
        with Image.open(path) as image:
            ImageOps.exif_transpose(image, in_place=True)
            return _eight_bits(image).convert("RGB")
    # Broken files make Pillow's decoders raise whatever they stumble over.
    except Exception as error:
        raise DataError(f"{path} {_reason(path, error)}") from error


def is_image_name(path: Path) -> bool:
    """Whether a file is called as an image is."""
    return path.suffix.lower() in IMAGE_SUFFIXES


def visible_files(folder: Path) -> list[Path]:
    """Every file below a folder, sorted; what begins with a dot is left out."""
    found = (path for path in folder.rglob("*") if not _hidden(path.relative_to(folder)))
    return sorted(path for path in found if path.is_file())


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Pillow clips 16-bit and fractional grey where it should scale."""
    if image.mode == "F":
        grey = np.asarray(image, dtype=np.float64)
        top = grey.max(where=np.isfinite(grey), initial=0)
        # White is 1, 255 or 65535, and nothing in a file says which; scaling may overshoot it.
        white = 1 if top <= 2 else 255 if top <= 2 * 255 else 65535
        grey = np.nan_to_num(grey * (255 / white), posinf=255, neginf=0)
    elif image.mode.startswith("I"):
        grey = np.asarray(image, dtype=np.float64) / 257
    else:
        return image
    return Image.fromarray(grey.round().clip(0, 255).astype(np.uint8))


def bad_images(paths: Sequence[Path], *, whole: bool) -> list[BadImage]:
    """The files that are missing or no images: by their headers, or by decoding them whole."""
    return [image for image in each_image(check_whole if whole else _check_header, paths) if image]


def each_image(look: Callable[[Path], _Found], paths: Sequence[Path]) -> list[_Found]:
    """What ``look`` finds in each file, several at a time."""
    with ThreadPoolExecutor(_READERS) as pool:
        return list(
            tqdm(
                pool.map(look, paths), "checking images", len(paths), unit="image",
                leave=False, delay=1, disable=None,
            )
        )  # fmt: skip


def explain(bad: BadImage) -> str:
    """One line that names the file and the fix."""
    return f"{bad.path} {bad.reason}; {_FIX}"


def _check_header(path: Path) -> BadImage | None:
    try:
        with Image.open(path):
            return None
    except Exception as error:
        return BadImage(path, _reason(path, error))


def check_whole(path: Path) -> BadImage | None:
    """What is wrong with an image, by decoding it."""
    try:
        with Image.open(path) as image:
            image.load()
            return None
    except Exception as error:
        return BadImage(path, _reason(path, error))


def _reason(path: Path, error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "is missing"
    if isinstance(error, PermissionError):
        return "may not be read (permission denied)"
    if isinstance(error, IsADirectoryError):
        return "is a folder"
    if path.is_file() and path.stat().st_size == 0:
        return "is empty"
    # Pillow repeats the path there.
    text = "its format is unknown" if "identify" in str(error) else str(error)
    return f"cannot be read as an image ({text or type(error).__name__})"
