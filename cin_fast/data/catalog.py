"""Every dataset on disk that has a name: how it is read, where it lies, how to get it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cin_fast.data import cub
from cin_fast.data.base import DataError, Entry
from cin_fast.data.folder import read_folder

ROOT_VARIABLE = "CIN_FAST_DATA"


@dataclass(frozen=True)
class Source:
    """A dataset by name.

    Args:
        title: what people call it.
        read: ``read(root, train=...)`` gives the entries of a split and the names of all classes.
        folder: what its archive unpacks to; empty if there is no such name.
        marks: a folder that holds one of these is meant to be this set.
        how_to_get: ends the sentence "no such data here:".
    """

    title: str
    read: Callable[..., tuple[list[Entry], list[str]]]
    folder: str
    marks: tuple[str, ...]
    how_to_get: str


SOURCES: dict[str, Source] = {
    "cub": Source(
        "CUB-200-2011 (Caltech-UCSD Birds), or any set in its layout",
        cub.read_cub,
        "CUB_200_2011",
        cub.INDEX_FILES,
        "get CUB_200_2011.tgz from CaltechDATA (DOI 10.22002/D1.20098) and unpack it there, or "
        "name its folder with --data-root",
    ),
    "folder": Source(
        "your own images",
        read_folder,
        "",
        ("train", "test"),
        "name a folder with --data-root that holds train/ and test/, each with a folder of images "
        "per class",
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
