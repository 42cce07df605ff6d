"""The rule of cin_fast.testing: what it lets pass, and that what is wrong fails."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from cin_fast import ops, reference
from cin_fast.testing import (
    KERNEL_DTYPES,
    Standard,
    Undecided,
    assert_exact_as_torch,
    check_cci,
    check_sci,
    evaluate_cci,
    evaluate_sci,
    make_input,
    make_pairs,
)

PARTNER = torch.tensor([1, 0])
TIE = (1, 5, 8)

Inputs = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]
Signs = Callable[[Tensor], Tensor]


def tied_inputs(dtype: torch.dtype, columns: int | None = 9) -> Inputs:
    """What ``cci`` takes, and dy; with this eta M at ``TIE`` is a millionth of P."""
    shape = (2, 40, 33)
    x = make_input("relu", shape, dtype)
    image, row, column = TIE
    p_BCC = reference.sci_weights(x.double(), -1.0)
    eta = (1 - 1e-6) * p_BCC[image, row, column] / p_BCC[1 - image, row, column]
    v = make_input("randn", (*shape[:2], columns), dtype, seed=1) if columns else None
    dy = make_input("randn", (x if v is None else v).shape, dtype, seed=2)
    return x, PARTNER, torch.stack([torch.tensor(-0.5), eta.float()]), v, dy


def tie(sign: float) -> Signs:
    def change(signs: Tensor) -> Tensor:
        changed = signs.clone()
        changed[TIE] = sign
        return changed

    return change


def backend_of(
    monkeypatch: pytest.MonkeyPatch, of_weights: Signs, of_eta: Signs | None = None
) -> None:
    """A ``cci`` of right values; its gradients have other signs of M, ``of_eta`` that of eta."""

    def cci(x, partner, eta, v=None, *, scale=-1.0, backend=None):
        p = reference.sci_weights(x, scale)
        fixed, other = eta.detach()[:, None, None], p[partner]
        m = p - fixed * other
        value = m.detach()
        through_p = of_weights(value.sign()) * (m - value)
        through_eta = (of_eta or of_weights)(value.sign()) * (fixed - eta[:, None, None]) * other
        v = x if v is None else v
        return (value.abs() + through_p + through_eta).to(v.dtype) @ v

    monkeypatch.setattr(ops, "cci", cci)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize("columns", [None, 9])
@pytest.mark.parametrize("sign", [-1.0, 0.0, 1.0])
def test_a_weight_without_a_sign_may_have_any(monkeypatch, dtype, columns, sign) -> None:
    inputs = tied_inputs(dtype, columns)
    backend_of(monkeypatch, tie(sign))
    check_cci("flawed", *inputs)


def test_without_that_the_other_sign_would_fail(monkeypatch) -> None:
    inputs = tied_inputs(torch.float32)
    exact_inputs = [t.double() if t.is_floating_point() else t for t in inputs]
    exact = evaluate_cci(*exact_inputs, backend="torch").results
    plain = evaluate_cci(*inputs, backend="torch").results
    backend_of(monkeypatch, tie(-1.0))
    dx = evaluate_cci(*inputs, backend="flawed").results["dx"]
    with pytest.raises(AssertionError, match="dx"):
        assert_exact_as_torch("dx", dx, plain["dx"], exact["dx"])


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize("place", [(1, 5, 9), (0, 5, 8), (1, 20, 20)])
def test_a_weight_with_a_sign_may_not(monkeypatch, dtype, place) -> None:
    def one(signs: Tensor) -> Tensor:
        flipped = signs.clone()
        flipped[place] *= -1
        return flipped

    backend_of(monkeypatch, one)
    with pytest.raises(AssertionError, match=r"flawed d.*; 1 weights undecided$"):
        check_cci("flawed", *tied_inputs(dtype))


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_both_gradients_are_held_to_the_same_sign(monkeypatch, sign) -> None:
    backend_of(monkeypatch, tie(sign), tie(-sign))
    with pytest.raises(AssertionError, match="flawed deta"):
        check_cci("flawed", *tied_inputs(torch.float32))


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize(
    "flaw",
    [
        lambda x, partner, eta, v: ops.cci(x, partner, eta[partner], v),
        lambda x, partner, eta, v: ops.cci(x, partner, 1.02 * eta, v),
        lambda x, partner, eta, v: ops.cci(x, partner, eta, v.roll(1, 1)),
        lambda x, partner, eta, v: ops.cci(x, partner, eta, v, scale=-0.9),
        lambda x, partner, eta, v: ops.cci(x, partner, eta, v).detach(),
    ],
    ids=["eta swapped", "eta off", "off by one", "scale off", "no gradient"],
)
def test_what_is_wrong_is_wrong(monkeypatch, dtype, flaw) -> None:
    x, partner, eta, v, dy = tied_inputs(dtype)
    right = ops.cci

    def cci(x, partner, eta, v=None, *, scale=-1.0, backend=None):
        with monkeypatch.context() as inner:
            inner.setattr(ops, "cci", right)
            # A sum with nothing keeps the leaves in the graph.
            return flaw(x, partner, eta, v) + 0 * (x.sum() + eta.sum() + v.sum()).to(x.dtype)

    monkeypatch.setattr(ops, "cci", cci)
    with pytest.raises(AssertionError, match="flawed"):
        check_cci("flawed", x, partner, eta, v, dy)


def test_many_wrong_signs_are_wrong(monkeypatch) -> None:
    def some(signs: Tensor) -> Tensor:
        drawn = torch.rand(signs.shape, generator=torch.Generator().manual_seed(0))
        return torch.where(drawn < 0.01, -signs, signs)

    backend_of(monkeypatch, some)
    with pytest.raises(AssertionError, match="flawed d"):
        check_cci("flawed", *tied_inputs(torch.float32))


def test_where_most_weights_have_no_sign_nothing_is_let_pass(monkeypatch) -> None:
    x, _, _, v, dy = tied_inputs(torch.float32)
    alone, eta = torch.tensor([0, 1]), torch.tensor([1.0, 1.0])
    assert Undecided(x, alone, eta, v, dy).count == 2 * 40 * 40
    backend_of(monkeypatch, torch.ones_like)
    with pytest.raises(AssertionError, match="3200 weights undecided, too many to judge"):
        check_cci("flawed", x, alone, eta, v, dy)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_few_weights_are_undecided(dtype) -> None:
    for kind in ("randn", "diffuse", "relu"):
        x = make_input(kind, (2, 500, 196), dtype)
        weights = Undecided(x, *make_pairs(2), None, make_input("randn", x.shape, dtype, seed=2))
        assert weights.count <= 4e-5 * 2 * 500**2


def test_an_order_of_summation_changes_rounding_alone() -> None:
    x, partner, eta, v, dy = tied_inputs(torch.float32)
    for values in (v, None):
        upstream = dy if values is v else x
        first = evaluate_sci(x, values, upstream, backend="torch").results
        other = evaluate_sci(x, values, upstream, backend="torch", order=0).results
        assert any(not torch.equal(first[name], other[name]) for name in first)
        torch.testing.assert_close(other, first, atol=1e-5, rtol=1e-5)
        eta = torch.tensor([-0.5, -0.2])
        first = evaluate_cci(x, partner, eta, values, upstream, backend="torch").results
        other = evaluate_cci(x, partner, eta, values, upstream, backend="torch", order=0).results
        torch.testing.assert_close(other, first, atol=1e-5, rtol=1e-5)


def test_other_orders_count_where_the_first_was_lucky() -> None:
    exact, first = torch.ones(1, dtype=torch.float64), torch.ones(1)
    orders = [(torch.tensor([1 + error]), exact) for error in (0.0, 4e-7)]
    assert_exact_as_torch(
        "luck", torch.tensor([1 + 7e-7]), first, exact, lambda: Standard(exact, orders)
    )
    for wrong in (1 + 1e-6, float("nan")):
        with pytest.raises(AssertionError, match="orders: 2"):
            assert_exact_as_torch(
                "wrong", torch.tensor([wrong]), first, exact, lambda: Standard(exact, orders)
            )
    assert_exact_as_torch("exact", first, first, exact, lambda: pytest.fail("no doubt"))


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_a_value_that_is_off_is_found_in_any_order(monkeypatch, dtype) -> None:
    x, _, _, v, dy = tied_inputs(dtype)
    right = ops.sci
    monkeypatch.setattr(ops, "sci", lambda *args, **_: right(args[0], args[1] * 1.03))
    with pytest.raises(AssertionError, match=r"flawed y.*orders: 8"):
        check_sci("flawed", x, v, dy)
