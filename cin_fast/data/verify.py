"""Checks a whole dataset: its counts, its splits, and that every image decodes and is its own."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cin_fast.data.base import BadImage, DataError, Entry, check_whole, each_image
from cin_fast.data.catalog import SOURCES, find

_SPLITS = {True: "training", False: "test"}


@dataclass(frozen=True)
class Report:
    """What was found: a summary to print, and what is wrong."""

    summary: tuple[str, ...]
    problems: tuple[str, ...]


def verify(name: str, root: Path | None) -> Report:
    """Read both splits of a dataset, decode every image, and look for one that is there twice.

    Raises:
        DataError: if there is no such dataset to check.
    """
    folder = find(name, root)
    summary, problems = [f"{name} in {folder}"], []
    splits: dict[bool, list[Entry]] = {}
    classes: list[str] = []
    for train in _SPLITS:
        try:
            splits[train], classes = SOURCES[name].read(folder, train=train)
        except DataError as error:
            problems.append(str(error))
    if classes:
        summary.append(f"classes   {len(classes):6,}")
        problems += _check_classes(name, classes, folder)
    for train, entries in splits.items():
        line, found = _check_split(entries, classes, folder, train)
        summary.append(line)
        problems += found
    if len(splits) == len(_SPLITS) and (unread := SOURCES[name].left_out(folder)):
        summary.append(f"left out  {unread}")
    paths = list(dict.fromkeys(e.path for entries in splits.values() for e in entries))
    looked = dict(zip(paths, each_image(_look, paths), strict=True))
    bad = [found for found in looked.values() if isinstance(found, BadImage)]
    summary.append(f"decoded   {len(paths) - len(bad):6,} of {len(paths):,}")
    problems += [f"{image.path} {image.reason}" for image in bad]
    problems += _check_copies(splits, classes, looked)
    return Report(tuple(summary), tuple(dict.fromkeys(problems)))


def _look(path: Path) -> BadImage | bytes:
    """What is wrong with an image, else the hash of its file, which decoding has just read."""
    bad = check_whole(path)
    try:
        return bad or hashlib.sha256(path.read_bytes()).digest()
    except OSError as error:
        return BadImage(path, f"cannot be read again ({error.strerror})")


def _check_copies(
    splits: Mapping[bool, Sequence[Entry]],
    classes: Sequence[str],
    looked: Mapping[Path, BadImage | bytes],
) -> list[str]:
    """Where one image is in both splits or has two classes; a copy beside it does no harm."""
    same: defaultdict[bytes, list[tuple[bool, Entry]]] = defaultdict(list)
    for train, entries in splits.items():
        for entry in entries:
            found = looked[entry.path]
            if isinstance(found, bytes):
                same[found].append((train, entry))
    problems = []
    for (train, first), *others in same.values():
        for other_train, other in others:
            wrong = ["is in both splits"] * (train != other_train)
            if first.label != other.label:
                wrong.append(f"has two classes, {classes[first.label]} and {classes[other.label]}")
            if wrong:
                problems.append(f"{_copies(first.path, other.path)} {' and '.join(wrong)}")
    return problems


def _copies(one: Path, other: Path) -> str:
    return str(one) if one == other else f"{one} and {other} are one image, which"


def _check_classes(name: str, classes: list[str], folder: Path) -> list[str]:
    if len(classes) == 1:
        return [f"{folder} has a single class, {classes[0]}: training takes at least two"]
    source = SOURCES[name]
    if source.official is None or source.others_allowed:
        return []
    if len(classes) == source.official.classes:
        return []
    expected = f"{source.official.title} has {source.official.classes}"
    return [f"{folder} has {len(classes)} classes, but {expected}: it is no whole copy"]


def _check_split(
    entries: list[Entry], classes: list[str], folder: Path, train: bool
) -> tuple[str, list[str]]:
    counts = Counter(entry.label for entry in entries)
    each = [counts[label] for label in range(len(classes))]
    line = f"{_SPLITS[train]:9} {len(entries):6,} images, {min(each)} to {max(each)} a class"
    empty = [name for name, count in zip(classes, each, strict=True) if not count]
    return line, [f"{folder}: class {name} has no {_SPLITS[train]} image" for name in empty]
