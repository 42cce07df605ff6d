"""The CUDA kernels, executed on the CPU under the emulation, against float64 by the rule.

What this cannot show: an error inside a PTX wrapper (test_cuda_ptx.py, on a GPU, does), the
hardware's own order of summation, and anything about speed.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import torch
from emulation import AMPERE, HOPPER, Emulator
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cin_fast import ops
from cin_fast.testing import (
    INPUT_KINDS,
    KERNEL_DTYPES,
    assert_exact_as_torch,
    check_cci,
    check_pair,
    check_sci,
    evaluate_cci,
    evaluate_sci,
    make_input,
    make_pair_inputs,
    make_pairs,
)

# Unit sizes, tails on both sides of a block, two panels, ResNet's 14 x 14, an empty batch.
SHAPES = ((1, 1, 1), (3, 30, 1), (1, 1, 7), (2, 17, 5), (2, 65, 33), (1, 100, 196), (0, 8, 9))


def inputs(
    kind: str, shape: tuple[int, int, int], columns: int | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None, Tensor]:
    x = make_input(kind, shape, dtype)
    v = make_input("randn", (*shape[:2], columns), dtype, seed=1) if columns else None
    return x, v, make_input("randn", (*shape[:2], columns or shape[2]), dtype, seed=2)


@pytest.mark.parametrize("columns", [None, 9, 20])
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize("kind", INPUT_KINDS)
def test_sci(emulator: Emulator, kind: str, dtype: torch.dtype, columns: int | None) -> None:
    for shape in SHAPES:
        x, v, dy = inputs(kind, shape, columns, dtype)
        check_sci("cuda", x, v, dy)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_smallest_chip(emulator: Emulator, dtype: torch.dtype) -> None:
    """Compute capability 8.6 and 8.9 give a block 99 KB, and every kernel has to make do."""
    emulator.shared_limit = 99 * 1024
    for columns in (None, 9, 20):
        x, v, dy = inputs("diffuse", (2, 9, 100), columns, dtype)
        check_sci("cuda", x, v, dy)
        check_cci("cuda", x, *make_pairs(2), v, dy)


@pytest.mark.parametrize("columns", [None, 9])
def test_sci_where_operands_do_not_fit(emulator: Emulator, columns: int | None) -> None:
    """On a chip with little shared memory, panels stream through it."""
    emulator.shared_limit = 72 * 1024
    x, v, dy = inputs("diffuse", (1, 100, 196), columns, torch.bfloat16)
    check_sci("cuda", x, v, dy)
    assert "sci_resident_backward" not in emulator.launched
    assert "sci_backward" in emulator.launched


def test_sci_where_operands_fit(emulator: Emulator) -> None:
    x, _, dy = inputs("diffuse", (1, 70, 208), None, torch.bfloat16)
    check_sci("cuda", x, None, dy)
    assert "sci_resident_backward" in emulator.launched


@pytest.mark.parametrize("columns", [None, 9])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", INPUT_KINDS)
def test_sci_on_hopper(
    emulator: Emulator, kind: str, dtype: torch.dtype, columns: int | None
) -> None:
    """Warp groups, bulk tensor copies and wgmma."""
    emulator.choose(HOPPER)
    for shape in SHAPES:
        x, v, dy = inputs(kind, shape, columns, dtype)
        check_sci("cuda", x, v, dy)
        assert shape[0] == 0 or "sci_wgmma_backward" in emulator.launched


@pytest.mark.parametrize("columns", [None, 9])
def test_sci_on_hopper_goes_round_the_ring(emulator: Emulator, columns: int | None) -> None:
    """More tiles of columns than stages hold, several blocks."""
    emulator.choose(HOPPER)
    for shape in ((1, 430, 64), (1, 530, 208)):
        x, v, dy = inputs("diffuse", shape, columns, torch.bfloat16)
        check_sci("cuda", x, v, dy)


@pytest.mark.parametrize("columns", [None, 9])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sci_on_hopper_by_halves(
    emulator: Emulator, dtype: torch.dtype, columns: int | None
) -> None:
    """Blocks of a last wave that would leave half of the chip idle: all of them, and the last one
    of five on a chip of four multiprocessors."""
    emulator.choose(HOPPER)
    for multiprocessors, shape in ((132, (3, 140, 196)), (132, (1, 330, 64)), (4, (1, 600, 49))):
        emulator.multiprocessors = multiprocessors
        x, v, dy = inputs("diffuse", shape, columns, dtype)
        check_sci("cuda", x, v, dy)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_sci_in_chunks(emulator: Emulator, dtype: torch.dtype) -> None:
    """More positions than a panel, more columns than a block accumulates."""
    x, v, dy = inputs("diffuse", (1, 40, 230), 215, dtype)
    check_sci("cuda", x, v, dy)


@pytest.mark.parametrize("columns", [None, 9, 20])
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize("kind", INPUT_KINDS)
def test_cci(emulator: Emulator, kind: str, dtype: torch.dtype, columns: int | None) -> None:
    """Odd batches: the last image is its own partner. Of few numbers the largest error is luck, and
    eta has one gradient an image: hence 11 images."""
    for shape in ((1, 1, 1), (11, 17, 5), (3, 65, 33), (0, 8, 9)):
        x, v, dy = inputs(kind, shape, columns, dtype)
        check_cci("cuda", x, *make_pairs(shape[0]), v, dy)


def test_cci_in_chunks(emulator: Emulator) -> None:
    x, v, dy = inputs("diffuse", (2, 40, 230), 215, torch.bfloat16)
    check_cci("cuda", x, *make_pairs(2), v, dy)


@pytest.mark.parametrize("columns", [None, 9])
def test_cci_of_resnet_maps(emulator: Emulator, columns: int | None) -> None:
    """Partners that are no neighbours, eta of either sign."""
    x, v, dy = inputs("relu", (4, 68, 196), columns, torch.bfloat16)
    partner = torch.tensor([3, 1, 2, 0])
    check_cci("cuda", x, partner, torch.tensor([0.7, -0.4, 1.0, 0.0]), v, dy)


@pytest.mark.parametrize("columns", [None, 9])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", INPUT_KINDS)
def test_cci_on_hopper(
    emulator: Emulator, kind: str, dtype: torch.dtype, columns: int | None
) -> None:
    """Warp groups, of a pair of images; odd batches as above."""
    emulator.choose(HOPPER)
    for shape in ((1, 1, 1), (11, 17, 5), (3, 65, 33), (3, 70, 49), (0, 8, 9)):
        x, v, dy = inputs(kind, shape, columns, dtype)
        check_cci("cuda", x, *make_pairs(shape[0]), v, dy)
        last = "cci_wgmma_backward" if columns else "cci_wgmma_tied_backward"
        assert shape[0] == 0 or last in emulator.launched


@pytest.mark.parametrize("columns", [None, 1, 16])
def test_cci_on_hopper_goes_round_the_ring(emulator: Emulator, columns: int | None) -> None:
    """Partners that are no neighbours, one its own, more tiles of columns than stages hold."""
    emulator.choose(HOPPER)
    for shape in ((4, 290, 64), (4, 200, 196), (4, 100, 208)):
        x, v, dy = inputs("relu", shape, columns, torch.bfloat16)
        partner = torch.tensor([3, 1, 2, 0])
        check_cci("cuda", x, partner, torch.tensor([0.7, -0.4, 1.0, 0.0]), v, dy)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize("chip", [AMPERE, HOPPER])
def test_pair_takes_the_statistics_from_sci(
    emulator: Emulator, chip: int, dtype: torch.dtype
) -> None:
    emulator.choose(chip)
    for shape in ((16, 17, 5), (3, 140, 49)):
        check_pair("cuda", *make_pair_inputs(shape, 9, "relu", dtype, bias=-0.6))
    kernels = {kernel for kernel, _ in emulator.blocks}
    assert {"cci_forward", "cci_wgmma_forward"} & kernels
    assert not any("statistics" in kernel for kernel in kernels)


@pytest.mark.parametrize("chip", [AMPERE, HOPPER])
def test_own_partner_with_eta_one_leaves_nothing(emulator: Emulator, chip: int) -> None:
    """M = P - P: every sign is 0, and so are value and gradients."""
    emulator.choose(chip)
    for dtype, columns in ((torch.float32, None), (torch.bfloat16, 9)):
        x, v, dy = inputs("randn", (1, 33, 20), columns, dtype)
        results = check_cci("cuda", x, torch.zeros(1, dtype=torch.int64), torch.ones(1), v, dy)
        assert all(not result.any() for result in results.results.values())


@pytest.mark.parametrize("columns", [None, 9, 20])
@pytest.mark.parametrize("kind", INPUT_KINDS)
def test_tf32(emulator: Emulator, kind: str, columns: int | None) -> None:
    """By the rule, but against what PyTorch does at this setting on a GPU: products of operands
    rounded to TF32, summed in float32."""
    emulator.float32_products = "high"
    for shape in ((1, 1, 7), (3, 65, 33), (1, 70, 196)):
        x, v, dy = inputs(kind, shape, columns, torch.float32)
        with Tf32Matmul():
            eager = evaluate_sci(x, v, dy, backend="torch")
        double = [None if t is None else t.double() for t in (x, v, dy)]
        exact = evaluate_sci(*double, backend="torch")
        actual = evaluate_sci(x, v, dy, backend="cuda")
        for name, result in actual.results.items():
            assert_exact_as_torch(name, result, eager.results[name], exact.results[name])


class Tf32Matmul(TorchDispatchMode):
    """Rounds what matrix products read to TF32, ties to even."""

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: object,
        args: tuple[Tensor, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        if func in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default):
            args = tuple(to_tf32(t) for t in args)
        return func(*args, **(kwargs or {}))


def to_tf32(t: Tensor) -> Tensor:
    bits = t.contiguous().view(torch.int32)
    return ((bits + 0xFFF + (bits >> 13 & 1)) & ~0x1FFF).view(torch.float32)


@pytest.mark.parametrize("chip", [AMPERE, HOPPER])
def test_shared_memory_of_a_block(emulator: Emulator, chip: int, repository: Path) -> None:
    """What each launch asks for, operands as wide as they get: within the chip's limit, and as
    docs/kernels.md says."""
    emulator.choose(chip)
    for dtype, columns in product((torch.bfloat16, torch.float32), (None, 9, 20)):
        x, v, dy = inputs("diffuse", (1, 3, 208), columns, dtype)
        evaluate_sci(x, v, dy, backend="cuda")
        evaluate_cci(x, *make_pairs(1), v, dy, backend="cuda")
    fast, terms = ("wgmma", "_wgmma") if chip == HOPPER else ("resident", "")
    kernels = {kernel for kernel, _ in emulator.blocks}
    assert {f"sci_{fast}_forward", f"sci{terms}_terms", f"sci_{fast}_backward"} <= kernels
    documented = (repository / "docs" / "kernels.md").read_text()
    for kernel, shared_bytes in emulator.blocks:
        assert shared_bytes <= emulator.shared_limit, kernel
        if "wgmma" in kernel:
            assert f" {shared_bytes:,} |" in documented, (kernel, shared_bytes)


@pytest.mark.parametrize("scale", [1.0, 0.3, 0.0])
def test_scale(emulator: Emulator, scale: float) -> None:
    x, v, dy = inputs("diffuse", (1, 33, 20), 5, torch.float32)
    check_sci("cuda", x, v, dy, scale)


def test_large_activations(emulator: Emulator) -> None:
    """Logits in the thousands, and a first tile whose weights all vanish beside the second's."""
    x = make_input("randn", (1, 140, 64), torch.bfloat16) * 8
    dy = make_input("randn", (1, 140, 64), torch.bfloat16, seed=1)
    check_sci("cuda", x, None, dy)


@pytest.mark.parametrize("columns", [None, 9])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chip", [AMPERE, HOPPER])
def test_rows_with_one_weight(
    emulator: Emulator, chip: int, dtype: torch.dtype, columns: int | None
) -> None:
    """dP - delta, a small difference of large numbers, has to cancel to its last digit."""
    emulator.choose(chip)
    x, v, dy = inputs("randn", (2, 70, 20), columns, dtype)
    for factor in (4, 100):
        check_sci("cuda", x * factor, v, dy)


@pytest.mark.parametrize("columns", [None, 9])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chip", [AMPERE, HOPPER])
def test_rows_with_nearly_one_weight(
    emulator: Emulator, chip: int, dtype: torch.dtype, columns: int | None
) -> None:
    """Without the digits that rounding takes off y, delta would be too coarse: by 12 times."""
    emulator.choose(chip)
    x, v, dy = inputs("randn", (2, 190, 32), columns, dtype)
    check_sci("cuda", x * 1.5, v, dy, scale=1.0)


def test_identical_rows(emulator: Emulator) -> None:
    x = make_input("randn", (1, 1, 24), torch.float16).expand(1, 70, 24)
    y = ops.sci(x, backend="cuda")
    torch.testing.assert_close(y, x, rtol=2e-3, atol=2e-3)


def test_any_strides(emulator: Emulator) -> None:
    """Transposed, sliced and, where rows start on 16 bytes, used as they stand."""
    x = make_input("randn", (2, 40, 24), torch.bfloat16)
    expected = ops.sci(x, backend="cuda")
    transposed = x.mT.contiguous().mT
    sliced = torch.cat([x, x], dim=2)[..., :24]
    for same in (transposed, sliced):
        assert not same.is_contiguous()
        assert torch.equal(ops.sci(same, backend="cuda"), expected)


@pytest.mark.parametrize("columns", [None, 9])
@pytest.mark.parametrize("chip", [AMPERE, HOPPER])
@pytest.mark.parametrize("order", [1, 2])
def test_any_order_of_warps_gives_the_same_bits(
    emulator: Emulator, order: int, chip: int, columns: int | None
) -> None:
    emulator.choose(chip)
    x, v, dy = inputs("randn", (2, 70, 72), columns, torch.bfloat16)
    pairs = make_pairs(2)
    for check in (check_sci, lambda *a: check_cci(a[0], a[1], *pairs, *a[2:])):
        emulator.order = 0
        first = check("cuda", x, v, dy).results
        emulator.order = order
        second = check("cuda", x, v, dy).results
        assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("positions", [49, 196, 230])
@pytest.mark.parametrize("columns", [None, 9])
def test_no_bank_conflicts(emulator: Emulator, positions: int, columns: int | None) -> None:
    x, v, dy = inputs("diffuse", (1, 64, positions), columns, torch.bfloat16)
    check_sci("cuda", x, v, dy)
    assert emulator.conflicts == 0
