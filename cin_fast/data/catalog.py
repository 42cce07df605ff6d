"""Every dataset on disk that has a name: how it is read, where it lies, how to get it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cin_fast.data import aircraft, cars, cub
from cin_fast.data.base import DataError, Entry
from cin_fast.data.folder import left_out, read_folder
from cin_fast.data.official import Official

ROOT_VARIABLE = "CIN_FAST_DATA"


@dataclass(frozen=True)
class Archive:
    """Where a dataset is published."""

    url: str
    md5: str
    gigabytes: float


@dataclass(frozen=True)
class Source:
    """A dataset by name.

    Args:
        title: what people call it.
        read: ``read(root, train=...)`` gives the entries of a split and the names of all classes.
        marks: a folder that holds one of these is meant to be this set.
        how_to_get: ends the sentence "no such data here:".
        folder: what its archive unpacks to; empty if there is no such name.
        official: what the published set holds.
        archive: where it can be downloaded from.
        manual: how to get it by hand, where it cannot be downloaded.
        others_allowed: whether sets with other classes are meant, too.
        left_out: ``left_out(root)`` says in a line which files are not read; empty if all are.
    """

    title: str
    read: Callable[..., tuple[list[Entry], list[str]]]
    marks: tuple[str, ...]
    how_to_get: str
    folder: str = ""
    official: Official | None = None
    archive: Archive | None = None
    manual: str = ""
    others_allowed: bool = False
    # What has an index reads all that it lists.
    left_out: Callable[[Path], str] = lambda root: ""


_CARS_BY_HAND = """\
Stanford Cars left its home page, so its parts have to be collected by hand:
  1. images: https://www.kaggle.com/datasets/jessicali9530/stanford-cars-dataset
  2. devkit: car_devkit.tgz (md5 c3b158d763b6e2245038c8ad08e45376) and
     cars_test_annos_withlabels.mat (md5 b0a2b23655a3edd16d84508592a98d10), as described in
     https://github.com/pytorch/vision/issues/7545#issuecomment-1631441616
  3. put them into {folder}:
       cars_train/00001.jpg ...            8,144 images
       cars_test/00001.jpg ...             8,041 images
       devkit/cars_meta.mat
       devkit/cars_train_annos.mat
       cars_test_annos_withlabels.mat
  4. check them: cin-fast-data verify cars --data-root {root}"""

SOURCES: dict[str, Source] = {
    "cub": Source(
        title="CUB-200-2011 (birds), or any set in its layout",
        read=cub.read_cub,
        marks=cub.INDEX_FILES,
        how_to_get="`cin-fast-data download cub` gets it; or get CUB_200_2011.tgz from CaltechDATA "
        "(DOI 10.22002/D1.20098), unpack it, and name its folder with --data-root",
        folder="CUB_200_2011",
        official=cub.OFFICIAL,
        archive=Archive(
            "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz",
            "97eceeb196236b17998738112f37df78",
            1.2,
        ),
        others_allowed=True,
    ),
    "cars": Source(
        title="Stanford Cars",
        read=cars.read_cars,
        marks=("devkit", "cars_train", "cars_test"),
        how_to_get="`cin-fast-data download cars` says how to get it; then name its folder with "
        "--data-root",
        folder="stanford_cars",
        official=cars.OFFICIAL,
        manual=_CARS_BY_HAND,
    ),
    "aircraft": Source(
        title="FGVC-Aircraft, variants",
        read=aircraft.read_aircraft,
        marks=("data/variants.txt", "data/images_variant_trainval.txt"),
        how_to_get="`cin-fast-data download aircraft` gets it; or get fgvc-aircraft-2013b.tar.gz "
        "from its home page, unpack it, and name its folder with --data-root",
        folder="fgvc-aircraft-2013b",
        official=aircraft.OFFICIAL,
        archive=Archive(
            "https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/archives/"
            "fgvc-aircraft-2013b.tar.gz",
            "d4acdd33327262359767eeaa97a4f732",
            2.8,
        ),
    ),
    "folder": Source(
        title="your own images, a folder per class",
        read=read_folder,
        marks=("train", "test"),
        how_to_get="name a folder with --data-root that holds train/ and test/, each with a folder "
        "of images per class",
        others_allowed=True,
        left_out=left_out,
    ),
}


def default_root() -> Path:
    """Where datasets lie unless told otherwise: $CIN_FAST_DATA, then ./data."""
    return Path(os.environ.get(ROOT_VARIABLE) or "data")


def find(name: str, root: Path | None) -> Path:
    """The folder of a dataset: ``root`` itself or its usual folder within.

    Raises:
        DataError: saying where it looked and how to get the set.
    """
    source = SOURCES[name]
    top = (root or default_root()).expanduser()
    places = [top / source.folder, top] if source.folder else [top]
    for place in places:
        if any((place / mark).exists() for mark in source.marks):
            return place
    looked = " and ".join(str(place) for place in places)
    missing = "" if top.exists() else f" ({top} does not exist)"
    raise DataError(f"no {name} data in {looked}{missing}: {source.how_to_get}")
