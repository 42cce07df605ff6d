"""``cin-fast-predict image...``: the most likely classes of each image, by name."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from cin_fast import command
from cin_fast.data.base import DataError, is_image_name, read_image, visible_files
from cin_fast.distributed import pick_device
from cin_fast.trained import Trained, load_trained

_NAME = "cin-fast-predict"


class PredictError(ValueError):
    """A model that says nothing, with the reason and the fix."""


def predict(trained: Trained, path: Path, count: int) -> list[tuple[str, float]]:
    """The ``count`` most likely classes of one image with their probabilities, likeliest first.

    Raises:
        DataError: naming the file, if it cannot be read.
        PredictError: if the logits are not finite.
    """
    pixels = trained.transform(read_image(path))[None].to(trained.device)
    with torch.inference_mode():
        logits = trained.model(pixels)[0].float()
    if not logits.isfinite().all():
        raise PredictError(
            f"its logits for {path} are not finite; take another checkpoint, or train again with a "
            "smaller --lr or with --clip-norm"
        )
    probabilities = logits.softmax(0)
    best = probabilities.topk(min(count, len(trained.classes)))
    return [
        (trained.classes[index], probability)
        for probability, index in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]


def image_files(paths: Sequence[Path]) -> list[Path]:
    """The paths, with each folder's image files in its place, sorted, those of folders within too.

    Raises:
        DataError: naming a folder that holds none.
    """
    files: list[Path] = []
    for path in paths:
        found = [path]
        if path.is_dir():
            found = [file for file in visible_files(path) if is_image_name(file)]
        if not found:
            raise DataError(f"{path} holds no image: name one that does (.jpg, .png, .webp, ...)")
        files += found
    return files


def main(argv: Sequence[str] | None = None) -> int:
    """The command; prints errors as one line and returns 2 for them, bad images among them."""
    options = _parser().parse_args(argv)

    def body() -> int:
        files = image_files(options.images)
        trained = load_trained(options.checkpoint, pick_device(options.device))
        found: dict[str, dict[str, float]] = {}
        code = 0
        # Text shows by itself how far it is.
        with tqdm(files, "predicting", unit="image", leave=False,
                  disable=None if options.json else True) as images:  # fmt: skip
            for path in images:
                try:
                    best = predict(trained, path, options.top)
                except DataError as error:
                    with tqdm.external_write_mode(sys.stderr):
                        code = command.fail(_NAME, str(error))
                    continue
                except PredictError as error:
                    raise PredictError(f"{options.checkpoint}: {error}") from error
                found[str(path)] = dict(best)
                if not options.json:
                    print(_text(path, best), flush=True)
        if options.json:
            print(json.dumps(found, indent=2))
        return code

    return command.run(_NAME, body)


def _text(path: Path, best: Sequence[tuple[str, float]]) -> str:
    return "\n".join([str(path), *(f"  {share:7.2%}  {name}" for name, share in best)])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=_NAME,
        description="Name the most likely classes of images.",
        epilog="example: cin-fast-predict --checkpoint runs/my_run a.jpg my_photographs",
    )
    parser.add_argument("images", nargs="+", type=command.path, metavar="IMAGE",
                        help="image files, or folders of them")  # fmt: skip
    command.add_checkpoint(parser)
    parser.add_argument(
        "--top", type=command.at_least(1), default=5, metavar="K", help="classes shown (default: 5)"
    )
    command.add_device(parser)
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    return parser


if __name__ == "__main__":
    sys.exit(main())
