"""What is measured: shapes of real networks, and how cost grows with C, L and B."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

QUICK = os.environ.get("CIN_FAST_BENCH_QUICK", "") not in ("", "0")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_BATCH = 20 if DEVICE.type == "cuda" else 4


@dataclass(frozen=True)
class Case:
    """One operator call: B images, C channels, L positions; ``backward`` adds its gradients."""

    name: str
    batch: int
    channels: int
    height: int
    width: int
    dtype_name: str = "float32"
    backward: bool = False

    @property
    def positions(self) -> int:
        """L."""
        return self.height * self.width

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of features and results."""
        return DTYPES[self.dtype_name]

    def times(self, factor: float) -> float:
        """``factor`` where the gradients are computed, too; 1 where they are not."""
        return factor if self.backward else 1

    def maps(self, count: float) -> float:
        """Bytes of ``count`` maps of this shape."""
        return count * self.batch * self.channels * self.positions * self.dtype.itemsize

    @property
    def group(self) -> str:
        """The heading that its rivals share."""
        shape = f"B{self.batch} C{self.channels} L{self.positions}"
        direction = "forward + backward" if self.backward else "forward"
        return f"{self.name} {shape} {self.dtype_name} {direction}"

    def __str__(self) -> str:
        direction = "both" if self.backward else "forward"
        return f"{self.name}-{self.dtype_name}-{direction}"


def _both(*cases: Case) -> list[Case]:
    return [
        Case(**{**vars(case), "backward": backward}) for case in cases for backward in (False, True)
    ]


def _networks(dtype_name: str) -> list[Case]:
    return [
        Case("resnet50-448", _BATCH, 2048, 14, 14, dtype_name),
        Case("resnet50-224", _BATCH, 2048, 7, 7, dtype_name),
        Case("resnet50-600", _BATCH, 2048, 19, 19, dtype_name),
        Case("vgg19-448", _BATCH, 512, 28, 28, dtype_name),
        Case("danet-64", 2, 512, 64, 64, dtype_name),
        Case("danet-96", 1, 512, 96, 96, dtype_name),
    ]


def network_cases() -> list[Case]:
    """The maps of real networks."""
    if QUICK:
        return _both(Case("resnet18-224", 4, 512, 7, 7), Case("danet-32", 1, 128, 32, 32))
    low = "bfloat16"
    return _both(*_networks("float32"), *(case for case in _networks(low)[:1]))


def scaling_cases() -> list[Case]:
    """Forward alone, along one axis each: C, L and B."""
    if QUICK:
        return []
    channels = [Case(f"C{c}", 1, c, 14, 14) for c in (512, 1024, 4096, 8192)]
    sides = [Case(f"L{s * s}", 1, 512, s, s) for s in (7, 14, 28, 56, 96)]
    batches = [Case(f"B{b}", b, 2048, 7, 7) for b in (1, 4, 16, 64)]
    return channels + sides + batches


def pair_cases() -> list[Case]:
    """Maps of a training batch."""
    if QUICK:
        return _both(Case("resnet18-224", 4, 512, 7, 7))
    return _both(*_networks("float32")[:2], Case("resnet18-224", 20, 512, 7, 7))


def head_cases() -> list[Case]:
    """Maps that a classifier's head gets."""
    if QUICK:
        return _both(Case("resnet18-224", 4, 512, 7, 7))
    return _both(*_networks("float32")[:4])
