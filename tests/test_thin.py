"""The pooled head's linear layer: the rule for numbers, its derivatives, and when it is used."""

from __future__ import annotations

import pytest
import torch
from cpu_isas import poisoned_memory
from torch import Tensor
from torch.nn import functional as F

from cin_fast.testing import assert_exact_as_torch
from cin_fast.thin import thin_linear

pytestmark = pytest.mark.usefixtures("cpu_extension", "two_threads")

# Rows, columns, outputs: unit sizes, tails of every register tile, several chunks and parts, and
# as many rows as are left to a general product.
SHAPES = (
    (1, 1, 1),
    (2, 9, 3),
    (3, 17, 5),
    (5, 100, 66),
    (7, 1025, 300),
    (20, 2304, 515),
    (40, 33, 9),
)
OPS = torch.ops.cin_fast


def operands(rows: int, columns: int, outputs: int) -> tuple[Tensor, Tensor, Tensor]:
    """a, w and dy."""
    generator = torch.Generator().manual_seed(rows)
    shapes = ((rows, columns), (outputs, columns), (rows, outputs))
    a, w, dy = (torch.randn(shape, generator=generator) for shape in shapes)
    return a, w, dy


def products(a: Tensor, w: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """What plain PyTorch makes of them."""
    return {"y": F.linear(a, w), "da": dy @ w, "dw": dy.mT @ a}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_rule(isa: str, shape: tuple[int, int, int]) -> None:
    a, w, dy = operands(*shape)
    with poisoned_memory():
        found = {
            "y": OPS.cpu_thin_linear(a, w),
            "da": OPS.cpu_thin_linear_input(dy, w),
            "dw": OPS.cpu_thin_linear_weight(dy, a),
        }
    plain, exact = products(a, w, dy), products(a.double(), w.double(), dy.double())
    for name, actual in found.items():
        assert_exact_as_torch(name, actual, plain[name], exact[name])


def test_strided_operands() -> None:
    a, w, _ = operands(5, 100, 66)
    strided = torch.stack([w, w], dim=-1)[..., 0]
    torch.testing.assert_close(thin_linear(a.T.contiguous().T, strided), F.linear(a, w))


def test_an_empty_batch() -> None:
    a, w, dy = operands(0, 9, 3)
    assert thin_linear(a, w).shape == (0, 3)
    assert not OPS.cpu_thin_linear_weight(dy, a).any()


def test_the_same_bits_at_every_run_and_thread_count() -> None:
    a, w, dy = operands(20, 2304, 515)
    first = OPS.cpu_thin_linear(a, w), OPS.cpu_thin_linear_input(dy, w)
    torch.set_num_threads(1)
    again = OPS.cpu_thin_linear(a, w), OPS.cpu_thin_linear_input(dy, w)
    assert all(map(torch.equal, first, again))


def test_derivatives_to_the_second_order_are_those_of_linear() -> None:
    a, w, dy = operands(3, 17, 5)
    bias = torch.randn(5)
    found = []
    for function in (thin_linear, F.linear):
        leaves = [t.clone().requires_grad_() for t in (a, w, bias)]
        first = torch.autograd.grad(function(*leaves).square(), leaves, dy, create_graph=True)
        total = sum(gradient.square().sum() for gradient in first)
        found.append([*first, *torch.autograd.grad(total, leaves[:2])])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_one_output_as_linear_takes_it() -> None:
    a, w = torch.randn(3, 8), torch.randn(8)
    assert torch.equal(thin_linear(a, w), torch.nn.functional.linear(a, w))


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_operand_gets_no_gradient(frozen: int) -> None:
    a, w, dy = operands(3, 17, 5)
    leaves = [a.requires_grad_(frozen != 0), w.requires_grad_(frozen != 1)]
    thin_linear(*leaves).backward(dy)
    assert leaves[frozen].grad is None
    assert leaves[1 - frozen].grad is not None


@pytest.mark.parametrize(
    ("stem", "which"),
    [("thin_linear", (0, 1)), ("thin_linear_input", (2, 1)), ("thin_linear_weight", (2, 0))],
)
def test_opcheck(stem: str, which: tuple[int, int]) -> None:
    all_operands = operands(3, 17, 5)
    left, right = (all_operands[n].requires_grad_() for n in which)
    torch.library.opcheck(getattr(OPS, f"cpu_{stem}"), (left, right))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda a, w, dy: OPS.cpu_thin_linear(a, w[:, 1:]), "a: expected 16 columns"),
        (lambda a, w, dy: OPS.cpu_thin_linear_input(dy, w[1:]), "dy: expected 4 columns"),
        (lambda a, w, dy: OPS.cpu_thin_linear_weight(dy[1:], a), "dy: expected 3 rows"),
        (lambda a, w, dy: OPS.cpu_thin_linear(a[0], w), "a: expected a float32 matrix"),
        (lambda a, w, dy: OPS.cpu_thin_linear(a, w.double()), "w: expected a float32 matrix"),
    ],
)
def test_operators_refuse_what_does_not_fit(call, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        call(*operands(3, 17, 5))


def used(a: Tensor, w: Tensor, **options: str) -> bool:
    """Whether the kernel ran."""
    with torch.profiler.profile() as profile:
        thin_linear(a, w, **options)
    return any(event.key == "cin_fast::cpu_thin_linear" for event in profile.key_averages())


def test_the_kernel_is_used_where_it_is_the_faster_one(monkeypatch: pytest.MonkeyPatch) -> None:
    a, w, _ = operands(3, 17, 5)
    assert used(a, w)
    assert used(a, w, backend="cpu")
    assert not used(a, w, backend="reference")
    assert not used(a.double(), w.double())
    assert not used(a.expand(2, 3, 17), w)
    with torch.autocast("cpu", torch.bfloat16):
        assert not used(a, w)
    monkeypatch.setenv("CIN_FAST_BACKEND", "reference")
    assert not used(a, w)


def test_forward_mode_and_vmap() -> None:
    a, w, _ = operands(3, 17, 5)
    _, tangent = torch.func.jvp(lambda t: thin_linear(t, w), (a,), (a,))
    torch.testing.assert_close(tangent, F.linear(a, w))
    mapped = torch.vmap(lambda t: thin_linear(t[None], w)[0])(a)
    torch.testing.assert_close(mapped, F.linear(a, w))


@pytest.mark.slow
def test_compiled_whole() -> None:
    a, w, dy = operands(3, 17, 5)
    a.requires_grad_()
    y = torch.compile(thin_linear, fullgraph=True)(a, w)
    torch.testing.assert_close(y, F.linear(a, w))
    torch.testing.assert_close(torch.autograd.grad(y, a, dy)[0], dy @ w)
