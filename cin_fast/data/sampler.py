"""Batches of P classes x K images, split at random into pairs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler


class ClassBalancedPairSampler(Sampler[list[int]]):
    """Batches of ``classes_per_batch`` classes x ``images_per_class`` images, as the paper's.

    Positions (0, 1), (2, 3), ... of a batch are its pairs, drawn at random over the whole batch,
    so that both kinds of pair arise. An epoch covers the training set: every image of a class is
    dealt out in groups of K. Where a class's count is no multiple of K, the last group is filled
    up with other images of the class; a class of fewer than K images repeats them. A class never
    stands twice in a batch: where fewer than P classes have groups left, one of much more images
    than the others for instance, more images of other classes, drawn at random, fill the batch.

    With ``world_size`` > 1 every process gets batches of its own, the same number each, and all
    of them together cover the training set.

    Args:
        labels: the label of every image.
        classes_per_batch: P.
        images_per_class: K.
        seed: with the epoch, decides everything.
        rank, world_size: this process, and how many there are.

    Raises:
        ValueError: if P x K is odd or below 1, there are fewer than P classes, or no such rank.
    """

    def __init__(
        self,
        labels: Sequence[int],
        classes_per_batch: int = 4,
        images_per_class: int = 5,
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if classes_per_batch < 1 or images_per_class < 1:
            raise ValueError(
                f"expected at least one class and image a batch, found {classes_per_batch} x "
                f"{images_per_class}"
            )
        if classes_per_batch * images_per_class % 2:
            raise ValueError(
                f"a batch of {classes_per_batch} classes x {images_per_class} images is odd and "
                "cannot be split into pairs"
            )
        if not 0 <= rank < world_size:
            raise ValueError(f"rank: expected 0 to {world_size - 1}, found {rank}")
        # A tensor would give tensors, each of which is a class of its own to a dict.
        self.labels = tuple(int(label) for label in labels)
        self.by_class: dict[int, list[int]] = {}
        for index, label in enumerate(self.labels):
            self.by_class.setdefault(label, []).append(index)
        if len(self.by_class) < classes_per_batch:
            raise ValueError(
                f"--classes-per-batch: {classes_per_batch} were asked for, but the dataset has "
                f"images of {len(self.by_class)} classes"
            )
        self.classes_per_batch = classes_per_batch
        self.images_per_class = images_per_class
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        groups = [math.ceil(len(images) / images_per_class) for images in self.by_class.values()]
        # A class stands once in a batch, so the largest class can need more batches than the sum.
        batches = max(math.ceil(sum(groups) / classes_per_batch), max(groups))
        self.batches = math.ceil(batches / world_size)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration gives."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator()
        generator.manual_seed(self.seed * 1_000_003 + self.epoch)
        groups = {label: self._groups(images, generator) for label, images in self.by_class.items()}
        steps = self.batches * self.world_size
        for step in range(steps):
            batch = self._batch(groups, steps - step, generator)
            if step % self.world_size == self.rank:
                yield batch

    def _groups(self, images: list[int], generator: torch.Generator) -> list[list[int]]:
        """All images of a class in random groups of K."""
        order = _shuffled(images, generator)
        k = self.images_per_class
        groups = [order[start : start + k] for start in range(0, len(order), k)]
        last = set(groups[-1])
        others = _shuffled([i for i in images if i not in last] or images, generator)
        while len(groups[-1]) < k:
            groups[-1] += others[: k - len(groups[-1])]
        return groups

    def _batch(
        self, groups: dict[int, list[list[int]]], steps_left: int, generator: torch.Generator
    ) -> list[int]:
        batch: list[int] = []
        for label in self._choose(groups, steps_left, generator):
            if groups[label]:
                batch += groups[label].pop()
            else:
                batch += self._groups(self.by_class[label], generator)[0]
        return _shuffled(batch, generator)

    def _choose(
        self, groups: dict[int, list[list[int]]], steps_left: int, generator: torch.Generator
    ) -> list[int]:
        """P classes, likelier the more groups they have left; those that must go now go first."""
        urgent = [label for label, left in groups.items() if len(left) >= steps_left]
        rest = [label for label in groups if label not in set(urgent)]
        wanted = self.classes_per_batch - len(urgent)
        if wanted == 0:
            return urgent
        left = torch.tensor([float(len(groups[label])) for label in rest])
        draws = torch.rand(len(rest), generator=generator).clamp(min=1e-12)
        # Largest log(u) / w first draws without replacement in proportion to w; classes with
        # nothing left come after all the others, in random order.
        order = torch.where(left > 0, draws.log() / left, -1e3 - draws).argsort(descending=True)
        return urgent + [rest[i] for i in order[:wanted].tolist()]


def _shuffled(items: list[int], generator: torch.Generator) -> list[int]:
    return [items[i] for i in torch.randperm(len(items), generator=generator).tolist()]
