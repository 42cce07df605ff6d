"""Checks a whole dataset: its counts, its splits, and that every image decodes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from cin_fast.data.base import DataError, Entry, bad_images
from cin_fast.data.catalog import SOURCES, find

_SPLITS = {True: "training", False: "test"}


@dataclass(frozen=True)
class Report:
    """What was found: a summary to print, and what is wrong."""

    summary: tuple[str, ...]
    problems: tuple[str, ...]


def verify(name: str, root: Path | None) -> Report:
    """Read both splits of a dataset and decode every image.

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
    shared = {e.path for e in splits.get(True, [])} & {e.path for e in splits.get(False, [])}
    problems += [f"{path} is in both splits" for path in sorted(shared)]
    paths = list(dict.fromkeys(e.path for entries in splits.values() for e in entries))
    bad = bad_images(paths, whole=True)
    summary.append(f"decoded   {len(paths) - len(bad):6,} of {len(paths):,}")
    problems += [f"{image.path} {image.reason}" for image in bad]
    return Report(tuple(summary), tuple(dict.fromkeys(problems)))


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
