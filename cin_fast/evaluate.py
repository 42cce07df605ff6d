"""``cin-fast-eval``: what a checkpoint gets right, by class, and what it takes for what."""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader
from tqdm import tqdm

from cin_fast import command
from cin_fast.data import DataError, ImageDataset, build_dataset, dataset_names
from cin_fast.distributed import pick_device
from cin_fast.files import replacing
from cin_fast.records import EVALUATION
from cin_fast.scores import Scores, score
from cin_fast.trained import Trained, load_trained


def report(scores: Scores, classes: Sequence[str]) -> dict[str, Any]:
    """Everything that ``--json`` writes."""
    return {
        "test_top1": scores.top1,
        "test_top5": scores.top5,
        "images": scores.images,
        "num_classes": len(classes),
        "ms_per_image": 1e3 * scores.seconds / max(scores.images, 1),
        "per_class": {
            name: None if accuracy != accuracy else accuracy
            for name, accuracy in zip(classes, scores.per_class.tolist(), strict=True)
        },
        "most_confused": [
            {"true": classes[true], "predicted": classes[predicted], "images": count}
            for true, predicted, count in scores.confused
        ],
    }


def write_confusion(scores: Scores, classes: Sequence[str], folder: Path) -> list[Path]:
    """The confusion matrix as confusion.csv and confusion.png."""
    from matplotlib.figure import Figure

    table, picture = folder / "confusion.csv", folder / "confusion.png"
    with replacing(table) as beside, open(beside, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["true \\ predicted", *classes])
        for name, row in zip(classes, scores.confusion.tolist(), strict=True):
            writer.writerow([name, *row])
    figure = Figure(figsize=(8, 7), layout="constrained")
    axis = figure.subplots()
    shares = scores.confusion / scores.confusion.sum(1, keepdim=True).clamp(min=1)
    image = axis.imshow(shares.numpy(), cmap="viridis", vmin=0, vmax=1)
    figure.colorbar(image, ax=axis, label="share of the true class")
    axis.set_xlabel("predicted")
    axis.set_ylabel("true")
    if len(classes) <= 30:
        # A dollar in a name is no formula.
        plain: dict[str, Any] = {"fontsize": 7, "parse_math": False}
        axis.set_xticks(range(len(classes)), classes, rotation=90, **plain)
        axis.set_yticks(range(len(classes)), classes, **plain)
    with replacing(picture) as beside, warnings.catch_warnings():
        # The font lacks most scripts; confusion.csv has the names.
        warnings.filterwarnings("ignore", r"Glyph .* missing from", UserWarning)
        figure.savefig(beside, dpi=120)
    return [table, picture]


def main(argv: Sequence[str] | None = None) -> int:
    """The command; prints errors as one line and returns 2 for them."""
    options = _parser().parse_args(argv)

    def body() -> int:
        device = pick_device(options.device)
        trained = load_trained(options.checkpoint, device)
        images = _test_images(trained, options)
        output = options.output or _beside(options.checkpoint)
        command.writable_folder(output)
        loader = DataLoader(images, batch_size=options.batch_size, num_workers=options.workers)
        scores = score(
            trained.model,
            tqdm(loader, "evaluating", unit="batch", leave=False, disable=None),
            len(trained.classes),
            device,
            contextlib.nullcontext(),
        )
        summary = report(scores, trained.classes)
        # First, as a disk that takes no file must not cost what the evaluation found.
        print(json.dumps(summary, indent=2) if options.json else _text(summary))
        files = write_confusion(scores, trained.classes, output)
        if not options.json:
            print(*files, sep="\n")
        return 0

    return command.run("cin-fast-eval", body)


def _beside(checkpoint: Path) -> Path:
    run = checkpoint if checkpoint.is_dir() else checkpoint.parent
    return run / EVALUATION


def _test_images(trained: Trained, options: argparse.Namespace) -> ImageDataset:
    root = options.data_root or (
        Path(trained.config.data_root) if trained.config.data_root else None
    )
    images = build_dataset(
        options.dataset or trained.config.dataset,
        root,
        train=False,
        image_size=trained.config.image_size,
        skip_bad_images=options.skip_bad_images or trained.config.skip_bad_images,
    )
    if images.skipped:
        skipped = "\n  ".join(images.skipped)
        print(f"skipped {len(images.skipped)} bad images:\n  {skipped}", file=sys.stderr)
    if images.classes != trained.classes:
        raise DataError(
            f"{options.checkpoint} knows {len(trained.classes)} classes, the dataset has "
            f"{len(images.classes)}, or the same under other names"
        )
    return images


def _text(summary: dict[str, Any]) -> str:
    worst = sorted((a, name) for name, a in summary["per_class"].items() if a is not None)[:5]
    accuracy = f"top-1 {summary['test_top1']:.2%}, top-5 {summary['test_top5']:.2%}"
    speed = f"{summary['ms_per_image']:.1f} ms an image with its loading"
    lines = [
        f"{accuracy} of {summary['images']} images, {speed}",
        "weakest classes:",
        *(f"  {share:7.2%}  {name}" for share, name in worst),
        "most confused:",
        *(
            f"  {row['images']:4} x {row['true']} taken for {row['predicted']}"
            for row in summary["most_confused"]
        ),
    ]
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cin-fast-eval",
        description="Accuracy of a trained model on its test set.",
        epilog="example: cin-fast-eval runs/my_run",
    )
    command.add_checkpoint(parser, positional=True)
    parser.add_argument("--dataset", choices=dataset_names(),
                        help="what to test on (default: the run's)")  # fmt: skip
    parser.add_argument("--data-root", type=command.path, metavar="DIR",
                        help="folder of the dataset (default: the run's)")  # fmt: skip
    parser.add_argument("--output", type=command.path, metavar="DIR",
                        help="folder of the confusion matrix (default: evaluation/ in the run's "
                        "folder)")  # fmt: skip
    parser.add_argument("--batch-size", type=command.at_least(1), default=32, metavar="N",
                        help="images at once (default: 32)")  # fmt: skip
    parser.add_argument("--workers", type=command.at_least(0), default=2, metavar="N",
                        help="processes that load images (default: 2)")  # fmt: skip
    parser.add_argument("--skip-bad-images", action="store_true",
                        help="leave out images that cannot be read, and list them")  # fmt: skip
    command.add_device(parser)
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    return parser


if __name__ == "__main__":
    sys.exit(main())
