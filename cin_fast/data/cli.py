"""``cin-fast-data``: what there is of datasets, and drawing one."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from cin_fast.data.base import DataError
from cin_fast.data.synthesize import LAYOUTS, synthesize
from cin_fast.data.synthetic import CLASSES, MAX_CLASSES, TRAIN_PER_CLASS


def main(argv: Sequence[str] | None = None) -> int:
    """The command; prints errors as one line and returns 2 for them."""
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except DataError as error:
        print(f"cin-fast-data: error: {error}", file=sys.stderr)
    except OSError as error:
        message = f"{error.strerror or error} {error.filename or ''}".strip()
        print(f"cin-fast-data: error: {message}", file=sys.stderr)
    except KeyboardInterrupt:
        print("cin-fast-data: stopped", file=sys.stderr)
        return 130
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cin-fast-data", description="Get, check and make the datasets of cin-fast-train."
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_synthesize(commands)
    return parser


def _add_synthesize(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "synthesize",
        help="draw the built-in birds into a folder laid out like CUB-200-2011",
        description="Draw cartoon birds whose classes differ in a few small parts, in the layout "
        "of a real dataset; cin-fast-train reads them with --dataset LAYOUT --data-root DIR.",
        epilog="example: cin-fast-data synthesize --output birds && "
        "cin-fast-train --dataset cub --data-root birds",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    command.add_argument("--output", type=Path, required=True, metavar="DIR", help="a new folder")
    command.add_argument("--layout", choices=LAYOUTS, default="cub", help="how it is laid out")
    command.add_argument(
        "--classes", type=int, default=CLASSES, metavar="N", help=f"1 to {MAX_CLASSES}"
    )
    command.add_argument(
        "--images-per-class", type=int, default=TRAIN_PER_CLASS, metavar="N",
        help="training images of each class; test images come on top, 25 for 60",
    )  # fmt: skip
    command.add_argument(
        "--image-size", type=int, default=256, metavar="N", help="side of the images in pixels"
    )
    command.add_argument("--seed", type=int, default=0, metavar="N", help="other drawings")
    command.set_defaults(run=_synthesize)


def _synthesize(arguments: argparse.Namespace) -> int:
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
