"""What a published dataset holds, so that a copy of it can be held to that."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cin_fast.data.base import DataError


@dataclass(frozen=True)
class Official:
    """The counts that a dataset's authors give."""

    title: str
    classes: int
    train: int
    test: int

    def check(self, file: Path, images: int, *, train: bool) -> None:
        """Hold one split to its count.

        Raises:
            DataError: naming ``file``, which lists the images.
        """
        expected = self.train if train else self.test
        if images != expected:
            raise DataError(
                f"{file}: {images} {'training' if train else 'test'} images, but {self.title} has "
                f"{expected}: unpack its archive again"
            )
