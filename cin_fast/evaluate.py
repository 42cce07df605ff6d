"""Accuracy of a model over a dataset, every image counted once however many processes share it."""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cin_fast.distributed import sum_over_processes


@dataclass(frozen=True)
class Scores:
    """Counts over a dataset: rows of the confusion matrix are true classes, columns predicted."""

    confusion: Tensor
    top5_hits: int
    images: int
    seconds: float

    @property
    def top1(self) -> float:
        """Share of images whose best class is right, 0 to 1."""
        return int(self.confusion.diagonal().sum()) / max(self.images, 1)

    @property
    def top5(self) -> float:
        """Share of images whose class is among the best five, 0 to 1."""
        return self.top5_hits / max(self.images, 1)

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
    """Run ``model`` in evaluation mode over this process's batches; sums are over all processes."""
    was_training = model.training
    model.eval()
    confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)
    top5 = torch.zeros((), dtype=torch.int64, device=device)
    start = time.perf_counter()
    for images, labels in batches:
        labels = labels.to(device, non_blocking=True)
        with autocast:
            logits = model(images.to(device, non_blocking=True))
        best = logits.topk(min(5, num_classes), dim=1).indices
        top5 += (best == labels[:, None]).sum()
        cell = labels * num_classes + best[:, 0]
        confusion += torch.bincount(cell, minlength=num_classes**2).view_as(confusion)
    counts = sum_over_processes(torch.cat([confusion.flatten(), top5[None]])).cpu()
    seconds = time.perf_counter() - start
    model.train(was_training)
    confusion = counts[:-1].view(num_classes, num_classes)
    return Scores(confusion, int(counts[-1]), int(confusion.sum()), seconds)
