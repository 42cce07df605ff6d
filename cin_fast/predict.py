"""``cin-fast-predict image...``: the most likely classes of each image, by name."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from cin_fast import command
from cin_fast.data.base import read_image
from cin_fast.distributed import pick_device
from cin_fast.trained import Trained, load_trained


def predict(trained: Trained, path: Path, count: int) -> list[tuple[str, float]]:
    """The ``count`` most likely classes of one image with their probabilities, likeliest first.

    Raises:
        DataError: naming the file, if it cannot be read.
    """
    pixels = trained.transform(read_image(path))[None].to(trained.device)
    with torch.inference_mode():
        probabilities = trained.model(pixels)[0].float().softmax(0)
    best = probabilities.topk(min(count, len(trained.classes)))
    return [
        (trained.classes[index], probability)
        for probability, index in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """The command; prints errors as one line and returns 2 for them."""
    options = _parser().parse_args(argv)

    def body() -> int:
        trained = load_trained(options.checkpoint, pick_device(options.device))
        found = {str(path): predict(trained, path, options.top) for path in options.images}
        if options.json:
            print(json.dumps({path: dict(best) for path, best in found.items()}, indent=2))
            return 0
        for path, best in found.items():
            print(path)
            for name, probability in best:
                print(f"  {probability:7.2%}  {name}")
        return 0

    return command.run("cin-fast-predict", body)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cin-fast-predict",
        description="Name the most likely classes of images.",
        epilog="example: cin-fast-predict --checkpoint runs/my_run a.jpg b.jpg",
    )
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="image files")
    command.add_checkpoint(parser)
    parser.add_argument(
        "--top", type=command.at_least(1), default=5, metavar="K", help="classes shown (default: 5)"
    )
    command.add_device(parser)
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    return parser


if __name__ == "__main__":
    sys.exit(main())
