"""How well a model classifies: every image once, however many processes share them."""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cin_fast.command import uninterrupted


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
    """Run ``model`` in evaluation mode over this process's batches; counts span all processes.

    Raises:
        ValueError: if the model gives numbers that are not finite.
    """
    # Here, as its import takes a second that a command with a wrong argument need not wait for. Of
    # the thousand modules that it brings some take an interrupt for a package that is missing.
    with uninterrupted():
        from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

    was_training = model.training
    model.eval()
    # Their sums are over all processes.
    confusion = MulticlassConfusionMatrix(num_classes).to(device)
    top5 = MulticlassAccuracy(num_classes, top_k=min(5, num_classes), average="micro").to(device)
    finite = torch.ones((), dtype=torch.bool, device=device)
    start = time.perf_counter()
    for images, labels in batches:
        labels = labels.to(device, non_blocking=True)
        with autocast:
            logits = model(images.to(device, non_blocking=True)).float()
        finite &= logits.isfinite().all()
        confusion.update(logits, labels)
        top5.update(logits, labels)
    counts = confusion.compute().cpu()
    share = float(top5.compute())
    seconds = time.perf_counter() - start
    model.train(was_training)
    if not bool(finite):
        raise ValueError("the model's logits are not finite: its training diverged")
    return Scores(counts, share, int(counts.sum()), seconds)
