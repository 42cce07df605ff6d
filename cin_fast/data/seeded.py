"""Augmentation that depends on the sample alone, so that a resumed run goes on to the same bits."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from cin_fast.data.base import ImageDataset
from cin_fast.data.sampler import ClassBalancedPairSampler


class SeededImages(Dataset[tuple[Tensor, int, int]]):
    """A dataset of (image, label, index) whose augmentation follows the sample's own seed.

    Indices are ``(index, seed)``: the same image comes out whatever worker loads it, and whatever
    that worker loaded before.
    """

    def __init__(self, images: ImageDataset) -> None:
        self.images = images

    def __getitem__(self, sample: tuple[int, int]) -> tuple[Tensor, int, int]:
        index, seed = sample
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            image, label = self.images[index]
        return image, label, index


class SeededBatches(Sampler[list[tuple[int, int]]]):
    """The pair sampler's batches, each index with the seed of its augmentation."""

    def __init__(self, pairs: ClassBalancedPairSampler, seed: int, rank: int = 0) -> None:
        self.pairs = pairs
        self.seed = seed
        self.rank = rank
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration gives."""
        self.epoch = epoch
        self.pairs.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.pairs)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        generator = torch.Generator()
        generator.manual_seed((self.seed * 1_000_003 + self.epoch) * 65_537 + self.rank)
        for batch in self.pairs:
            seeds = torch.randint(2**62, (len(batch),), generator=generator).tolist()
            yield list(zip(batch, seeds, strict=True))
