"""Data loading: images a second from files to the batch that a training step takes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from cases import QUICK
from compare import Entry, Work
from torch.utils.data import DataLoader

from cin_fast.data import ImageDataset, build_dataset
from cin_fast.data.synthesize import synthesize

_IMAGES = 40 if QUICK else 200
# Kept until the process ends.
_FOLDER = TemporaryDirectory(prefix="cin-fast-bench-")


@dataclass(frozen=True)
class LoadingCase:
    """The side of the crops."""

    size: int
    backward = False

    @property
    def group(self) -> str:
        """The heading that the loaders share."""
        return f"{_IMAGES} training images at {self.size} px"

    def __str__(self) -> str:
        return f"{self.size}px"


CASES = [LoadingCase(64)] if QUICK else [LoadingCase(128), LoadingCase(448)]
RIVALS = {"in the main process": 0, "1 worker": 1, "2 workers": 2}


@cache
def photographs(size: int) -> ImageDataset:
    """JPEG files drawn by the project, in CUB's layout."""
    root = Path(_FOLDER.name) / "birds"
    if not root.exists():
        synthesize(root, classes=2, images_per_class=_IMAGES // 2, image_size=224, seed=0)
    return build_dataset("cub", root, train=True, image_size=size)


def prepare(case: LoadingCase, name: str) -> Entry:
    """A loader; every image is decoded, cropped, flipped and normalised."""
    images, workers = photographs(case.size), RIVALS[name]

    def load() -> int:
        return sum(len(batch[1]) for batch in DataLoader(images, 20, num_workers=workers))

    def check() -> None:
        assert load() == len(images) == _IMAGES

    return Entry(load, check)


@pytest.mark.parametrize("rival", RIVALS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_loading(case: LoadingCase, rival: str, versus) -> None:
    """Bytes: the float32 batches that come out."""
    versus(rival, partial(prepare, case), Work(0.0, 4.0 * _IMAGES * 3 * case.size**2))
