"""Lays the Grocery Store Dataset (Klasson et al., WACV 2019) out as CUB-200-2011 is on disk.

    git clone https://github.com/marcusklasson/GroceryStoreDataset
    python scripts/grocery.py GroceryStoreDataset grocery

``--dataset cub --data-root grocery`` then reads 5,421 photographs of 81 kinds, shrunk to a short
side of 176 pixels; the dataset's train and val images are for training.
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from tqdm import tqdm

SHORT_SIDE = 176
PARTS = ("train", "val", "test")


class Photograph(NamedTuple):
    """One of the dataset's, its class counted from 0; in the order in which CUB's lists go."""

    label: int
    part: int
    file: Path

    @property
    def name(self) -> str:
        """Its file's, which is its own within the class."""
        return f"{PARTS[self.part]}_{self.file.name}"


def read_photographs(dataset: Path) -> list[Photograph]:
    """All that train.txt, val.txt and test.txt list."""
    found = []
    for part, name in enumerate(PARTS):
        for line in (dataset / f"{name}.txt").read_text().splitlines():
            path, label, _ = line.split(", ")
            found.append(Photograph(int(label), part, dataset / path))
    return sorted(found)


def read_classes(dataset: Path) -> list[str]:
    """Names as CUB has them, 001.Golden-Delicious and on."""
    with open(dataset / "classes.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    names = {int(row["Class ID (int)"]): row["Class Name (str)"] for row in rows}
    return [f"{label + 1:03}.{names[label]}" for label in sorted(names)]


def shrink(source: Path, target: Path) -> None:
    """Writes the photograph with a short side of ``SHORT_SIDE`` pixels."""
    with Image.open(source) as photograph:
        factor = SHORT_SIDE / min(photograph.size)
        width, height = (round(factor * side) for side in photograph.size)
        small = photograph.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
    small.save(target, quality=77, progressive=True)


def lay_out(dataset: Path, root: Path) -> int:
    """Writes the photographs and CUB's four lists under ``root``; returns how many there are."""
    photographs, classes = read_photographs(dataset), read_classes(dataset)
    for name in classes:
        (root / "images" / name).mkdir(parents=True, exist_ok=True)
    for one in tqdm(photographs, unit="photograph", disable=None):
        shrink(one.file, root / "images" / classes[one.label] / one.name)
    write_list(root / "classes.txt", classes)
    write_list(root / "images.txt", [f"{classes[one.label]}/{one.name}" for one in photographs])
    write_list(root / "image_class_labels.txt", [str(one.label + 1) for one in photographs])
    training = [str(int(PARTS[one.part] != "test")) for one in photographs]
    write_list(root / "train_test_split.txt", training)
    return len(photographs)


def write_list(path: Path, values: list[str]) -> None:
    """A number from 1 and a value a line."""
    path.write_text("".join(f"{number} {value}\n" for number, value in enumerate(values, start=1)))


def main() -> int:
    """The command; 2 where the folder is no whole clone of the dataset."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("clone", type=Path, help="where the dataset's repository lies")
    parser.add_argument("output", type=Path, help="the folder to write")
    options = parser.parse_args()
    dataset = options.clone / "dataset"
    listed = dataset / "classes.csv"
    if not listed.is_file():
        print(f"scripts/grocery.py: no {listed}: is that a clone?", file=sys.stderr)
        return 2
    try:
        print(f"{options.output}: {lay_out(dataset, options.output)} photographs")
    except (OSError, ValueError) as error:
        print(f"scripts/grocery.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
