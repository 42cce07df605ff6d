"""What training prints and counts as it goes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cin_fast.distributed import sum_over_processes
from cin_fast.losses import pair_counts
from cin_fast.models import LossParts


@dataclass
class EpochTotals:
    """Sums over an epoch, on the device until they are read."""

    loss: Tensor
    classification: Tensor
    pair: Tensor
    correct: Tensor
    images: int = 0
    steps: int = 0
    positives: int = 0
    negatives: int = 0

    @classmethod
    def zeros(cls, device: torch.device) -> EpochTotals:
        """Nothing counted yet."""
        loss, classification, pair, correct = torch.zeros(4, dtype=torch.float64, device=device)
        return cls(loss.clone(), classification.clone(), pair.clone(), correct.clone())

    def count_pairs(self, labels: Tensor, partner: Tensor) -> None:
        """Pairs of a batch, by their kind; both arguments on the CPU."""
        positives, negatives = pair_counts(labels, partner)
        self.positives += positives
        self.negatives += negatives

    def add(self, loss: Tensor, parts: LossParts, logits: Tensor, labels: Tensor) -> None:
        """A step's loss, and how many of its images are right."""
        self.loss += loss
        self.classification += parts.classification.detach()
        if parts.pair is not None:
            self.pair += parts.pair.detach()
        self.correct += (logits.argmax(1) == labels).sum()
        self.images += len(labels)
        self.steps += 1

    def means(self) -> dict[str, float]:
        """Means over the steps and images of all processes; counts are summed."""
        counts = (self.steps, self.images, self.positives, self.negatives)
        sums = [self.loss, self.classification, self.pair, self.correct]
        sums += [torch.full_like(self.loss, count) for count in counts]
        loss, classification, pair, correct, steps, images, positives, negatives = (
            sum_over_processes(torch.stack(sums)).tolist()
        )
        return {
            "loss": loss / steps,
            "loss_classification": classification / steps,
            "loss_pair": pair / steps,
            "train_top1": correct / images,
            "images": images,
            "positive_pairs": positives,
            "negative_pairs": negatives,
        }

    def __str__(self) -> str:
        return (
            f"loss {self.loss.item() / self.steps:.3f} = "
            f"{self.classification.item() / self.steps:.3f} + "
            f"alpha {self.pair.item() / self.steps:.3f}, "
            f"pairs +{self.positives} -{self.negatives}"
        )


def epoch_line(metrics: Mapping[str, Any], epochs: int) -> str:
    """An epoch's line of metrics.jsonl in words."""
    parts = {
        "loss": "loss {loss:.4f}",
        "positive_pairs": "pairs +{positive_pairs:.0f} -{negative_pairs:.0f}",
        "train_top1": "train {train_top1:.2%}",
        "test_top1": "test {test_top1:.2%}",
        "images_per_second": "{images_per_second:.1f} images/s",
    }
    # Some epochs have no test, and one whose line was lost has nothing else.
    known = [text.format(**metrics) for name, text in parts.items() if name in metrics]
    return "  ".join([f"epoch {metrics['epoch']:3}/{epochs}", *known])
