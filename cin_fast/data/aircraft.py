"""FGVC-Aircraft's own layout, at the level of variants: trainval for training, test for test.

The same folder is what torchvision.datasets.FGVCAircraft reads, with the same labels; here a line
that is wrong is named, and the folder may have any name.
"""

from __future__ import annotations

from pathlib import Path

from cin_fast.data.base import DataError, Entry
from cin_fast.data.official import Official
from cin_fast.data.text import read_lines

OFFICIAL = Official("FGVC-Aircraft", classes=100, train=6667, test=3333)
# Aircraft families are coarser than variants, so this file says which level is read.
_VARIANTS = "variants.txt"


def read_aircraft(root: Path, *, train: bool) -> tuple[list[Entry], list[str]]:
    """The images of one split and the names of all variants, in the order of variants.txt.

    Raises:
        DataError: naming the file, the line where there is one, and the fix.
    """
    data = root / "data"
    classes = [line for _, line in read_lines(data / _VARIANTS)]
    labels = {name: label for label, name in enumerate(classes)}
    if len(labels) != len(classes):
        raise DataError(f"{data / _VARIANTS}: a variant stands there twice; unpack it again")
    index = data / f"images_variant_{'trainval' if train else 'test'}.txt"
    entries, seen = [], set()
    for number, line in read_lines(index):
        image, _, name = line.partition(" ")
        if name not in labels:
            raise DataError(f"{index}, line {number}: {name!r} is no variant of {_VARIANTS}")
        if image in seen or not image.isalnum():
            reason = "stands there twice" if image in seen else "is no image number"
            raise DataError(f"{index}, line {number}: {image} {reason}; unpack it again")
        seen.add(image)
        entries.append(Entry(data / "images" / f"{image}.jpg", labels[name]))
    if len(classes) == OFFICIAL.classes:
        OFFICIAL.check(index, len(entries), train=train)
    return entries, classes
