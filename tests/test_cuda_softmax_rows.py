"""The matmul backend's passes over matrices, emulated: against float64, with planted bugs."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from emulation import EmulationError, Emulator, rebuild, registered

from cin_fast import matmul
from cin_fast.testing import KERNEL_DTYPES, check_sci, make_input

# Old and new code of the kernels, and what is then seen.
BUGS = {
    "no barrier within a sum": ("  __syncthreads();\n", "", "race|never written"),
    "sums share their memory": ("memory + kWarps, Sum", "memory, Sum", "race"),
    "a warp left out": ("warp < kWarps", "warp < kWarps - 1", "not close"),
    "half of a warp left out": ("distance = 16", "distance = 8", "not close"),
    "pieces that the row's end breaks": ("columns % 4 == 0", "true", "global buffer|aligned"),
    "the wrong end": ("scale * a < scale * b", "a < b", "not close"),
    "scale forgotten": ("narrow<T>(scale * p", "narrow<T>(p", "not close"),
}


def check(columns: int, dtype: torch.dtype, scale: float, size: float = 1.0) -> None:
    """Weights and gradient, each as near to float64 as its dtype tells numbers apart."""
    logits = size * make_input("randn", (2, 3, columns))
    dp = make_input("randn", (2, 3, columns), seed=1)
    p = torch.softmax(scale * logits.double(), -1)
    exact = scale * p * (dp.double() - (p * dp.double()).sum(-1, keepdim=True))
    forward = matmul._softmax(logits.clone(), scale, dtype)
    weights, ds = matmul._softmax_backward(logits.clone(), dp.clone(), scale, dtype)
    rounding = {"rtol": max(torch.finfo(dtype).eps, 1e-5), "atol": 1e-6}
    torch.testing.assert_close(forward.double(), p, **rounding)
    torch.testing.assert_close(weights.double(), p, **rounding)
    torch.testing.assert_close(ds.double(), exact, **rounding)


@pytest.mark.parametrize("scale", [-1.0, 0.25])
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_emulated(emulator: Emulator, dtype: torch.dtype, scale: float) -> None:
    for columns in (1, 7, 64, 300, 1030, 2048):
        check(columns, dtype, scale)
    check(33, dtype, scale, size=500.0)
    assert emulator.launched == ["softmax_rows_backward"]


def test_the_rule_with_these_passes(emulator: Emulator) -> None:
    for dtype in KERNEL_DTYPES:
        x, dy = (make_input(kind, (3, 17, 30), dtype) for kind in ("diffuse", "randn"))
        check_sci("matmul", x, None, dy)
        assert emulator.launched == ["softmax_rows_backward"]


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_is_seen(
    bug: str,
    repository: Path,
    emulation_library: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    old, new, symptom = BUGS[bug]
    shutil.copytree(repository / "csrc", tmp_path / "csrc")
    source = tmp_path / "csrc" / "cuda" / "softmax_rows.cu"
    text = source.read_text()
    assert old in text
    source.write_text(text.replace(old, new))
    library = rebuild(source, emulation_library, tmp_path)
    with (
        registered(library, monkeypatch),
        pytest.raises((EmulationError, AssertionError), match=symptom),
    ):
        check(1031, torch.bfloat16, -1.5)
        check(1031, torch.bfloat16, -1.5, size=500.0)
