"""``cin-fast-eval``, and the counting behind it: every image once, however many processes share it.

The loop of :mod:`cin_fast.train` uses :func:`score` alone.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from cin_fast import command
from cin_fast.data import DataError, ImageDataset, build_dataset, dataset_names
from cin_fast.distributed import World, pick_device
from cin_fast.files import replacing
from cin_fast.trained import Trained, load_trained


@dataclass(frozen=True)
class Scores:
    """What a dataset gave: rows of the confusion matrix are true classes, columns predicted.

    ``top5`` is the share of images whose class is among the best five, 0 to 1.
    """

    confusion: Tensor
    top5: float
    images: int
    seconds: float

    @property
    def top1(self) -> float:
        """Share of images whose best class is right, 0 to 1."""
        return int(self.confusion.diagonal().sum()) / max(self.images, 1)

    @property
    def confused(self) -> list[tuple[int, int, int]]:
        """(true class, predicted class, images) of the mistakes made, most frequent first."""
        wrong = self.confusion.clone().fill_diagonal_(0)
        order = wrong.flatten().argsort(descending=True, stable=True)
        size = len(wrong)
        cells = [(int(i) // size, int(i) % size, int(wrong.flatten()[i])) for i in order[:10]]
        return [cell for cell in cells if cell[2] > 0]

    @property
    def per_class(self) -> Tensor:
        """Accuracy of each class, NaN where the dataset has no image of it."""
        return self.confusion.diagonal() / self.confusion.sum(1)


@torch.inference_mode()
def score(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    num_classes: int,
    device: torch.device,
    autocast: AbstractContextManager[object],
) -> Scores:
    """Run ``model`` in evaluation mode over this process's batches; counts span all processes."""
    # Here, as its import takes a second that a command with a wrong argument need not wait for.
    from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

    was_training = model.training
    model.eval()
    # Their sums are over all processes.
    confusion = MulticlassConfusionMatrix(num_classes).to(device)
    top5 = MulticlassAccuracy(num_classes, top_k=min(5, num_classes), average="micro").to(device)
    start = time.perf_counter()
    for images, labels in batches:
        labels = labels.to(device, non_blocking=True)
        with autocast:
            logits = model(images.to(device, non_blocking=True)).float()
        confusion.update(logits, labels)
        top5.update(logits, labels)
    counts = confusion.compute().cpu()
    share = float(top5.compute())
    seconds = time.perf_counter() - start
    model.train(was_training)
    return Scores(counts, share, int(counts.sum()), seconds)


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
        axis.set_xticks(range(len(classes)), classes, rotation=90, fontsize=7)
        axis.set_yticks(range(len(classes)), classes, fontsize=7)
    with replacing(picture) as beside:
        figure.savefig(beside, dpi=120)
    return [table, picture]


def main(argv: Sequence[str] | None = None) -> int:
    """The command; prints errors as one line and returns 2 for them."""
    options = _parser().parse_args(argv)

    def body() -> int:
        device = pick_device(options.device, World(0, 1, 0))
        trained = load_trained(options.checkpoint, device)
        images = _test_images(trained, options)
        command.writable_folder(options.output)
        loader = DataLoader(images, batch_size=options.batch_size, num_workers=options.workers)
        scores = score(
            trained.model,
            tqdm(loader, "evaluating", unit="batch", leave=False),
            len(trained.classes),
            device,
            contextlib.nullcontext(),
        )
        summary = report(scores, trained.classes)
        # First, as a disk that takes no file must not cost what the evaluation found.
        print(json.dumps(summary, indent=2) if options.json else _text(summary))
        files = write_confusion(scores, trained.classes, options.output)
        if not options.json:
            print(*files, sep="\n")
        return 0

    return command.run("cin-fast-eval", body)


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
        epilog="example: cin-fast-eval runs/my_run --output runs/my_run/evaluation",
    )
    command.add_checkpoint(parser, positional=True)
    parser.add_argument("--dataset", choices=dataset_names(),
                        help="what to test on (default: the run's)")  # fmt: skip
    parser.add_argument("--data-root", type=Path, metavar="DIR",
                        help="folder of the dataset (default: the run's)")  # fmt: skip
    parser.add_argument("--output", type=Path, default=Path("evaluation"), metavar="DIR",
                        help="folder of the confusion matrix (default: evaluation)")  # fmt: skip
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
