"""The ``triton`` backend on a GPU: the rule for numbers, the same bits, TF32. ``make gpu``."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from cin_fast import dispatch, ops
from cin_fast.testing import (
    INPUT_KINDS,
    KERNEL_DTYPES,
    SHAPES,
    check_cci,
    check_pair,
    check_sci,
    make_input,
    make_pair_inputs,
    make_pairs,
)

pytestmark = [pytest.mark.gpu, pytest.mark.triton]


@pytest.fixture(scope="module")
def device() -> torch.device:
    reason = dispatch.unavailable("triton")
    if reason or not torch.cuda.is_available():
        pytest.skip(f"the triton backend is off: {reason or 'no CUDA device is visible'}")
    return torch.device("cuda")


@pytest.fixture
def tf32() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


# The shape that matters first, so that a run cut short has it.
@pytest.mark.parametrize("shape", [(2, 2048, 196), (1, 512, 784), *SHAPES[3:]], ids=str)
@pytest.mark.parametrize("columns", [None, 9, 40])
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_rule(
    device: torch.device, dtype: torch.dtype, columns: int | None, shape: tuple[int, ...]
) -> None:
    for kind in INPUT_KINDS:
        x = make_input(kind, shape, dtype, device)
        v = make_input("randn", (*shape[:2], columns), dtype, device, 1) if columns else None
        dy = make_input("randn", (x if v is None else v).shape, dtype, device, 2)
        check_sci("triton", x, v, dy)
        check_cci("triton", x, *make_pairs(shape[0], device), v, dy)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_rule_for_pairs(device: torch.device, dtype: torch.dtype) -> None:
    # Of test_rule's channels and columns: compiled once for both.
    inputs = make_pair_inputs((8, 2048, 196), 9, "relu", dtype, bias=-0.6)
    check_pair("triton", *(t.to(device) for t in inputs))


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_same_bits_at_every_run(device: torch.device, dtype: torch.dtype) -> None:
    x = make_input("relu", (4, 512, 196), dtype, device).requires_grad_()
    runs = []
    for _ in range(3):
        y = ops.sci(x, backend="triton")
        runs.append((y, torch.autograd.grad(y, x, torch.ones_like(y))[0]))
    for y, dx in runs[1:]:
        assert torch.equal(y, runs[0][0])
        assert torch.equal(dx, runs[0][1])


@pytest.mark.usefixtures("tf32")
def test_float32_follows_the_setting(device: torch.device) -> None:
    x = make_input("diffuse", (1, 256, 196), device=device)
    rounded = ops.sci(x, backend="triton")
    torch.set_float32_matmul_precision("highest")
    exact = ops.sci(x, backend="triton")
    assert not torch.equal(rounded, exact)
    torch.testing.assert_close(rounded, exact, rtol=1e-2, atol=1e-2)
