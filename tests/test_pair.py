"""sci and cci in one call: its definition, its arguments, and where there is no kernel."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import cin_fast
from cin_fast.pair import pair_columns
from cin_fast.testing import (
    make_input,
    make_pairs,
    make_psi,
)


def test_it_is_sci_then_eta_then_cci() -> None:
    x = make_input("diffuse", (4, 5, 6), torch.float64)
    v = make_input("randn", (4, 5, 3), torch.float64, seed=1)
    partner = torch.tensor([2, 1, 0, 3])
    weight, bias = make_psi(5, 0.3, torch.float64)
    y, y_pair = pair_columns(x, partner, weight, bias, v, mean=1)
    torch.testing.assert_close(y, cin_fast.sci(x, v))
    psi = torch.nn.functional.linear
    eta = psi(torch.cat([y[..., 1], y[partner][..., 1]], dim=1), weight, bias).squeeze(1)
    torch.testing.assert_close(y_pair, cin_fast.cci(x, partner, eta, v))


def test_gradients_in_float64() -> None:
    x = make_input("diffuse", (3, 3, 2), torch.float64).requires_grad_()
    v = make_input("randn", (3, 3, 2), torch.float64, seed=1).requires_grad_()
    psi = [t.requires_grad_() for t in make_psi(3, 0.3, torch.float64)]
    partner, _ = make_pairs(3)

    def call(x: Tensor, weight: Tensor, bias: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return pair_columns(x, partner, weight, bias, v, mean=1)

    assert torch.autograd.gradcheck(call, (x, *psi, v))
    assert torch.autograd.gradgradcheck(call, (x, *psi, v))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 5)}, r"x: expected \(B, C, L\)"),
        ({"partner": torch.tensor([1, 1])}, "partner: expected an involution"),
        ({"v": None}, r"v: expected a tensor \(B, C, K\), found NoneType"),
        ({"v": torch.zeros(2, 5, 3, 3)}, r"v: expected a tensor \(B, C, K\), found \(2, 5, 3, 3\)"),
        ({"v": torch.zeros(2, 4, 3)}, r"v: expected \(2, 5, K\)"),
        ({"psi_weight": torch.zeros(1, 5)}, r"psi_weight: expected 10 numbers.*\(1, 5\)"),
        ({"psi_weight": [1.0]}, "psi_weight: expected a floating-point tensor, found list"),
        ({"psi_bias": torch.zeros(2)}, "psi_bias: expected 1 number"),
        ({"psi_bias": torch.zeros(1).int()}, "psi_bias: expected a floating-point tensor"),
        ({"psi_bias": torch.zeros(1, device="meta")}, "psi_bias: expected x's device"),
        ({"mean": 3}, "mean: expected a column of v, 0 to 2, found 3"),
        ({"mean": -1}, "mean: expected a column of v"),
        ({"mean": 1.0}, "mean: expected a column of v, 0 to 2, found 1.0"),
        ({"scale": "x"}, "scale: expected a number"),
        ({"backend": "tpu"}, "backend: expected one of"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, object], message: str) -> None:
    arguments = {
        "x": torch.zeros(2, 5, 4),
        "partner": torch.tensor([1, 0]),
        "psi_weight": torch.zeros(1, 10),
        "psi_bias": torch.zeros(1),
        "v": torch.zeros(2, 5, 3),
        "mean": 1,
    }
    with pytest.raises(ValueError, match=message):
        pair_columns(**{**arguments, **change})


def test_forward_mode_uses_the_definition() -> None:
    x = make_input("diffuse", (2, 4, 3), torch.float64)
    v = make_input("randn", (2, 4, 2), torch.float64, seed=1)
    partner, (weight, bias) = torch.tensor([1, 0]), make_psi(4, 0.3, torch.float64)

    def of(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return pair_columns(x, partner, weight, bias, v, mean=1)

    tangents = [make_input("randn", t.shape, t.dtype, seed=9) for t in (x, weight)]
    ahead, behind = (
        of(*(t + sign * 1e-6 * d for t, d in zip((x, weight), tangents, strict=True)))
        for sign in (1, -1)
    )
    _, found = torch.func.jvp(of, (x, weight), tuple(tangents))
    for tangent, one, other in zip(found, ahead, behind, strict=True):
        torch.testing.assert_close(tangent, (one - other) / 2e-6, rtol=1e-6, atol=1e-8)


def test_without_data_there_are_shapes() -> None:
    x, v = torch.empty(2, 5, 4, device="meta"), torch.empty(2, 5, 3, device="meta")
    psi = torch.empty(1, 10, device="meta"), torch.empty(1, device="meta")
    y, y_pair = pair_columns(x, torch.tensor([1, 0]), *psi, v, mean=1)
    assert y.shape == y_pair.shape == v.shape
