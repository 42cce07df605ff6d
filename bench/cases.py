"""What is measured: shapes of real networks, and how cost grows with C, L and B."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

QUICK = os.environ.get("CIN_FAST_BENCH_QUICK", "") not in ("", "0")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Of the 120 or 600 s that a run may take; the rest is for starting, and for what overruns.
SECONDS = float(os.environ.get("CIN_FAST_BENCH_SECONDS", "85" if QUICK else "520"))
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_GPU = DEVICE.type == "cuda"
_BATCH = 20 if _GPU else 4
_ALL = _GPU or SECONDS >= 900
_COMPILED = ("resnet18-224", "danet-32") if QUICK else ("resnet50-448", "vgg19-448", "danet-64")


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
    def why_not_compiled(self) -> str:
        """Why ``torch.compile`` has no turn; empty if it has one."""
        if _GPU or self.name in _COMPILED:
            return ""
        return f"compiling takes seconds a shape on a CPU: done for {', '.join(_COMPILED)}"

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


def main_case(dtype_name: str = "float32", backward: bool = False) -> Case:
    """The map that most is said about: ResNet-50's at 448 px."""
    if QUICK:
        return Case("resnet18-224", 4, 512, 7, 7, dtype_name, backward)
    return Case("resnet50-448", _BATCH, 2048, 14, 14, dtype_name, backward)


def _main_cases() -> list[Case]:
    """On a GPU in bfloat16, too: there, who trains in float32 gives most of the speed away."""
    return [main_case(), *([main_case("bfloat16")] if _GPU else [])]


def danet_case(backward: bool = False) -> Case:
    """The smaller of DANet's maps."""
    if QUICK:
        return Case("danet-32", 1, 128, 32, 32, backward=backward)
    return Case("danet-64", 2, 512, 64, 64, backward=backward)


def _resnet50(size: int) -> Case:
    side = -(-size // 32)
    return Case(f"resnet50-{size}", _BATCH, 2048, side, side)


def _vgg19() -> Case:
    return Case("vgg19-448", _BATCH, 512, 28, 28)


def network_cases() -> list[Case]:
    """The maps of real networks."""
    if QUICK:
        return _both(main_case(), danet_case())
    return _both(
        main_case(),
        _resnet50(224),
        _resnet50(600),
        _vgg19(),
        danet_case(),
        Case("danet-96", 1, 512, 96, 96),
        main_case("bfloat16"),
    )


def scaling_cases() -> list[Case]:
    """Forward alone, along one axis each: C, L and B; fewer points where time is short."""
    channels = (512, 1024, 2048, 4096, 8192) if _ALL else (512, 2048, 8192)
    sides, batches = (7, 14, 28, 56, 96), (1, 4, 16, 64)
    fixed, fixed_batch = 512, 2048 if _GPU else 512
    if QUICK:
        channels, sides, batches, fixed, fixed_batch = (64, 256), (7, 14), (1, 4), 128, 128
    return [
        *(Case(f"C{c}", 1, c, 14, 14) for c in channels),
        *(Case(f"L{s * s}", 1, fixed, s, s) for s in sides),
        *(Case(f"B{b}", b, fixed_batch, 7, 7) for b in batches),
    ]


def pair_cases() -> list[Case]:
    """Maps of a training batch."""
    if QUICK:
        return _both(main_case())
    return _both(*_main_cases(), _resnet50(224), Case("resnet18-224", 20, 512, 7, 7))


def head_cases() -> list[Case]:
    """Maps that a classifier's head gets."""
    if QUICK:
        return _both(main_case())
    large = [_resnet50(600)] if _ALL else []
    return _both(*_main_cases(), _resnet50(224), *large, _vgg19())
