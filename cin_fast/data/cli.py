"""``cin-fast-data``: which datasets there are, getting, checking and drawing one."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

from cin_fast import command
from cin_fast.data.base import DataError
from cin_fast.data.catalog import ROOT_VARIABLE, SOURCES, Source, default_root, find
from cin_fast.data.download import check_md5, fetch, unpack
from cin_fast.data.synthesize import LAYOUTS, MIN_CLASSES, synthesize
from cin_fast.data.synthetic import CLASSES, MAX_CLASSES, TEST_PER_CLASS, TRAIN_PER_CLASS
from cin_fast.data.verify import verify

_Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
_PUBLISHED = [name for name, source in SOURCES.items() if source.folder]
_PROBLEMS_SHOWN = 20


def main(argv: Sequence[str] | None = None) -> int:
    """The command; prints errors as one line and returns 2 for them, 1 for a set that is wrong."""
    arguments = _parser().parse_args(argv)
    return command.run("cin-fast-data", lambda: int(arguments.run(arguments)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cin-fast-data", description="List, get, check and make the datasets to train on."
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_list(commands)
    _add_download(commands)
    _add_verify(commands)
    _add_synthesize(commands)
    return parser


def _add_root(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument(
        "--data-root",
        type=command.path,
        metavar="DIR",
        help=f"{what} (default: ${ROOT_VARIABLE}, then ./data)",
    )


def _add_list(commands: _Commands) -> None:
    parser = commands.add_parser(
        "list",
        help="name every dataset, its size, and where it was found",
        description="Name every dataset, its size, and where it was found.",
    )
    _add_root(parser, "where to look")
    parser.set_defaults(run=_list)


def _list(arguments: argparse.Namespace) -> int:
    for name, source in SOURCES.items():
        try:
            place = f"in {find(name, arguments.data_root)}"
        except DataError:
            place = "not found"
        print(f"{name:10} {source.title}: {_size(source)}{place}")
    train, test = CLASSES * TRAIN_PER_CLASS, CLASSES * TEST_PER_CLASS
    print(f"synthetic  drawn birds: {CLASSES} classes, {train:,} + {test:,} images, built in")
    return 0


def _size(source: Source) -> str:
    official = source.official
    if official is None:
        return ""
    return f"{official.classes} classes, {official.train:,} + {official.test:,} images, "


def _add_download(commands: _Commands) -> None:
    parser = commands.add_parser(
        "download",
        help="get a published dataset",
        description="Download a published dataset, check its checksum and unpack it. A transfer "
        "that broke off is gone on with. What has to be got by hand comes with instructions.",
        epilog="example: cin-fast-data download cub --data-root data",
    )
    parser.add_argument("name", choices=_PUBLISHED, help="the dataset")
    _add_root(parser, "where to put it")
    parser.add_argument("--url", metavar="URL", help="a mirror; the checksum stays the same")
    parser.add_argument(
        "--archive",
        type=command.path,
        metavar="FILE",
        help="unpack this copy of it instead",
    )
    parser.add_argument(
        "--keep-archive", action="store_true", help="do not remove the archive after unpacking"
    )
    parser.set_defaults(run=_download)


def _download(arguments: argparse.Namespace) -> int:
    source = SOURCES[arguments.name]
    root = (arguments.data_root or default_root()).expanduser()
    final = root / source.folder
    if source.archive is None:
        print(source.manual.format(folder=final, root=root))
        return 2
    if final.exists():
        print(f"{final} is there already: cin-fast-data verify {arguments.name} checks it")
        return 0
    _make_root(root)
    archive: Path = arguments.archive or root / Path(source.archive.url).name
    if arguments.archive:
        check_md5(archive, source.archive.md5)
    else:
        print(f"{source.title}: {source.archive.gigabytes} GB to download, twice that on disk")
        fetch(arguments.url or source.archive.url, archive, source.archive.md5)
    unpack(archive, source.folder, root)
    if not (arguments.keep_archive or arguments.archive):
        archive.unlink()
    print(f"{final} is there: cin-fast-train --dataset {arguments.name} --data-root {root}")
    return 0


def _make_root(root: Path) -> None:
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"--data-root: {root} cannot be written ({error.strerror})") from error


def _add_verify(commands: _Commands) -> None:
    parser = commands.add_parser(
        "verify",
        help="check a dataset's counts and splits, and that every image decodes and is its own",
        description="Check a dataset's counts and splits, that every image decodes, and that none "
        "is in both splits or two classes, byte for byte. Returns 1 if anything is wrong.",
    )
    parser.add_argument("name", choices=list(SOURCES), help="the dataset, or its layout")
    _add_root(parser, "where it lies")
    parser.set_defaults(run=_verify)


def _verify(arguments: argparse.Namespace) -> int:
    report = verify(arguments.name, arguments.data_root)
    print("\n".join(report.summary))
    if not report.problems:
        print("all good")
        return 0
    more = len(report.problems) - _PROBLEMS_SHOWN
    print(f"{len(report.problems)} problem{'s' * (len(report.problems) > 1)}:")
    print("\n".join(f"  {problem}" for problem in report.problems[:_PROBLEMS_SHOWN]))
    if more > 0:
        print(f"  and {more} more")
    return 1


def _add_synthesize(commands: _Commands) -> None:
    parser = commands.add_parser(
        "synthesize",
        help="draw the built-in birds into a folder laid out like CUB-200-2011",
        description="Draw cartoon birds whose classes differ in a few small parts, in the layout "
        "of a real dataset; cin-fast-train reads them with --dataset LAYOUT --data-root DIR.",
        epilog="example: cin-fast-data synthesize --output birds && "
        "cin-fast-train --dataset cub --data-root birds",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--output", type=command.path, required=True, metavar="DIR", default=argparse.SUPPRESS,
        help="a new folder",
    )  # fmt: skip
    parser.add_argument("--layout", choices=LAYOUTS, default="cub", help="how it is laid out")
    parser.add_argument(
        "--classes", type=int, default=CLASSES, metavar="N",
        help=f"{MIN_CLASSES} to {MAX_CLASSES}",
    )  # fmt: skip
    parser.add_argument(
        "--images-per-class", type=int, default=TRAIN_PER_CLASS, metavar="N",
        help="training images of each class; test images come on top, 25 for 60",
    )  # fmt: skip
    parser.add_argument(
        "--image-size", type=int, default=256, metavar="N", help="side of the images in pixels"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="other drawings")
    parser.set_defaults(run=_synthesize)


def _synthesize(arguments: argparse.Namespace) -> int:
    command.writable_folder(arguments.output.resolve().parent)
    count = synthesize(
        arguments.output,
        layout=arguments.layout,
        classes=arguments.classes,
        images_per_class=arguments.images_per_class,
        image_size=arguments.image_size,
        seed=arguments.seed,
    )
    print(
        f"{count} images of {arguments.classes} classes are in {arguments.output}: "
        f"cin-fast-train --dataset {arguments.layout} --data-root {arguments.output}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
