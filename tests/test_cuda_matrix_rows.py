"""The matmul backend's passes over matrices, emulated: against float64, with planted bugs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from emulation import EmulationError, Emulator, rebuild, registered
from mutations import plant
from torch import Tensor

from cin_fast import matmul
from cin_fast.testing import KERNEL_DTYPES, check_cci, check_sci, make_input

PARTNER = torch.tensor([1, 0, 2])
ETA = torch.tensor([0.7, -0.4, 1.0])
# File, old and new code, and what is then seen.
SCI, CCI, ROWS = "softmax_rows.cu", "cci_rows.cu", "softmax_rows.cuh"
BUGS = {
    "no barrier within a sum": (ROWS, "  __syncthreads();\n", "", "race|never"),
    "sums share their memory": (SCI, "memory + kRowWarps, Sum", "memory, Sum", "race"),
    "a warp left out": (ROWS, "warp < kRowWarps", "warp < kRowWarps - 1", "not close"),
    "half of a warp left out": (ROWS, "distance = 16", "distance = 8", "not close"),
    "pieces over the row's end": (ROWS, "columns % 4 == 0", "true", "buffer|aligned"),
    "the wrong end": (ROWS, "scale * a < scale * b", "a < b", "not close"),
    "scale forgotten": (SCI, "narrow<T>(scale * p", "narrow<T>(p", "not close"),
    "the partner's row is its own": (CCI, "(its_image *", "(image *", "not close"),
    "the partner's eta": (CCI, "eta = etas[image]", "eta = etas[its_image]", "not close"),
    "what the partner is owed": (CCI, "dp = dm - pair", "dp = dm + pair", "not close"),
    "two sums in one memory": (CCI, "Memory + kRowWarps, Sum", "Memory, Sum", "race"),
}
Pass = Callable[[Tensor, Tensor, float, torch.dtype], tuple[Tensor, ...]]


def sci_passes(logits: Tensor, d: Tensor, scale: float, dtype: torch.dtype) -> tuple[Tensor, ...]:
    forward = matmul._softmax(logits.clone(), scale, dtype)
    return forward, *matmul._softmax_backward(logits.clone(), d.clone(), scale, dtype)


def cci_passes(logits: Tensor, d: Tensor, scale: float, dtype: torch.dtype) -> tuple[Tensor, ...]:
    forward = matmul._interaction(logits.clone(), PARTNER, ETA, scale, dtype)
    backward = matmul._interaction_backward(logits.clone(), d, PARTNER, ETA, scale, dtype)
    return forward, *backward


def check(passes: Pass, channels: int, dtype: torch.dtype, scale: float, size: float = 1.0) -> None:
    """Each result as near to float64, which torch passes over, as its dtype tells numbers apart."""
    shape = (len(PARTNER), channels, channels)
    logits, d = size * make_input("randn", shape), make_input("randn", shape, seed=1)
    exact = passes(logits.double(), d.double(), scale, torch.float64)
    rounding = {"rtol": max(torch.finfo(dtype).eps, 1e-5), "atol": 2e-6}
    for result, right in zip(passes(logits, d, scale, dtype), exact, strict=True):
        torch.testing.assert_close(result.double(), right.double(), **rounding)


@pytest.mark.parametrize("scale", [-1.0, 0.25])
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize("passes", [sci_passes, cci_passes])
def test_emulated(emulator: Emulator, passes: Pass, dtype: torch.dtype, scale: float) -> None:
    for channels in (1, 7, 64):
        check(passes, channels, dtype, scale)
    check(passes, 33, dtype, scale, size=100.0)
    stem = "softmax_rows" if passes is sci_passes else "cci_rows"
    assert emulator.launched == [f"{stem}_backward"]


@pytest.mark.parametrize("columns", [300, 1030, 2048])
def test_rows_longer_than_a_block(emulator: Emulator, columns: int) -> None:
    logits, dp = torch.randn(2, 1, 3, columns)
    exact = sci_passes(logits.double(), dp.double(), -1.0, torch.float64)
    for result, right in zip(sci_passes(logits, dp, -1.0, torch.float32), exact, strict=True):
        torch.testing.assert_close(result.double(), right, rtol=1e-5, atol=1e-6)


def test_the_rule_with_these_passes(emulator: Emulator) -> None:
    for dtype in KERNEL_DTYPES:
        x, dy = (make_input(kind, (3, 17, 30), dtype) for kind in ("diffuse", "randn"))
        check_sci("matmul", x, None, dy)
        assert emulator.launched == ["softmax_rows_backward"]
        check_cci("matmul", x, PARTNER, ETA, None, dy)
        assert emulator.launched == ["cci_rows_backward"]


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_is_seen(
    bug: str,
    repository: Path,
    emulation_library: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file, old, new, symptom = BUGS[bug]
    cuda = plant(repository / "csrc", tmp_path, file, old, new)
    passes, kernels = (cci_passes, CCI) if file == CCI else (sci_passes, SCI)
    library = rebuild(cuda / kernels, emulation_library, tmp_path)
    with (
        registered(library, monkeypatch),
        pytest.raises((EmulationError, AssertionError), match=symptom),
    ):
        check_moderate_and_extreme(passes)


def check_moderate_and_extreme(passes: Pass) -> None:
    check(passes, 257, torch.bfloat16, -1.5)
    check(passes, 33, torch.bfloat16, -1.5, size=100.0)
